"""Options that save memory: padding-free layers, a fused loss, batches filled by tokens; and the record of its use."""

import json
import shutil
import signal
import sys
from itertools import islice

import pytest
import torch
from accelerate import Accelerator
from recipe_runs import (
    BART,
    command,
    curve,
    finish,
    fresh_accelerate,  # noqa: F401 - used by every test
    lines,
    run_main,
    signal_at_step,
    start,
    steps_logged,
    write_config,
)

from recipes.xsum import train as script
from recipes.xsum.batches import RunData
from recipes.xsum.config import ConfigError, load_config
from recipes.xsum.corpus import generate_corpus
from recipes.xsum.data import budget_batches
from recipes.xsum.model import build_model

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA |= {"intermediate_size": 64, "max_position_embeddings": 256}
PADDING_FREE = {"attn_implementation": "bsa_dense", "padding_free": True}
SAVING = PADDING_FREE | {"token_budget": 200, "group_by_length": False}


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """The options of a run on documents of 4 to 60 words, in no order of length."""
    folder = tmp_path_factory.mktemp("documents")
    for split, count in (("train", 40), ("test", 6)):
        rows = [
            {"document": " ".join(row["document"].split()[: 4 + 23 * i % 57]), "summary": row["summary"][: 9 + i % 20]}
            for i, row in enumerate(generate_corpus(count, 0, split))
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {f"{split}_file": str(folder / f"{split}.jsonl") for split in ("train", "test")}
    return {"dataset": "files", **files, "max_source_length": 100, "group_by_length": False}


def losses(run):
    return [line["loss"] for line in lines(run) if "loss" in line]


def data_of(tmp_path, **values):
    config = load_config(write_config(tmp_path / "given", **values))
    return config, RunData(config, Accelerator(), None)


# Batches filled by tokens


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("group_by_length", [True, False])
def test_batches_fill_the_budget(padded, group_by_length):
    lengths = torch.randint(20, 500, (2000,), generator=torch.Generator().manual_seed(0)).tolist()

    def batches(**options):
        order = {"seed": 0, "epoch": 0, "padded": padded, "group_by_length": group_by_length}
        return budget_batches(lengths, 8000, **(order | options))

    made = batches()
    assert sorted(index for batch in made for index in batch) == list(range(2000))
    sizes = [[lengths[index] for index in batch] for batch in made]
    counts = [len(size) * max(size) if padded else sum(size) for size in sizes]
    assert max(counts) <= 8000
    assert sum(counts) / len(counts) > 0.9 * 8000
    assert made == batches() and made != batches(epoch=1) and made != batches(seed=1)
    if padded:  # what grouping by length is for
        share = sum(lengths) / sum(counts)
        assert share > 0.95 if group_by_length else share < 0.7


def test_document_as_long_as_the_budget_is_a_batch_by_itself():
    order = {"seed": 0, "epoch": 0, "group_by_length": False}
    for padded in (True, False):
        assert sorted(map(len, budget_batches([10, 10, 10], 10, padded=padded, **order))) == [1, 1, 1]


def test_epochs_differ_in_length_and_any_step_is_found_again(tmp_path, unequal):
    values = unequal | SAVING | {"gradient_accumulation_steps": 2}
    config, data = data_of(tmp_path, **values)
    collator = data.collator(build_model(config, data.tokenizer))
    sizes = [data.steps_in(epoch + 1) - data.steps_in(epoch) for epoch in range(8)]
    assert len(set(sizes)) > 1
    total = data.steps_in(3)
    assert data.epochs_at(total) == 3.0 and data.epochs_at(total - 1) == 3 - 1 / sizes[2]
    whole = list(islice(data.steps(collator, 0), total + 2))
    for first in (1, sizes[0], sizes[0] + 1, total):
        _, again = data_of(tmp_path, **values)
        for expected, step in zip(whole[first:], again.steps(collator, first), strict=False):
            assert len(step) == 2
            assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(expected, step, strict=True))


@pytest.mark.parametrize("model", [BART, LLAMA], ids=lambda model: model["model_type"])
def test_collator_counts_live_tokens(model, tmp_path, unequal):
    config, data = data_of(tmp_path, **(unequal | SAVING | {"model_config": model}))
    for (batch,) in islice(data.steps(data.collator(build_model(config, data.tokenizer)), 0), 5):
        live = int(batch["attention_mask"].sum())
        assert live <= 200
        if model is LLAMA:
            assert batch["num_live_tokens"] == live
        else:
            assert torch.equal(batch["decoder_attention_mask"], (batch["labels"] != -100).long())
            assert batch["num_live_tokens"] == (live, int(batch["decoder_attention_mask"].sum()))


# Runs


def test_padding_free_run_resumes_to_the_last_bit(tmp_path, unequal, monkeypatch):
    values = unequal | SAVING | {"dropout": 0.1, "attention_dropout": 0.1, "max_steps": 24, "save_every": 5}
    run_main(tmp_path, name="full", **values)
    with monkeypatch.context() as patch:
        signal_at_step(patch, signal.SIGTERM, 12)
        assert script.main(command(tmp_path / "given" / "config.yaml", tmp_path / "cut")[2:]) == 128 + signal.SIGTERM
    assert steps_logged(tmp_path / "cut") == 12
    run_main(tmp_path, "--resume", name="cut", **values)
    assert curve(tmp_path / "cut") == curve(tmp_path / "full")

    records = [line for line in lines(tmp_path / "full") if "loss" in line]
    assert records[0]["options"] == {
        "padding_free": True,
        "cuda_graphs": False,
        "fused_linear_cross_entropy": False,
        "token_budget": 200,
        "group_by_length": False,
        "gradient_checkpointing": False,
    }
    documents = [b["examples"] - a["examples"] for a, b in zip(records, records[1:], strict=False)]
    tokens = [b["source_tokens"] - a["source_tokens"] for a, b in zip(records, records[1:], strict=False)]
    assert len(set(documents)) > 1 and max(tokens) <= 200
    live = records[-1]["source_tokens"] + records[-1]["target_tokens"]
    assert live < records[-1]["padded_tokens"]
    assert losses(tmp_path / "full")[-1] < losses(tmp_path / "full")[0]


@pytest.mark.parametrize("model", [BART, LLAMA], ids=lambda model: model["model_type"])
def test_padding_free_changes_no_loss(model, tmp_path, unequal):
    values = unequal | {"model_config": model, "label_smoothing": 0.1, "attn_implementation": "bsa_dense"}
    values |= {"per_device_batch_size": 10} | ({"dropout": 0.0} if model is BART else {})
    padded = run_main(tmp_path, name="padded", **values)
    packed = run_main(tmp_path, name="packed", padding_free=True, **values)
    assert losses(packed) == pytest.approx(losses(padded), rel=1e-5)
    assert lines(packed)[-1]["eval_loss"] == pytest.approx(lines(padded)[-1]["eval_loss"], rel=1e-5)
    # The layers saw live tokens alone: what they keep shrinks with the padding.
    parts = [json.loads((run / "ledger.json").read_text())["parts"]["mlp"] for run in (packed, padded)]
    first = lines(packed)[0]
    share = (first["source_tokens"] + first["target_tokens"]) / first["padded_tokens"]
    assert share < 0.9
    assert parts[0] / parts[1] == pytest.approx(share, rel=0.1)


def test_fused_loss_changes_no_loss(tmp_path, unequal):
    values = unequal | PADDING_FREE | {"dropout": 0.0, "label_smoothing": 0.1, "gradient_accumulation_steps": 2}
    pytest.importorskip("liger_kernel", reason="liger-kernel is optional")
    runs = [
        run_main(tmp_path, name=f"fused {fused}", fused_linear_cross_entropy=fused, max_steps=2, **values)
        for fused in (False, True)
    ]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)
    assert lines(runs[1])[-1]["eval_loss"] == pytest.approx(lines(runs[0])[-1]["eval_loss"], rel=1e-5)
    assert lines(runs[1])[0]["options"]["fused_linear_cross_entropy"] is True


def test_fused_loss_under_autocast(tmp_path, unequal):
    pytest.importorskip("liger_kernel", reason="liger-kernel is optional")
    values = unequal | PADDING_FREE | {"dropout": 0.0, "max_steps": 2, "mixed_precision": "bf16"}
    runs = [run_main(tmp_path, name=f"{fused}", fused_linear_cross_entropy=fused, **values) for fused in (False, True)]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=5e-3)


def test_two_processes_take_equal_shares_of_the_tokens(tmp_path, unequal):
    values = unequal | SAVING | {"dropout": 0.0, "max_steps": 4}
    one = run_main(tmp_path, name="one", gradient_accumulation_steps=2, **values)
    config = write_config(tmp_path, **values)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    code, _, err = finish(start(*launch, *command(config, tmp_path / "two")[1:]))
    assert code == 0, err
    for a, b in zip(curve(one), curve(tmp_path / "two"), strict=True):
        assert a[:4] == b[:4] and a[5:] == pytest.approx(b[5:], rel=1e-5)
    assert not (tmp_path / "two" / "ledger.json").exists()  # single processes write one


# The ledger


def test_ledger_is_written_once_and_leaves_training_untouched(tmp_path, monkeypatch):
    values = {"dropout": 0.1, "attention_dropout": 0.1, "attn_implementation": "bsa_dense", "save_every": 2}
    measured = run_main(tmp_path, name="measured", **values)
    written = (measured / "ledger.json").read_bytes()
    shutil.rmtree(measured / "checkpoints" / "step_00000006")
    run_main(tmp_path, "--resume", name="measured", **values)
    assert (measured / "ledger.json").read_bytes() == written
    monkeypatch.setattr(script, "write_ledger", lambda *_: None)
    plain = run_main(tmp_path, name="plain", **values)
    assert curve(measured) == curve(plain)
    ledger = json.loads(written)
    assert ledger["allocator_peak"] is None and ledger["moment"] in ("forward", "backward")
    weights = sum(path.stat().st_size for path in (measured / "model").glob("*.safetensors"))
    assert ledger["parts"]["weights"] == pytest.approx(weights, rel=0.1)
    assert ledger["parts"]["optimizer state"] == pytest.approx(2 * weights, rel=0.1)
    assert {"attention", "mlp", "norms", "logits and loss"} <= ledger["parts"].keys()


# Errors


def test_combinations_that_cannot_work_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="padding_free needs attn_implementation: bsa_dense or bsa_sparse, not sdpa"):
        load_config(write_config(tmp_path, padding_free=True))
    with pytest.raises(ConfigError, match="cuda_graphs needs padding_free: true"):
        load_config(write_config(tmp_path, cuda_graphs=True))

    def trained(**values):
        config = load_config(write_config(tmp_path, output_dir=str(tmp_path / "run"), **values))
        script.train(config)

    with pytest.raises(ConfigError, match="has 64 tokens, more than token_budget 50; raise it, or cut"):
        trained(token_budget=50)
    with pytest.raises(ConfigError, match="40 training documents do not fill one batch of 6400 tokens"):
        trained(token_budget=64, gradient_accumulation_steps=100)
    with pytest.raises(ConfigError, match="padding_free: GPT2LMHeadModel has no layer stack that is known"):
        gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
        trained(**PADDING_FREE, model_config=gpt2)
    pytest.importorskip("liger_kernel", reason="liger-kernel is optional")
    with pytest.raises(ConfigError, match="fused_linear_cross_entropy: .*GPT2LMHeadModel is not known"):
        trained(fused_linear_cross_entropy=True, model_config=gpt2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="fused_linear_cross_entropy: .* need a GPU; without one leave it out"):
        trained(fused_linear_cross_entropy=True)
    assert not (tmp_path / "run").exists()
