"""Padding-free training in CUDA graphs: the same loss and gradients as without. On the CPU, recorded operations stand
in for graphs."""

from __future__ import annotations

import copy
import gc
import pickle

import packed_models
import pytest
import torch
from packed_models import labelled, losses
from recorded_ops import OpCapturer
from transformers_models import tiny

from hf_flashbsa import cuda_graph_counts, disable_padding_free, enable_padding_free, padding_free
from hf_flashbsa.integration.padding_free import graphs
from hf_flashbsa.integration.padding_free.graphs import capacity_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: Their layers return tuples.
T5 = ("t5", "mt5")


@pytest.fixture(autouse=True)
def graphs_of_operations(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(graphs, "GraphCapturer", OpCapturer)


def model_of(name: str, dropout: float = 0.0, cuda_graphs: bool = True, **changes) -> torch.nn.Module:
    torch.manual_seed(1)
    model = tiny(name, "bsa_dense", **changes).to(DEVICE).train()
    for module in model.modules():
        for attribute in ("p", "dropout", "attention_dropout", "activation_dropout"):
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, dropout)
    enable_padding_free(model, cuda_graphs=cuda_graphs)
    return model


def batch(name: str, **sizes) -> dict:
    return {key: x.to(DEVICE) for key, x in labelled(name, "right", **sizes).items()}


def shorter(inputs: dict, tokens: int) -> dict:
    """Fewer live tokens at the end of the first row."""
    inputs = dict(inputs)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][0, -tokens:] = 0
    return inputs


def replayed(model: torch.nn.Module) -> list[int]:
    return [counts.get("replayed", 0) for counts in cuda_graph_counts(model).values()]


def reasons(model: torch.nn.Module) -> set[str]:
    return {name for counts in cuda_graph_counts(model).values() for name in counts} - {"replayed", "captured"}


def assert_same(mine: tuple, theirs: tuple) -> None:
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-6)
    assert mine[1].keys() == theirs[1].keys()
    for name, gradient in mine[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", [name for name in packed_models.KNOWN if name not in T5])
def test_loss_and_gradients_are_those_without_graphs(name):
    with_graphs, without = model_of(name), model_of(name, cuda_graphs=False)
    inputs = batch(name)
    for _ in range(4):
        assert_same(losses(with_graphs, inputs), losses(without, inputs))
    assert set(replayed(with_graphs)) == {3} and not reasons(with_graphs)


@pytest.mark.parametrize("name", T5)
def test_layers_that_return_tuples_run_without_graphs(name):
    with_graphs, without = model_of(name), model_of(name, cuda_graphs=False)
    inputs = batch(name)
    for _ in range(3):
        assert_same(losses(with_graphs, inputs), losses(without, inputs))
    assert set(replayed(with_graphs)) == {0} and reasons(with_graphs) == {"layers return tuple"}


@pytest.mark.parametrize("name", ["bart", "llama", "modernbert"])
def test_batches_of_one_capacity_share_graphs(name):
    """Shorter batches leave nothing of longer ones behind, in no order."""
    with_graphs, without = model_of(name), model_of(name, cuda_graphs=False)
    full = batch(name)
    for inputs in (full, full, shorter(full, 3), full, shorter(full, 1), shorter(full, 2)):
        assert_same(losses(with_graphs, inputs), losses(without, inputs))
    assert all(counts == {"captured": 1, "replayed": 5} for counts in cuda_graph_counts(with_graphs).values())


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_batches_without_padding_are_packed_too(name):
    with_graphs, without = model_of(name), model_of(name, cuda_graphs=False)
    inputs = batch(name)
    for mask in [key for key in inputs if key.endswith("attention_mask")]:
        del inputs[mask]
    for _ in range(3):
        assert_same(losses(with_graphs, inputs), losses(without, inputs))
    assert set(replayed(with_graphs)) == {2}


def test_gradients_are_accumulated():
    with_graphs, without = model_of("bart"), model_of("bart", cuda_graphs=False)
    inputs = batch("bart")
    for model in (with_graphs, without):
        losses(model, inputs)
        losses(model, inputs)  # replays begin
        for micro in (inputs, shorter(inputs, 2), inputs):
            model(**micro).loss.backward()
    for (name, p), q in zip(with_graphs.named_parameters(), without.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert replayed(with_graphs) == [4, 4]


def test_training_follows_the_same_curve():
    """Optimizers change weights in place, and replays see them."""
    curves = []
    for cuda_graphs in (True, False):
        model = model_of("bart", cuda_graphs=cuda_graphs)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        inputs, curve = batch("bart"), []
        for step in range(12):
            loss = model(**shorter(inputs, 1 + step % 3)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(curve)
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-4, atol=1e-4)
    assert curves[0][-1] < curves[0][0] - 0.5


def test_dropout_differs_from_step_to_step():
    model = model_of("bart", dropout=0.5)
    inputs = batch("bart")
    values = [losses(model, inputs)[0].item() for _ in range(6)]
    assert replayed(model) == [5, 5] and len(set(values)) == 6


def test_capturing_takes_no_random_numbers():
    draws = []
    for cuda_graphs in (True, False):
        model = model_of("llama", cuda_graphs=cuda_graphs)
        inputs = batch("llama")
        torch.manual_seed(5)
        for _ in range(3):
            losses(model, inputs)
        draws.append(torch.rand(4, device=DEVICE))
    torch.testing.assert_close(*draws, rtol=0, atol=0)


def test_evaluation_runs_without_graphs():
    model = model_of("llama")
    inputs = batch("llama")
    for _ in range(2):
        losses(model, inputs)
    model.eval()
    model(**inputs, use_cache=False)
    with torch.no_grad():
        model.train()(**inputs)
    assert replayed(model) == [1] and not reasons(model)


def test_one_forward_pass_waits_for_its_backward_pass():
    """A second pass meanwhile runs without graphs; both get their gradients."""
    with_graphs, without = model_of("llama"), model_of("llama", cuda_graphs=False)
    inputs = batch("llama")
    for model in (with_graphs, without):
        losses(model, inputs)
        losses(model, inputs)
    results = []
    for model in (with_graphs, without):
        model.zero_grad()
        (model(**inputs).loss + 2 * model(**shorter(inputs, 2)).loss).backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    assert_same((torch.zeros(()), results[0]), (torch.zeros(()), results[1]))
    assert reasons(with_graphs) == {"an earlier pass still waits for its backward pass"}


def test_a_second_backward_pass_is_refused():
    model = model_of("llama")
    inputs = batch("llama")
    losses(model, inputs)
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"CUDA graphs keep the activations .* cuda_graphs=False"):
        loss.backward()


def test_changed_weights_and_modes_are_captured_anew():
    with_graphs, without = model_of("llama"), model_of("llama", cuda_graphs=False)
    inputs = batch("llama")
    for change in (
        lambda model: None,
        lambda model: setattr(model.model.layers[0].mlp.up_proj.weight, "requires_grad", False),
        lambda model: setattr(model.model.layers[1].mlp.up_proj.weight, "data", torch.ones_like(
            model.model.layers[1].mlp.up_proj.weight) / 50),
    ):  # fmt: skip
        change(with_graphs)
        change(without)
        for _ in range(3):
            assert_same(losses(with_graphs, inputs), losses(without, inputs))
    assert cuda_graph_counts(with_graphs)["model"] == {"captured": 3, "replayed": 6}


def test_hooks_within_layers_run():
    model, seen = model_of("llama"), []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        losses(model, batch("llama"))
    assert len(seen) == 3 and replayed(model) == [0] and reasons(model) == {"LlamaMLP has hooks"}


def test_gradient_checkpointing_runs_without_graphs():
    model = model_of("llama")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(3):
        losses(model, batch("llama"))
    assert replayed(model) == [0] and reasons(model) == {"gradient checkpointing"}


def test_hidden_states_of_all_layers_are_those_without_graphs():
    with_graphs, without = model_of("llama"), model_of("llama", cuda_graphs=False)
    inputs = batch("llama")
    for _ in range(2):
        losses(with_graphs, inputs)
    states = [model(**inputs, output_hidden_states=True).hidden_states for model in (with_graphs, without)]
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_switching_off_and_copies():
    model = model_of("llama")
    inputs = batch("llama")
    for _ in range(2):
        expected = losses(model, inputs)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (copied, pickled):
        for _ in range(2):
            assert_same(losses(other, inputs), expected)
        assert replayed(other) == [2]  # one of its own: counts are copied
    disable_padding_free(model)
    assert_same(losses(model, inputs), expected)
    assert cuda_graph_counts(model) == {} and "forward" not in vars(model.model.layers[0])
    with padding_free(model, cuda_graphs=True):
        assert list(cuda_graph_counts(model)) == ["model"]
    assert cuda_graph_counts(model) == {}


def test_frozen_embeddings_and_few_trained_parameters():
    """As with adapters: the first layer's input has no gradient."""
    with_graphs, without = model_of("llama"), model_of("llama", cuda_graphs=False)
    for model in (with_graphs, without):
        model.requires_grad_(False)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.requires_grad_(True)
    inputs = batch("llama")
    for _ in range(3):
        assert_same(losses(with_graphs, inputs), losses(without, inputs))
    assert replayed(with_graphs) == [2]


@pytest.mark.skipif(DEVICE == "cuda", reason="is about devices without CUDA graphs")
def test_other_devices_say_why(monkeypatch):
    monkeypatch.undo()
    model = model_of("llama")
    for _ in range(2):
        losses(model, batch("llama"))
    assert reasons(model) == {"CUDA graphs need a CUDA device, not 'cpu'"}


def test_capacities_waste_an_eighth_at_most():
    for tokens in (1, 15, 16, 17, 127, 128, 129, 1000, 13_742, 65_537):
        capacity = capacity_of(tokens)
        assert tokens <= capacity <= max(tokens * 9 / 8 + 1, tokens + 15) and capacity % 16 == 0
    assert len({capacity_of(n) for n in range(8192, 16384)}) == 9


def test_passes_are_freed():
    """What autograd holds of a pass holds nothing of autograd's."""
    model = model_of("bart")
    inputs = batch("bart")
    losses(model, inputs)
    gc.disable()
    try:
        for _ in range(3):
            losses(model, inputs)
        passes = [model.model.encoder._padding_free_graphs.latest(), model.model.decoder._padding_free_graphs.latest()]
        assert replayed(model) == [3, 3] and passes == [None, None]
    finally:
        gc.enable()


def test_data_parallel_gradients_are_reduced(tmp_path):
    """`DistributedDataParallel` gets the gradients of replayed layers as those of any others."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped, without = model_of("bart"), model_of("bart", cuda_graphs=False)
        parallel = torch.nn.parallel.DistributedDataParallel(wrapped)
        reduced = []

        def hook(state, bucket):
            reduced.append(bucket.buffer().numel())
            future = torch.futures.Future()
            future.set_result(2 * bucket.buffer())
            return future

        parallel.register_comm_hook(None, hook)
        inputs = batch("bart")
        for _ in range(3):
            parallel(**inputs).loss.backward()
            for (name, p), (_, gradient) in zip(
                wrapped.named_parameters(), sorted_gradients(without, inputs), strict=True
            ):
                torch.testing.assert_close(
                    p.grad, 2 * gradient, rtol=1e-4, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}"
                )
            wrapped.zero_grad()
        assert replayed(wrapped) == [2, 2] and sum(reduced) == 3 * sum(p.numel() for p in wrapped.parameters())
    finally:
        torch.distributed.destroy_process_group()


def sorted_gradients(model: torch.nn.Module, inputs: dict) -> list[tuple[str, torch.Tensor]]:
    gradients = losses(model, inputs)[1]
    return [(name, gradients[name]) for name, _ in model.named_parameters()]
