"""The memory ledger against counts by hand, and the search for the largest batch against a memory of known size."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from hf_flashbsa import BlockSparseConfig, set_block_sparse
from hf_flashbsa.training import ledger as parts
from hf_flashbsa.training.largest_batch import GIB, LargestBatch, largest_batch
from hf_flashbsa.training.ledger import Ledger, measure_step

B, S, T, D, F, VOCAB, HEADS = 4, 128, 16, 64, 256, 512, 4


def bart(implementation: str = "sdpa", layers: int = 1, dropout: float = 0.0) -> BartForConditionalGeneration:
    config = BartConfig(
        d_model=D,
        encoder_layers=layers,
        decoder_layers=1,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=F,
        decoder_ffn_dim=F,
        vocab_size=VOCAB,
        max_position_embeddings=256,
        dropout=dropout,
        attention_dropout=dropout,
    )
    torch.manual_seed(0)
    return BartForConditionalGeneration._from_config(config, attn_implementation=implementation).train()


def bart_batch(rows: int = B, padding: bool = False) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, S, dtype=torch.long)
    if padding:
        mask[::2, S // 2 :] = 0
    ids = torch.randint(4, VOCAB, (rows, S + T), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids[:, :S], "attention_mask": mask, "labels": ids[:, S:].contiguous()}


def saved(ledger: Ledger) -> int:
    """Bytes kept for the backward pass, logits and embeddings aside."""
    return sum(ledger.parts.get(name, 0) for name in (parts.ATTENTION, parts.MLP, parts.NORMS, parts.OTHER))


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(32, 128, bias=False)
        self.fc2 = nn.Linear(128, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(torch.relu(self.fc1(x))).mean()


def test_perceptron_counted_by_hand():
    model, rows = Perceptron(), 100
    x = torch.randn(rows, 32)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ledger = measure_step(model, x, compute_loss=lambda model, batch: model(batch), optimizer=optimizer)
    weights = 4 * (32 * 128 + 128)
    assert ledger.parts[parts.WEIGHTS] == weights
    assert ledger.parts[parts.OPTIMIZER] == 2 * weights + 2 * 4  # two moments, and one step count for each tensor
    assert ledger.parts[parts.INPUTS] == 4 * rows * 32
    # relu's output is saved by relu, that runs in the outermost module, and by fc2: one storage, counted once.
    assert ledger.parts[parts.LOGITS] == 4 * rows * 128
    assert parts.MLP not in ledger.parts
    assert ledger.tracked == sum(ledger.parts.values())
    assert ledger.peak is None and ledger.explained is None


def test_encoder_layer_keeps_64_bytes_per_token_and_channel():
    """fp32, no dropout: input 4, q k v 12, out 4, LN1 in 4, fc1 in 4, GELU in 16, fc2 in 16, LN2 in 4.

    Per token also the log-sum-exp of each head, and mean and deviation of two norms.
    """
    batch = {**bart_batch(), "attention_mask": None}
    one, three = (saved(measure_step(bart(layers=n), batch)) for n in (1, 3))
    tokens = B * S
    assert (three - one) / 2 == tokens * (64 * D + 4 * HEADS + 2 * 8)


def test_eager_keeps_the_scores_and_bsa_dense_does_not():
    batch = bart_batch(padding=True)
    eager, dense = (measure_step(bart(name, layers=2), batch).parts for name in ("eager", "bsa_dense"))
    # Eager keeps the softmax's output, float32 here, which the product with v shares.
    extra = eager[parts.ATTENTION] - dense[parts.ATTENTION]
    scores = 4 * B * HEADS * (2 * S * S + T * T + T * S)
    assert 0.95 * scores < extra <= scores
    assert parts.MASKS not in dense


def test_masks_of_sdpa_are_told_apart():
    padded, full = (measure_step(bart(), bart_batch(padding=p)).parts for p in (True, False))
    assert padded[parts.MASKS] >= B * S * S  # at least the boolean mask itself
    assert full.get(parts.MASKS, 0) < padded[parts.MASKS] / 4
    assert padded[parts.MLP] == full[parts.MLP]


def test_weight_copies_of_autocast():
    model = bart()
    ledger = measure_step(model, bart_batch(), autocast_dtype=torch.bfloat16)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    sizes = sum(2 * p.numel() for module in linear for p in module.parameters())
    # The padding entries of position tables and the norms are not cast.
    assert ledger.parts[parts.WEIGHT_COPIES] == sizes


def test_logits_of_a_language_model_counted_by_hand():
    """Under autocast the peak is in the loss's backward: log-probabilities kept, two gradients, all float32."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=4096)
    model = LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation="bsa_dense").train()
    ids = torch.randint(4, 4096, (B, S))
    ledger = measure_step(model, {"input_ids": ids, "labels": ids}, autocast_dtype=torch.bfloat16)
    one = 4 * B * S * 4096
    assert ledger.moment == "backward"
    assert ledger.parts[parts.LOGITS] == pytest.approx(one, rel=0.02)  # and the states that the head reads
    assert ledger.parts[parts.WORKSPACE] == pytest.approx(2 * one, rel=0.001)


def test_a_layout_saves_no_memory():
    """The same tensors are kept for the backward pass; what a layout itself takes is small and shared by layers."""
    config = BlockSparseConfig("local", window=16, block_size=32)
    kept = {}
    for implementation in ("bsa_dense", "bsa_sparse"):
        model = bart(implementation, layers=2)
        set_block_sparse(model, config)
        ledger = measure_step(model, bart_batch(padding=True))
        kept[implementation] = saved(ledger), ledger.tracked
    for dense, sparse in zip(kept["bsa_dense"], kept["bsa_sparse"], strict=True):
        assert sparse == pytest.approx(dense, rel=0.02)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "bsa_dense"])
@pytest.mark.parametrize("optimised", [False, True])
def test_prediction_for_double_the_batch(implementation, optimised):
    model = bart(implementation, layers=2, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters()) if optimised else None
    options = {"optimizer": optimizer, "autocast_dtype": torch.bfloat16}
    predicted = measure_step(model, bart_batch(4, padding=True), **options).scaled(2)
    measured = measure_step(model, bart_batch(8, padding=True), **options)
    assert predicted.tracked == pytest.approx(measured.tracked, rel=0.02)
    assert predicted.moment == measured.moment
    for name, size in measured.parts.items():
        assert predicted.parts[name] == pytest.approx(size, rel=0.02, abs=4096), name


def test_peak_moves_to_the_optimizer_where_the_batch_is_small():
    model = bart()
    ledger = measure_step(model, bart_batch(), optimizer=torch.optim.AdamW(model.parameters(), foreach=True))
    small = ledger.scaled(1 / 8)
    assert ledger.moment == "backward" and small.moment == "optimizer step"
    weights = small.parts[parts.WEIGHTS]
    assert small.parts[parts.GRADIENTS] == sum(4 * p.numel() for p in model.parameters())
    assert small.tracked > 4 * weights * 0.99
    assert ledger.scaled(1).parts == ledger.parts


def test_freed_tensors_do_not_count():
    class Loop(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                for _ in range(20):
                    x = x * 1.5
            return super().forward(x).sum()

    ledger = measure_step(Loop(8, 1), torch.ones(1000, 8), compute_loss=lambda model, batch: model(batch))
    one = 4 * 1000 * 8
    assert ledger.tracked < 5 * one


def test_checkpointing_keeps_less():
    model = bart(layers=4)
    batch = bart_batch()
    everything = measure_step(model, batch)
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    checkpointed = measure_step(model, batch)
    assert saved(checkpointed) < 0.5 * saved(everything)
    assert checkpointed.tracked < everything.tracked


def test_nothing_is_left_behind_by_an_error():
    model, batch = bart(), bart_batch()
    optimizer = torch.optim.AdamW(model.parameters())

    def broken(model, batch):
        model(**batch).loss.backward()
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        measure_step(model, batch, compute_loss=broken)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(KeyError, match="planted"):
        measure_step(model, batch, compute_loss=broken, optimizer=optimizer)
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert parameter.grad is None and not parameter._post_accumulate_grad_hooks
        assert torch.equal(parameter, old)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert measure_step(model, batch).parts == measure_step(bart(), batch).parts


def test_table_and_plot(tmp_path):
    ledger = measure_step(bart(), bart_batch())
    table = ledger.table()
    assert all(f"| {name} |" in table for name in ledger.parts)
    assert "| all parts |" in table and "100.0%" in table
    ledger.plot(tmp_path / "ledger.png", label="BART")
    assert (tmp_path / "ledger.png").read_bytes().startswith(b"\x89PNG")


def test_ledger_against_an_allocator():
    sizes = {parts.WEIGHTS: 600, parts.MLP: 300}
    ledger = Ledger(sizes, "backward", 1000, (("backward", sizes),))
    assert ledger.explained == 0.9
    assert ledger.scaled(2).peak == 600 + 600 + 100
    assert "| unexplained |" in ledger.table()


def test_bad_arguments():
    with pytest.raises(ValueError, match="0 devices"):
        measure_step(nn.ReLU(), torch.ones(1))
    with pytest.raises(ValueError, match="factor"):
        measure_step(bart(), bart_batch()).scaled(0)


class Memory:
    """A device where a step takes `fixed` bytes and `each` for every example, and raises above `total`."""

    def __init__(self, each: int, fixed: int = 0, total: float = float("inf"), error: type = torch.OutOfMemoryError):
        self.each, self.fixed, self.total, self.error = each, fixed, total, error
        self.tried: list[int] = []

    def step(self, batch: int) -> int:
        self.tried.append(batch)
        if self.bytes > self.total:
            raise self.error("CUBLAS_STATUS_ALLOC_FAILED")
        return 10 * batch

    @property
    def bytes(self) -> int:
        return self.fixed + self.each * self.tried[-1]

    def measure(self, step) -> tuple[int, int]:
        return step(), self.bytes


@pytest.fixture
def little_garbage(monkeypatch):
    """Collecting the garbage of a process full of models, before each try, takes seconds."""
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.mark.usefixtures("little_garbage")
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
@pytest.mark.parametrize("total", [float("inf"), 20 * GIB])
@pytest.mark.parametrize("start", [1, 3, 64, 1000])
def test_largest_batch_is_exact(start, total, error):
    memory = Memory(GIB // 8, 3 * GIB, total, error)
    found = largest_batch(memory.step, 16, start=start, progress=False, measure=memory.measure)
    assert found == LargestBatch(104, 1040, 16.0)
    assert len(memory.tried) == len(set(memory.tried)) < 20


@pytest.mark.usefixtures("little_garbage")
@pytest.mark.parametrize("start", [16, 30, 60])
def test_largest_batch_takes_few_tries_where_memory_is_linear(start):
    memory = Memory(GIB // 2, 6 * GIB)
    found = largest_batch(memory.step, 40, start=start, resolution=0.02, progress=False, measure=memory.measure)
    assert found.batch == 68 and memory.tried[-2:] == [68, 69] and len(memory.tried) <= 4


@pytest.mark.usefixtures("little_garbage")
def test_largest_batch_is_exact_where_memory_is_not_linear():
    """A fixed peak until activations outgrow it, and memory that grows by pages of ten examples."""
    for bytes_of in (lambda n: max(8 * GIB, n * n * GIB // 1000), lambda n: (3 + n // 10) * GIB):
        tried = []
        found = largest_batch(
            lambda n, tried=tried: tried.append(n) or n,
            24,
            progress=False,
            measure=lambda step, f=bytes_of: (n := step(), f(n)),
        )
        assert bytes_of(found.batch) <= 24 * GIB < bytes_of(found.batch + 1) and len(tried) < 25


@pytest.mark.usefixtures("little_garbage")
def test_largest_batch_limits_and_resolution():
    memory = Memory(GIB // 8)
    assert largest_batch(memory.step, 16, limit=50, progress=False, measure=memory.measure).batch == 50
    exact = len(memory.tried)
    memory = Memory(GIB // 100)
    rough = largest_batch(memory.step, 16, resolution=0.1, progress=False, measure=memory.measure)
    assert 1600 / 1.1 <= rough.batch <= 1600 and len(memory.tried) < exact + 16
    memory = Memory(GIB, fixed=20 * GIB)
    assert largest_batch(memory.step, 16, start=8, progress=False, measure=memory.measure) == (0, 0, 0.0)
    assert memory.tried == [8, 4, 2, 1]


def test_largest_batch_clears_gradients_and_passes_other_errors_on(capsys):
    model = nn.Linear(2, 2)

    def step(batch: int) -> int:
        model(torch.ones(batch, 2)).sum().backward()
        if batch > 5:
            raise torch.OutOfMemoryError("planted")
        return batch

    found = largest_batch(step, 1, model=model, measure=lambda step: (step(), 0))
    assert found.batch == 5 and model.weight.grad is None
    assert "best 5" in capsys.readouterr().out

    with pytest.raises(RuntimeError, match="another"):
        largest_batch(
            lambda batch: (_ for _ in ()).throw(RuntimeError("another")), 1, measure=lambda step: (step(), 0)
        )


@pytest.mark.parametrize(
    "options, message",
    [({"start": 0}, "start"), ({"start": 9, "limit": 8}, "start"), ({"budget_gib": 0}, "budget_gib")],
)
def test_largest_batch_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        largest_batch(lambda batch: batch, **{"budget_gib": 1, "measure": lambda step: (step(), 0), **options})


def test_largest_batch_needs_a_judge():
    with pytest.raises(ValueError, match="measure"):
        largest_batch(lambda batch: batch, 1, device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_ledger_explains_the_peak_and_the_budget_holds():
    model = bart("bsa_dense", layers=4, dropout=0.1).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    batch = {name: value.cuda() for name, value in bart_batch(256, padding=True).items()}
    ledger = measure_step(model, batch, optimizer=optimizer, autocast_dtype=torch.bfloat16)
    assert 0.9 < ledger.explained <= 1.0

    def step(rows: int) -> int:
        inputs = {name: value.cuda() for name, value in bart_batch(rows).items()}
        model(**inputs).loss.backward()
        return rows * (S + T)

    before = torch.cuda.get_per_process_memory_fraction()
    found = largest_batch(step, 2, start=64, resolution=0.1, model=model, progress=False)
    assert found.batch > 64 and 1.0 < found.peak_gib <= 2.0 and found.tokens == found.batch * (S + T)
    assert torch.cuda.get_per_process_memory_fraction() == before
