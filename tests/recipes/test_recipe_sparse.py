"""Block layouts in the recipe: a run with each of the shipped ones, and what it refuses."""

import json
import re
from pathlib import Path

import pytest
import yaml
from recipe_runs import BART, fresh_accelerate, lines, run_main, write_config  # noqa: F401 - a fixture of every test

from recipes.xsum import train as script
from recipes.xsum.config import load_config
from recipes.xsum.evaluate import load_trained

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "xsum" / "configs"
SPARSE = {"attn_implementation": "bsa_sparse", "max_steps": 2}


@pytest.mark.parametrize("pattern", ["local", "longformer", "bigbird", "butterfly"])
def test_shipped_layouts_train(pattern, tmp_path):
    given = yaml.safe_load((CONFIGS / f"bsa_sparse_{pattern}.yaml").read_text())["block_sparse"]
    run = run_main(tmp_path, block_sparse=given, **SPARSE)
    assert len([line for line in lines(run) if "loss" in line]) == 2
    saved = json.loads((run / "model" / "config.json").read_text())["block_sparse"]
    assert saved["pattern"] == pattern and saved["roles"] == {"decoder": "dense"}


def test_layouts_change_what_is_learnt_and_all_blocks_do_not(tmp_path):
    wide = {"max_source_length": 100, "max_target_length": 24}
    losses = {}
    for name, rule in (("all", {"pattern": "all_blocks"}), ("local", {"pattern": "local", "window": 2})):
        run = run_main(tmp_path, name=name, block_sparse={"block_size": 32, **rule}, **SPARSE, **wide)
        losses[name] = [line["loss"] for line in lines(run) if "loss" in line]
    dense = run_main(tmp_path, name="dense", **(SPARSE | wide | {"attn_implementation": "bsa_dense"}))
    expected = [line["loss"] for line in lines(dense) if "loss" in line]
    assert losses["all"] == pytest.approx(expected, rel=1e-5)
    assert losses["local"] != pytest.approx(expected, rel=1e-5)


def test_a_finished_run_is_loaded_with_its_layouts(tmp_path):
    """Pegasus does not number its encoder layers, which the rule for one of them needs."""
    rules = {"pattern": "local", "window": 8, "layers": {"encoder.0": "dense"}}
    run = run_main(tmp_path, block_sparse=rules, model_config=BART | {"model_type": "pegasus"}, **SPARSE)
    model, _ = load_trained(run, load_config(run / "config.yaml"), untrained=False)
    assert model.config.block_sparse["layers"] == {"encoder.0": "dense"}
    assert model.model.encoder.layers[0].self_attn.layer_idx == 0


@pytest.mark.parametrize(
    ("block_sparse", "message"),
    [
        ({"pattern": "locall", "window": 4}, "block_sparse: .*locall.*local"),
        ({"pattern": "local", "windo": 4}, "block_sparse: .*windo"),
        ({"pattern": "local", "window": 4, "block_size": 48}, "block_sparse: .*no kernel tile divides 48"),
        ({"window": 4}, "block_sparse: .*'window': 4"),
    ],
)
def test_wrong_layouts_are_named(block_sparse, message, tmp_path, capsys):
    config = write_config(tmp_path, block_sparse=block_sparse, **SPARSE)
    assert script.main(["--config", str(config), "--output_dir", str(tmp_path / "run")]) == 2
    assert re.search(message, capsys.readouterr().err)
