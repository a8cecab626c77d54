"""Config files that extend others: what wins, what paths mean, and which mistakes are named."""

from dataclasses import asdict
from pathlib import Path

import pytest

from recipes.xsum.config import ConfigError, load_config

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "xsum" / "configs"
BASE = "model_config: {model_type: bart, d_model: 32}\nseed: 1\nmax_steps: 5\n"


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(exist_ok=True)
        path.with_suffix(".yaml").write_text(text)
    return folder / "top.yaml"


def test_own_options_win_over_those_of_the_base(tmp_path):
    config = load_config(write(tmp_path, base=BASE, top="extends: base.yaml\nseed: 2\n"))
    assert (config.seed, config.max_steps, config.model_config["d_model"]) == (2, 5, 32)


def test_command_line_wins_over_all_and_reaches_into_a_mapping_of_the_base(tmp_path):
    top = write(tmp_path, base=BASE, top="extends: base.yaml\nseed: 2\n")
    config = load_config(top, {"seed": "3", "model_config.d_model": "64"})
    assert config.seed == 3 and config.model_config == {"model_type": "bart", "d_model": 64}


def test_bases_have_bases_and_paths_are_relative_to_the_file_that_names_them(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    files = {"root": BASE, "inner__middle": "extends: ../root.yaml\nseed: 7\n", "top": "extends: inner/middle.yaml\n"}
    config = load_config(write(tmp_path, **files))
    assert (config.seed, config.max_steps) == (7, 5)


def test_an_option_can_be_taken_back(tmp_path):
    config = load_config(write(tmp_path, base=BASE, top="extends: base.yaml\nmax_steps: null\n"))
    assert config.max_steps is None


def test_mappings_are_replaced_whole(tmp_path):
    config = load_config(write(tmp_path, base=BASE, top="extends: base.yaml\nmodel_config: {model_type: t5}\n"))
    assert config.model_config == {"model_type": "t5"}


def test_a_run_records_what_it_was_made_of(tmp_path):
    config = load_config(write(tmp_path, base=BASE, top="extends: base.yaml\nseed: 2\n"))
    alone = tmp_path / "alone.yaml"
    alone.write_text(config.to_yaml())
    assert "extends" not in alone.read_text() and load_config(alone) == config


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"top": "extends: none.yaml\n"}, r"cannot read config .*none\.yaml: No such file"),
        ({"top": "extends: [a.yaml]\n"}, r"top\.yaml: extends must be the path of a config file, got \['a\.yaml'\]"),
        ({"top": "extends:\n"}, r"top\.yaml: extends must be the path of a config file, got None"),
        ({"top": "extends: top.yaml\n"}, r"top\.yaml extends itself"),
        ({"top": "extends: a.yaml\n", "a": "extends: top.yaml\n"}, r"top\.yaml extends itself, by way of .*a\.yaml"),
        ({"top": "extends: base.yaml\n", "base": BASE + "sed: 2\n"}, "unknown option 'sed'; did you mean seed"),
        ({"top": "extends: base.yaml\n", "base": BASE + "seed: 2\n"}, r"base\.yaml: 'seed' is given twice"),
        ({"top": "extends: base.yaml\nextends: base.yaml\n", "base": BASE}, r"top\.yaml: 'extends' is given twice"),
        ({"top": "extends: base.yaml\n", "base": "words"}, r"base\.yaml must hold `name: value` lines"),
        ({"top": "extends: base.yaml\n", "base": "seed: ["}, r"base\.yaml is not valid YAML"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_named(tmp_path, files, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, **files))


def test_extends_is_not_an_option_of_the_command_line(tmp_path):
    with pytest.raises(ConfigError, match="unknown option 'extends'"):
        load_config(write(tmp_path, top=BASE), {"extends": "other.yaml"})


def test_shipped_variants_hold_their_differences_alone():
    """Nothing that a variant says is what its base says already."""
    base = asdict(load_config(CONFIGS / "base.yaml"))
    variants = [path for path in CONFIGS.glob("*.yaml") if "extends: base.yaml" in path.read_text()]
    assert len(variants) == 9
    for path in variants:
        lines = [line.split(":")[0] for line in path.read_text().splitlines() if line[:1].isalpha()]
        same = {name for name, value in asdict(load_config(path)).items() if value == base[name]}
        assert set(lines) & same <= {"attn_implementation"}, path.name  # which is always said


def test_readme_lists_every_config():
    text = (CONFIGS.parent / "README.md").read_text()
    assert {f"| `{path.name}` |" in text for path in CONFIGS.glob("*.yaml")} == {True}
