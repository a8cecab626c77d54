"""Lowering: what equal calls share, what changes a plan, and what a plan holds of a mask."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_flashbsa import AttentionSpec, BlockLayout, attention
from hf_flashbsa.kernels.call_plan import NO_TENSORS
from hf_flashbsa.ops import lowering, validation
from hf_flashbsa.ops.lowering import MAX_REMEMBERED, CallOptions, lower

PLAIN = CallOptions(None, None, 0.0, True, "torch", has_bias=False, needs_grad=True)
TRITON = PLAIN._replace(backend="triton")


def tensors(length: int = 6, heads: int = 2) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, length, 4, generator=g) for _ in range(3)]


@pytest.fixture
def checked(monkeypatch):
    """How often a mask was checked against tensors, which whoever makes a plan does."""
    calls, check_spec = [], validation.check_spec
    monkeypatch.setattr(validation, "check_spec", lambda *args: calls.append(args) or check_spec(*args))
    return calls


def test_layers_of_a_forward_share_one_plan(checked):
    spec = AttentionSpec(causal=True, seqlens_k=torch.tensor([3, 6]))
    first, second = lower(spec, *tensors(), PLAIN), lower(spec, *tensors(), PLAIN)
    assert first is second and len(checked) == 1


def test_layers_of_two_kinds_do_not_drive_each_other_out(checked):
    """Some with a bias, some with other heads: each kind is lowered once, schedules are shared where they may be."""
    spec = AttentionSpec(segment_ids_k=torch.zeros(2, 6, dtype=torch.int64))
    kinds = [(2, TRITON), (4, TRITON), (2, TRITON._replace(softcap=3.0)), (2, TRITON._replace(has_bias=True))]
    plans = [[lower(spec, *tensors(heads=heads), options) for heads, options in kinds] for _ in range(3)]
    assert len(checked) == len(kinds)
    assert all(a is b for again in plans[1:] for a, b in zip(plans[0], again, strict=True))
    first, heads, softcap, bias = plans[0]
    assert first.tensors.schedule_q is heads.tensors.schedule_q is softcap.tensors.schedule_q
    assert first.tensors.schedule_q is not bias.tensors.schedule_q


@pytest.mark.parametrize("name", ["seqlens_k", "segment_ids_k", "query_offset", "mask"])
def test_a_mask_that_is_changed_in_place_is_lowered_anew(name):
    """Whatever the layers before it were told."""
    value, other = {
        "seqlens_k": (torch.tensor([6, 6]), torch.tensor([1, 2])),
        "segment_ids_k": (torch.zeros(2, 6, dtype=torch.int64), torch.tensor([[-1] * 4 + [0] * 2] * 2)),
        "query_offset": (torch.tensor([0]), torch.tensor([-2])),
        "mask": (torch.ones(2, 1, 6, 6, dtype=torch.bool), torch.eye(6).expand(2, 1, 6, 6) > 0),
    }[name]
    spec = AttentionSpec(causal=name == "query_offset", **{name: value})
    q, k, v = tensors()
    before = attention(q, k, v, spec)
    value.copy_(other)
    want = attention(q, k, v, AttentionSpec(causal=name == "query_offset", **{name: other}))
    assert torch.equal(attention(q, k, v, spec), want) and not torch.equal(before, want)


def test_what_inference_mode_made_is_not_used_by_the_backward_pass():
    """Tensors made there cannot be saved for it."""
    layout = BlockLayout(torch.ones(1, 1, 1, 1, dtype=torch.int32), 32)
    spec = AttentionSpec(seqlens_k=torch.tensor([3, 6]), layout=layout)
    q, k, v = (x.requires_grad_() for x in tensors())
    with torch.inference_mode():
        attention(q, k, v, spec)
    attention(q, k, v, spec).sum().backward()
    assert q.grad.abs().sum() > 0


def test_no_more_sizes_than_a_bound_are_remembered():
    spec = AttentionSpec(seqlens_k=torch.tensor([1, 1]))
    for length in range(1, MAX_REMEMBERED + 5):
        lower(spec, *tensors(length), PLAIN)
    assert {kind: len(entries) for kind, entries in lowering._MEMOS[id(spec)].entries.items()} == {
        "plan": MAX_REMEMBERED,
        "sequences": MAX_REMEMBERED,
    }


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_plans_go_with_their_mask(compiled):
    """Nothing that was derived keeps a mask or its tables alive."""
    function = torch.compile(attention, backend="aot_eager") if compiled else attention
    spec = AttentionSpec(seqlens_k=torch.tensor([3, 6]))
    q, k, v = tensors()
    function(q, k, v, spec)
    gone = weakref.ref(spec)
    del spec
    gc.collect()
    assert gone() is None or compiled  # Dynamo's guards hold weak references, its frames may hold one more
    if not compiled:
        table = weakref.ref(lower(AttentionSpec(seqlens_k=torch.tensor([3, 6])), q, k, v, PLAIN).tensors.sequences)
        gc.collect()
        assert table() is None


def test_a_spec_is_data_only():
    spec = AttentionSpec(causal=True, seqlens_k=torch.tensor([3, 6]))
    before = dict(vars(spec))
    attention(*tensors(), spec)
    assert vars(spec) == before


def test_layers_in_a_compiled_graph_share_a_table():
    graphs = []

    def count(graph, _):
        graphs.append(sum("stack" in str(node.target) for node in graph.graph.nodes))
        return graph

    def model(q, k, v, lengths):
        spec = AttentionSpec(seqlens_k=lengths)
        for _ in range(3):
            q = attention(q, k, v, spec)
        return q

    q, k, v = tensors()
    lengths = torch.tensor([3, 6])
    got = torch.compile(model, fullgraph=True, backend=count)(q, k, v, lengths)
    assert torch.equal(got, model(q, k, v, lengths)) and graphs == [1]


def test_absent_stays_absent():
    """None all the way to the back ends; most calls carry no tensors at all."""
    plan = lower(AttentionSpec(), *tensors(), PLAIN)
    assert plan.tensors is NO_TENSORS
    names = ("softcap", "window_left", "window_right", "drop_threshold", "block_size")
    assert {getattr(plan.scalars, name) for name in names} == {None}
    plan = lower(AttentionSpec(causal=True, window_size=(0, None)), *tensors(), PLAIN._replace(softmax_scale=0.0))
    assert (plan.scalars.window_left, plan.scalars.window_right, plan.scalars.softmax_scale) == (0, 0, 0.0)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_scale_of_zero_weighs_all_visible_keys_alike(backend):
    q, k, v = tensors()
    out = attention(q, k, v, causal=True, softmax_scale=0.0, backend=backend)
    count = torch.arange(1, 7)[:, None]
    torch.testing.assert_close(out, v.cumsum(2) / count)


def test_a_layout_without_partial_blocks_has_no_masks():
    layout = BlockLayout(torch.ones(1, 1, 1, 1, dtype=torch.int32), 32)
    first, second = (lower(AttentionSpec(layout=layout), *tensors(), TRITON).tensors for _ in range(2))
    assert first.block_masks is None
    assert first.block_table_q is second.block_table_q is not None, "derived once for a layout"
    forward_only = lower(AttentionSpec(layout=layout), *tensors(), TRITON._replace(needs_grad=False))
    assert forward_only.tensors.block_table_k is None


def test_the_torch_back_end_gets_no_tables_that_it_does_not_read():
    """Nor a schedule of few scores, which costs more than they do."""
    layout = BlockLayout(torch.ones(1, 1, 1, 1, dtype=torch.int32), 32)
    plan = lower(AttentionSpec(layout=layout), *tensors(), PLAIN)
    assert plan.tensors.block_table_q is plan.tensors.block_table_k is plan.tensors.schedule_k is None
    ids = AttentionSpec(segment_ids_k=torch.zeros(2, 6, dtype=torch.int32))
    assert lower(ids, *tensors(), PLAIN).tensors.schedule_q is None
    assert lower(ids, *tensors(), TRITON).tensors.schedule_q is not None


def test_few_queries_get_no_schedule():
    """Kernels read what it would say from the mask; one of many queries, or with a gradient, sorts tiles."""
    forward_only = TRITON._replace(needs_grad=False)
    offset = torch.tensor([3])
    spec = AttentionSpec(causal=True, query_offset=offset, segment_ids_k=torch.zeros(2, 6, dtype=torch.int32))
    plan = lower(spec, *tensors(), forward_only).tensors
    assert plan.schedule_q is None and plan.query_offset_tensor is offset and plan.segment_ids_k is not None
    assert lower(spec, *tensors(), TRITON).tensors.schedule_q is not None
    assert lower(spec, *tensors(), TRITON).tensors.query_offset_tensor is None
    lengths = AttentionSpec(seqlens_k=torch.tensor([3, 6]))
    assert lower(lengths, *tensors(), forward_only).tensors.schedule_q is not None
    many = lowering.FEW_QUERIES + 1
    ids = AttentionSpec(segment_ids_k=torch.zeros(2, many, dtype=torch.int32))
    assert lower(ids, *tensors(many), forward_only).tensors.schedule_q is not None


def test_keys_are_split_where_programs_are_few():
    """By shapes alone. One H200 has 132 multiprocessors, which the interpreter stands for."""
    forward_only = TRITON._replace(needs_grad=False)

    def splits(options: CallOptions = forward_only, batch: int = 1, keys: int = 32768, spec=None) -> int:
        q, k = (torch.empty(batch, heads, 1, 8).expand(-1, -1, n, -1) for heads, n in ((8, 1), (2, keys)))
        return lower(spec or AttentionSpec(causal=True), q, k, k, options).scalars.num_splits

    assert splits() == lowering.MAX_SPLITS
    assert splits(batch=16) == 9 and splits(batch=131) == 2 and splits(batch=132) == 1
    assert splits(keys=2048) == 8 and splits(keys=300) == splits(keys=0) == 1
    assert splits(spec=AttentionSpec(causal=True, window_size=(99, None))) == 1
    assert splits(TRITON) == splits(PLAIN) == splits(forward_only._replace(dropout_p=0.1)) == 1
    assert splits(spec=AttentionSpec(seqlens_k=torch.tensor([5]))) == 1


def test_what_a_fake_mode_made_stays_there():
    layout = BlockLayout(torch.ones(1, 1, 1, 1, dtype=torch.int32), 32)
    for side in "qk":
        layout.lists(side)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        attention(*(mode.from_tensor(x) for x in tensors()), layout=layout)
    q, k, v = tensors()
    assert torch.equal(attention(q, k, v, layout=layout), attention(q, k, v))
