"""The recipe's config: YAML and command line, types, limits, and the shipped files."""

import argparse
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import yaml

from recipes.xsum.config import Config, ConfigError, load_config, parse_arguments

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "xsum" / "configs"
TINY = {"model_config": {"model_type": "bart", "d_model": 32}}
# study_base.yaml leaves its files to the command line.
FILES = {"train_file": "a.jsonl", "validation_file": "b.jsonl"}


@pytest.fixture
def path(tmp_path):
    def write(**values):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(TINY | values))
        return file

    return write


def parse(*argv):
    return parse_arguments(argparse.ArgumentParser(allow_abbrev=False), argv)[1]


def test_command_line_wins_over_file_and_file_over_default(path):
    config = load_config(path(seed=3, learning_rate=0.5), parse("--seed", "7"))
    assert (config.seed, config.learning_rate, config.num_epochs) == (7, 0.5, 1)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--learning_rate", "3e-5"], "learning_rate", 3e-5),
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--max_steps", "12"], "max_steps", 12),
        (["--max_steps", "none"], "max_steps", None),
        (["--group_by_length", "false"], "group_by_length", False),
        (["--output_dir", "2024"], "output_dir", "2024"),
        (["--report_to", "tensorboard,wandb"], "report_to", ["tensorboard", "wandb"]),
        (["--report_to", "[]"], "report_to", []),
        (["--adam_betas", "[0.8, 0.9]"], "adam_betas", [0.8, 0.9]),
        (["--attention_dropout", "0"], "attention_dropout", 0.0),
        (["--prompt_template", "{document} =>"], "prompt_template", "{document} =>"),
        (["--model_config.d_model", "64"], "model_config", {"model_type": "bart", "d_model": 64}),
        (
            ["--attn_implementation=bsa_sparse", "--block_sparse.pattern=butterfly"],
            "block_sparse",
            {"pattern": "butterfly"},
        ),
        (["--model_config.init_std=8e-2"], "model_config", TINY["model_config"] | {"init_std": 0.08}),
    ],
    ids=str,
)
def test_command_line_text_becomes_the_fields_type(path, argv, name, value):
    read = getattr(load_config(path(max_steps=5), parse(*argv)), name)
    assert read == value and type(read) is type(value)


def test_yaml_exponent_without_point_is_a_number(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: facebook/bart-large\nlearning_rate: 3e-5\n")
    assert load_config(file).learning_rate == 3e-5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learnig_rate": 1}, "unknown option 'learnig_rate'; did you mean learning_rate?"),
        ({"seed": "many"}, "seed must be a whole number, got 'many'"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite"),
        ({"learning_rate": 0}, "learning_rate must be above 0"),
        ({"learning_rate": 10**400}, "learning_rate must be finite, got a number of 401 digits"),
        ({"seed": 99999999999}, "seed must be below 4294967296, got 99999999999"),
        ({"seed": 10**400}, "seed must be below 4294967296"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"max_steps": 0}, "max_steps must be at least 1, got 0"),
        ({"max_source_length": -5}, "max_source_length must be at least 2, got -5"),
        ({"prompt_template": "Sum up:"}, "prompt_template 'Sum up:' has no {document}, the place of the text; add it"),
        ({"text_column": "summary"}, "text_column and summary_column are both 'summary'; name two columns"),
        ({"group_by_length": "maybe"}, "group_by_length must be true or false, got 'maybe'"),
        ({"output_dir": 5}, "output_dir must be text, got 5"),
        ({"report_to": 5}, "report_to must be a list, got 5"),
        ({"adam_betas": "[0.9"}, "adam_betas must be a number, got '\\[0.9'"),
        ({"dropout": 1.0}, "dropout must be below 1, got 1.0"),
        ({"attention_dropout": -0.1}, "attention_dropout must be at least 0, got -0.1"),
        ({"per_device_batch_size": 0}, "per_device_batch_size must be at least 1, got 0"),
        ({"lr_scheduler": "step"}, "lr_scheduler must be one of linear, cosine, constant; got 'step'"),
        ({"adam_betas": [0.9]}, "adam_betas needs two numbers"),
        ({"adam_betas": [0.9, 1.0]}, "adam_betas must be below 1, got 1.0"),
        ({"model": "facebook/bart-large"}, "give either model .* or model_config"),
        ({"model_config": None}, "give either model .* or model_config"),
        ({"model_config": {"d_model": 8}}, "model_config needs model_type"),
        ({"model_config": "bart"}, "model_config must be a mapping, got 'bart'"),
        ({"dataset": "files"}, "dataset: files needs train_file and test_file"),
        ({"dataset": "files", "eval_every": 5}, "dataset: files needs train_file and test_file and validation_file"),
        ({"dataset": "files", "train_file": "a", "final_split": "validation"}, "dataset: files needs validation_file"),
        ({"train_file": "a.jsonl"}, "train_file is read only with dataset: files"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens 9 is above max_new_tokens 8"),
        ({"eval_untrained": True, "rouge": "never"}, "eval_untrained scores summaries"),
        ({"block_sparse": {"pattern": "local", "window": 4}}, "block_sparse needs attn_implementation: bsa_sparse"),
        ({"attn_implementation": "bsa_sparse"}, "bsa_sparse needs block_sparse, for example"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2 cannot compute in float32"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_wrong_values_are_named(path, values, message):
    with pytest.raises(ConfigError, match=message):
        load_config(path(**values))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learnig_rate", "1"], "unknown argument '--learnig_rate'; did you mean --learning_rate?"),
        (["--seeds", "1"], "unknown argument '--seeds'; did you mean --seed?"),
        (["config.yaml"], "unknown argument 'config.yaml'"),
        (["--model_config.d_model"], "unknown argument '--model_config.d_model'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_unknown_arguments_are_named(argv, message):
    with pytest.raises(ConfigError, match=message):
        parse(*argv)


def test_file_problems_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read config .*none\.yaml: No such file"):
        load_config(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: [")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not valid YAML"):
        load_config(broken)
    for text in ("just words", ""):
        broken.write_text(text)
        with pytest.raises(ConfigError, match="must hold `name: value` lines"):
            load_config(broken)
    broken.write_text("5: 1")
    with pytest.raises(ConfigError, match="unknown option 5"):
        load_config(broken)
    broken.write_bytes(b"output_dir: \xff")
    with pytest.raises(ConfigError, match=r"broken\.yaml is not UTF-8 \(byte 12\); save it as UTF-8"):
        load_config(broken)
    broken.write_text(f"seed: {'1' * 5000}")
    with pytest.raises(ConfigError, match=r"broken\.yaml holds a value that cannot be read: Exceeds the limit"):
        load_config(broken)
    with pytest.raises(ConfigError, match="cannot read config .*: Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmax_steps: 4\nseed: 2\n", "'seed' is given twice, in lines 1 and 3; keep one of them"),
        ("seed: 1\nmodel_config:\n  d_model: 8\n  model_type: t5\n  d_model: 9\n", "'d_model' .* lines 3 and 5"),
    ],
)
def test_options_given_twice_are_named(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=rf"config\.yaml: {message}"):
        load_config(file)


def test_a_file_may_merge_mappings_and_begin_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(
        "\ufeffmodel_config: &bart {model_type: bart, d_model: 32}\nblock_sparse: {<<: *bart, d_model: 8}\n"
        "attn_implementation: bsa_sparse\n",
        encoding="utf-8",
    )
    assert load_config(file).block_sparse == {"model_type": "bart", "d_model": 8}


def test_command_line_reaches_inside_of_its_own_mapping(path):
    config = load_config(path(), parse("--model_config", "{model_type: t5}", "--model_config.d_model", "8"))
    assert config.model_config == {"model_type": "t5", "d_model": 8}
    with pytest.raises(ConfigError, match="model_config must be a mapping, got 5"):
        load_config(path(model_config=5), parse("--model_config.d_model", "8"))


def test_resolved_config_reads_back_equal(path, tmp_path):
    config = load_config(path(learning_rate=3e-5, report_to=[], prompt_template="{document}\nTL;DR:"))
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(config.to_yaml())
    assert load_config(resolved) == config


def test_every_option_is_documented_in_help():
    text = argparse.ArgumentParser()
    parse_arguments(text, [])
    help_text = text.format_help()
    for spec in fields(Config):
        assert f"--{spec.name} VALUE" in help_text and spec.metadata["help"]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configs_load(file):
    overrides = FILES if file.stem == "study_base" else {}
    config = load_config(file, overrides)
    assert config.attn_implementation in ("eager", "sdpa", "flash_attention_2", "bsa_dense", "bsa_sparse")
    # What a file does not say is a default, so every line of it should say something.
    assert set(yaml.safe_load(file.read_text())) <= {"extends", *asdict(config)}


def test_xsum_configs_differ_in_attention_alone():
    configs = [
        asdict(load_config(CONFIGS / f"{name}.yaml")) for name in ("eager", "sdpa", "flash_attention_2", "bsa_dense")
    ]
    for config in configs:
        assert config["output_dir"] == f"runs/{config.pop('attn_implementation')}"
        del config["output_dir"]
    assert configs[1:] == configs[:-1]


@pytest.mark.parametrize("pattern", ["local", "longformer", "bigbird", "butterfly"])
def test_sparse_configs_differ_from_dense_in_their_layout_alone(pattern):
    config, dense = (asdict(load_config(CONFIGS / f"{name}.yaml")) for name in (f"bsa_sparse_{pattern}", "bsa_dense"))
    assert config.pop("block_sparse")["pattern"] == pattern
    assert config.pop("attn_implementation") == "bsa_sparse"
    assert config.pop("output_dir") == f"runs/bsa_sparse_{pattern}"
    assert config.items() <= dense.items()
