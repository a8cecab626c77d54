"""README.md and docs/: their Python runs, their commands exist and take these arguments, their numbers are those of
the committed rows, and CI runs the two commands."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import sys
from pathlib import Path

import doc_models
import pytest
import yaml

import hf_flashbsa
from hf_flashbsa.__main__ import COMMANDS as SUBCOMMANDS
from hf_flashbsa.__main__ import main
from hf_flashbsa.integration.padding_free import layer_stacks
from recipes.xsum.config import load_config

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "recipes" / "xsum" / "README.md", *(ROOT / "docs").glob("*.md")]
MAKEFILE = (ROOT / "Makefile").read_text()


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    return [line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines()]


COMMANDS = sorted({" ".join(line.split()) for page in PAGES for line in commands(page)})


def is_script(command: str) -> bool:
    return command.startswith(("python ", "accelerate ", "hf-flashbsa "))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return doc_models.save(tmp_path_factory.mktemp("checkpoints"))


# Python


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_python_runs(page, checkpoints, monkeypatch, capsys):
    """The snippets of a page, one after the other in one namespace, with tiny checkpoints instead of the Hub's."""
    doc_models.use_instead(monkeypatch, checkpoints)
    monkeypatch.setattr(layer_stacks, "_STACKS", dict(layer_stacks._STACKS))  # a snippet registers one
    namespace = {}
    for source in blocks(page, "python"):
        exec(compile(source, name_of(page), "exec"), namespace)
    if "model" in namespace and page == README:
        assert namespace["model"].model.shared.weight.grad.isfinite().all()
        assert namespace["sparse"].model.shared.weight.grad.isfinite().all()
        assert "'model.encoder.layers.0.self_attn'" in capsys.readouterr().out


def test_quick_start_says_what_is_printed(checkpoints, monkeypatch, capsys):
    doc_models.use_instead(monkeypatch, checkpoints)
    page = ROOT / "docs" / "quickstart.md"
    for source in blocks(page, "python"):
        if "choose_backend" in source:
            exec(compile("import torch\n" + source, name_of(page), "exec"), {})
    assert capsys.readouterr().out.strip() in page.read_text()


# Commands


def run_help(words: list[str], monkeypatch, capsys) -> str:
    """The help of a command, or of its subcommand."""
    subcommand = [word for word in words[2:3] if not word.startswith("--")]
    with pytest.raises(SystemExit) as leaving:
        if words[0] == "hf-flashbsa":
            main([words[1], "--help"])
        else:
            monkeypatch.setattr(sys, "argv", [words[1], *subcommand, "--help"])
            monkeypatch.syspath_prepend(ROOT / Path(words[1]).parent)
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    assert leaving.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [command for command in COMMANDS if is_script(command)])
def test_scripts_take_these_arguments(command, monkeypatch, capsys):
    words = shlex.split(command)
    if words[:2] == ["accelerate", "launch"]:
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert words[2] == "--config_file" and (ROOT / words[3]).is_file() and script == 4
        words = ["python", *words[script:]]
    if words[:2] == ["hf-flashbsa", "run"]:
        del words[2:]  # another program's
    text = run_help(words, monkeypatch, capsys)
    assert [word for word in words if word.startswith("--") and word not in text] == []
    if words[1].endswith("train.py"):
        values = [word for word in words[2:] if word not in ("--overwrite", "--resume")]
        options = dict(zip((word[2:] for word in values[::2]), values[1::2], strict=True))
        load_config(ROOT / options.pop("config"), options)


def extras() -> set[str]:
    _, rest = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")
    return set(re.findall(r"^(\w+) = \[", rest.split("\n[")[0], flags=re.MULTILINE))


@pytest.mark.parametrize("command", [command for command in COMMANDS if not is_script(command)])
def test_other_commands(command):
    """Installations name extras that exist, `make` names targets, checks name files."""
    if command.startswith("pip "):
        forms = (
            r'pip install (-c constraints\.txt )?-e ("\.\[(?P<extra>\w+)\]"|\.)',
            r"pip install torch --index-url https://download\.pytorch\.org/whl/cpu",
        )
        found = next(filter(None, (re.fullmatch(form, command) for form in forms)))
        assert found.groupdict().get("extra") in {None, *extras()}
    elif command.startswith("make "):
        target, *variables = command.split()[1:]
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE)
        assert all(f"\n{word.split('=')[0]} ?=" in MAKEFILE for word in variables)
    else:
        checks = "ruff check . && ruff format --check . && mypy"
        assert command in ("pre-commit install", checks) or command.startswith("pytest")
        assert all((ROOT / word).exists() for word in command.split() if word.startswith("tests/"))


def test_command_line_program_is_installed_as_documented():
    assert '\nhf-flashbsa = "hf_flashbsa.__main__:main"\n' in (ROOT / "pyproject.toml").read_text()
    used = {word.split()[1] for word in COMMANDS if word.startswith("hf-flashbsa ")}
    assert used == set(SUBCOMMANDS)


def block_after(marker: str) -> str:
    return re.search(rf"<!-- {marker} -->\n```bash\n(.*?)```", README.read_text(), flags=re.DOTALL)[1]


def recipe_of(target: str) -> list[str]:
    """The lines that a target of the Makefile runs."""
    return re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)[1].replace("\t", "").splitlines()


def test_the_main_job_trains_and_reports():
    assert block_after("main job") == "make demo\n"
    trains, reports = recipe_of("demo")
    config = re.fullmatch(r"\$\(BIN\)/python recipes/xsum/train\.py --config (\S+) --overwrite", trains)[1]
    run = load_config(ROOT / config).output_dir
    assert re.fullmatch(rf"\$\(BIN\)/python recipes/xsum/report\.py {run} --out \S+", reports)


def test_ci_runs_the_test_command():
    """In a fresh environment, behind the cheaper checks."""
    assert block_after("test command") == "make test\n"
    assert recipe_of("test") == ["$(BIN)/python -m pytest -n $(WORKERS)"]
    script = (ROOT / ".ci" / "run").read_text()
    targets = re.findall(r'^"\$\{make\[@\]\}" VENV="\$venv/\w+" (\w+)', script, flags=re.MULTILINE)
    assert targets == ["lint", "docs", "test"] and "venv=$(mktemp -d)" in script
    assert recipe_of("docs") == ["$(BIN)/mkdocs build --strict"]
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert all(f"make {target}" in workflow for target in targets)


def test_hooks_run_the_ruff_that_ci_runs():
    version = re.search(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
    assert f"ruff-pre-commit\n    rev: v{version} " in (ROOT / ".pre-commit-config.yaml").read_text()


def test_one_version():
    version = hf_flashbsa.__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("path", [*ROOT.glob(".github/**/*.yml"), ROOT / "CITATION.cff"], ids=name_of)
def test_repository_files_are_yaml(path):
    assert yaml.safe_load(path.read_text())


def test_api_reference_has_every_public_name():
    named = re.findall(
        r"^::: hf_flashbsa\.(?:\w+\.)*(\w+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE
    )
    assert set(hf_flashbsa.__all__) - set(named) == set()


# Words and numbers


def test_readme_is_short_and_begins_with_what_matters():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    head = "\n".join(lines[:26])
    assert block_after("main job") in head and block_after("test command") in head and "overview.png" in head


def test_results_are_those_of_the_committed_rows(monkeypatch):
    pytest.importorskip("tomllib", reason="Python 3.11 or newer")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import summary

    text = README.read_text()
    assert summary.with_table(text, summary.table(summary.Rows.read())) == text, "run benchmarks/summary.py"
    for name, svg in summary.badges().items():
        assert (ROOT / "docs" / "assets" / name).read_text() == svg and f"docs/assets/{name}" in text


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    targets = [t.partition("#")[0] for t in re.findall(r"\]\((.*?)\)", page.read_text()) if "://" not in t]
    assert [t for t in targets if t and not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_paths_exist(page):
    """Files of this repository that the text names."""
    roots = "benchmarks|docs|hf_flashbsa|notebooks|recipes|tests|kernels|integration|training"
    named = re.findall(rf"`((?:{roots})/[\w/.*-]+)`", page.read_text())
    places = (ROOT, ROOT / "hf_flashbsa")
    assert [path for path in named if not any(list(place.glob(path.rstrip("/"))) for place in places)] == []


def message_patterns() -> list[str]:
    """All string constants of the package; `\\0` stands for values that messages format."""
    found = []
    for path in (ROOT / "hf_flashbsa").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(p.value if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_troubleshooting_quotes_messages_that_exist():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    quotes = re.findall(r"^\| `(.*?)`", text, flags=re.MULTILINE)
    messages = message_patterns()
    assert len(quotes) > 20
    unknown = []
    for quote in quotes:
        parts = [part.strip() for part in quote.split("...") if part.strip()]
        shape = re.compile(".*".join(map(re.escape, parts)), flags=re.DOTALL)
        if not any(map(shape.search, messages)):
            unknown.append(quote)
    assert unknown == []
