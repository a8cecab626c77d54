"""README.md: its Python runs, its commands exist and take these arguments, and CI runs what it says."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from recipes.xsum.config import load_config

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]


def test_python_runs(capsys):
    namespace = {}
    for source in blocks("python"):
        exec(compile(source, "README.md", "exec"), namespace)
    assert namespace["model"].model.shared.weight.grad.isfinite().all()
    assert namespace["out"].shape == (1, 4, 10, 64)
    used, chosen = capsys.readouterr().out.splitlines()
    assert "'model.encoder.layers.0.self_attn': 'torch'" in used and chosen in TEXT


def run_help(words: list[str], monkeypatch, capsys) -> str:
    """The help of the script or module that a command starts with `python` runs."""
    target = words[2] if words[1] == "-m" else words[1]
    subcommand = words[3:4] if words[1] == "-m" else []
    monkeypatch.setattr(sys, "argv", [target, *subcommand, "--help"])
    with pytest.raises(SystemExit) as leaving:
        if words[1] == "-m":
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            monkeypatch.syspath_prepend(ROOT / Path(target).parent)
            runpy.run_path(str(ROOT / target), run_name="__main__")
    assert leaving.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", sorted({c for c in COMMANDS if c.startswith(("python ", "accelerate "))}))
def test_scripts_take_these_arguments(command, monkeypatch, capsys):
    words = shlex.split(command)
    if words[:2] == ["accelerate", "launch"]:
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        assert words[2] == "--config_file" and (ROOT / words[3]).is_file() and script == 4
        words = ["python", *words[script:]]
    text = run_help(words, monkeypatch, capsys)
    assert [word for word in words if word.startswith("--") and word not in text] == []
    if words[1].endswith("train.py"):
        options = dict(zip((word[2:] for word in words[2::2]), words[3::2], strict=True))
        load_config(ROOT / options.pop("config"), options)


def test_other_commands():
    """Installations name extras that exist, checks name files that exist."""
    _, extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")
    others = [c for c in COMMANDS if not re.match(r"python |accelerate ", c)]
    for command in others:
        if command.startswith("pip "):
            extra = re.fullmatch(r'pip install -c constraints\.txt -e "\.\[(\w+)\]"', command)[1]
            assert f"\n{extra} = [" in extras
        else:
            assert re.match(r"python3 -m venv \.venv|ruff check \. && ruff format --check \.|pytest", command)
            assert all((ROOT / word).exists() for word in command.split() if word.startswith("tests/"))
    assert any(c.startswith("pip ") for c in others)


def block_after(marker: str) -> str:
    return re.search(rf"<!-- {marker} -->\n```bash\n(.*?)```", TEXT, flags=re.DOTALL)[1]


def test_ci_runs_the_test_command():
    script, command = (ROOT / ".ci" / "run").read_text(), block_after("test command")
    assert script.endswith(command) and "pytest" in command
    assert script.index("ruff check .") < script.index("ruff format --check .") < script.index(command)


def test_first_screen_has_both_commands():
    head = "\n".join(TEXT.splitlines()[:26])
    assert block_after("main job") in head and block_after("test command") in head


def test_links_lead_somewhere():
    targets = [t for t in re.findall(r"\]\((.*?)\)", TEXT) if not t.startswith("http")]
    assert targets and [t for t in targets if not (ROOT / t).exists()] == []
