"""Run directories with known numbers, for the tests of reports."""

import json

import yaml

GIB = 2**30
KINDS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def make_run(folder, attention="sdpa", *, steps=40, loss=3.0, speed=100.0, **left_out):
    """A run directory with known numbers: each step sees 2 documents, 80 source and 20 target tokens."""
    folder.mkdir(parents=True)
    config = {
        "attn_implementation": attention,
        "model": None,
        "model_config": {"model_type": "bart"},
        "dataset": "generated",
        "dataset_name": "EdinburghNLP/xsum",
        "train_file": None,
        "per_device_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "group_by_length": True,
        "mixed_precision": "no",
        "label_smoothing": 0.0,
        "rouge": "end",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    backends = {"torch": 3} if attention == "bsa_dense" else {}
    records = [
        {
            "step": step,
            "epoch": step / 10,
            "examples": 2 * step,
            "source_tokens": 80 * step,
            "target_tokens": 20 * step,
            "padded_tokens": 120 * step,
            "seconds": 5.0 + 100 * step / speed,
            "loss": loss + 2.0 / step,
            "grad_norm": 1.0,
            "learning_rate": 1e-3,
            "peak_memory_gib": 0.5,
            "attention": {"implementation": attention, "backends": backends, "layers": 3},
        }
        for step in range(1, steps + 1)
    ]
    records.append({"step": steps, "epoch": steps / 10, "split": "test", "eval_loss": 2.5, "rouge": None})
    if "metrics" not in left_out:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "env.json").write_text(json.dumps({"device": "a machine", "processes": 1}))
    if "ledger" not in left_out:
        parts = {"weights": GIB, "attention": GIB // 4} | ({"mlp": GIB // 2} if attention == "bsa_dense" else {})
        ledger = {"parts": parts | {"workspace": GIB}, "moment": "backward", "allocator_peak": None}
        (folder / "ledger.json").write_text(json.dumps(ledger))
    if "model" not in left_out:
        (folder / "model").mkdir()
    if "rouge" not in left_out:
        scores = {kind: {"score": 30.0 + i, "low": 28.0 + i, "high": 32.5 + i} for i, kind in enumerate(KINDS)}
        untrained = {kind: {"score": 1.0, "low": 0.5, "high": 1.5} for kind in KINDS}
        (folder / "rouge.json").write_text(
            json.dumps({"split": "test", "examples": 9, **scores, "untrained": untrained})
        )
    return folder
