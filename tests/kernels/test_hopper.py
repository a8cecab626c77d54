"""The Hopper kernels: which calls they take, and what the compiler makes of them, without a GPU."""

from __future__ import annotations

import logging
from unittest import mock

import compile_hopper
import kernel_record
import pytest
import torch
from aot import SHARED_LIMIT, VERDICT, run_compiling
from compile_hopper import KERNELS, kernels_of, kinds_for
from sass import lost_operands, overwritten_operands

from hf_flashbsa import BlockLayout
from hf_flashbsa.kernels import tuning
from hf_flashbsa.kernels.block_tables import block_table
from hf_flashbsa.kernels.call_plan import NO_TENSORS, CallPlan, CallScalars
from hf_flashbsa.kernels.gluon_sm90 import dispatch

#: Bytes that a kernel may spill: addresses and bounds, one of each thread, none of the tensors.
SPILLS = 128
UNLISTED = "a shape or options that configs/gluon_sm90.json does not list"
#: Those that leave some of the kernels to the portable ones: configs/gluon_sm90.json.
PORTABLE = {("packed", 64, "dq"), ("dropout", 64, "dq"), ("short", 64, "dq")}
PORTABLE |= {("layout-packed", head_dim, "forward") for head_dim in (64, 128)}


def faults_of(row: dict) -> list[str]:
    """What is wrong with a compiled Hopper kernel."""
    faults = {
        "shared memory": row["shared"] > SHARED_LIMIT[90],
        "spills": row["spills"] > SPILLS,
        "no wgmma": not row["wgmma"] > row["mma"] == 0,
        "serialized": row["serialized"],
        "operands overwritten": row["overwritten"] > 0,
        "operands lost": row["lost"] > 0,
    }
    return [name for name, present in faults.items() if present]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_calls_reach_the_kernels_which_compile_well(head_dim):
    """One test, because compiling takes minutes where `kernel_record` lacks the kernels."""
    rows = run_compiling(compile_hopper.__file__, str(head_dim))
    reached = {(row["kind"], row["name"].removesuffix("_kernel")): row["module"] for row in rows}
    assert set(reached) == {(kind, name) for kind in kinds_for(head_dim) for name in kernels_of(kind)}
    options = [option for row in rows for option in row["reached"]]
    for kernel in KERNELS if head_dim != 64 else (*KERNELS, "fused_backward"):
        listed = [entry["options"] for entry in dispatch._entries(kernel) if entry["head_dim"] == head_dim]
        assert listed and all([kernel, entry] in options for entry in listed), kernel
    portable = {(kind, name) for kind, dim, name in PORTABLE if dim == head_dim}
    portable |= {call for call in reached if call[1].endswith("process")}
    assert {call for call, module in reached.items() if ".gluon_sm90." not in module} == portable
    judged = [(row, faults_of(row)) for row in rows if ".gluon_sm90." in row["module"]]
    wrong = [f"{', '.join(faults)}: {row}" for row, faults in judged if faults]
    assert not wrong, "\n".join(wrong)


def test_recorded_verdicts_are_judged_and_missing_ones_are_made():
    """The limits hold for what the record says, and ptxas says of a kernel that it lacks what it said before."""
    record = kernel_record.load()
    known = {key: row | {"spills": 4096} for key, row in record.items() if row["kernel"] == "forward_kernel"}
    with pytest.warns(UserWarning, match="1 kernels were compiled anew"):
        rows = run_compiling(compile_hopper.__file__, "64", "short", known=known)
    forward, dkdv = (row for row in rows if ".gluon_sm90." in row["module"])
    if forward["key"] not in record:
        pytest.skip("the record is of another release of Triton")
    assert faults_of(forward) == ["spills"] and faults_of(dkdv) == []
    assert {name: dkdv[name] for name in VERDICT} == {name: record[dkdv["key"]][name] for name in VERDICT}


SASS = """
        /*0000*/  HGMMA.64x64x16.F32.BF16 R24, R40, gdesc[UR8].tnspB, R24 ;
        /*0010*/  HGMMA.64x64x16.F32.BF16 R24, R44, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0020*/  {} ;
        /*0030*/  FFMA R42, R1, R2, R3 ;
        /*0040*/  @P0 BRA 0x0 ;
        /*0050*/  EXIT ;
"""


@pytest.mark.parametrize(
    ("between", "faults"),
    [
        ("NOP", 1),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x0", 0),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", 1),
        ("HGMMA.64x64x16.F32.BF16 R64, gdesc[UR8], R64, gsb0", 1),
    ],
)
def test_overwritten_operands_are_found(between, faults):
    """Of two products the first one's operand is R40 to R43, and a later wait for one group is none for the newest."""
    assert len(overwritten_operands(SASS.format(between))) == faults


def test_a_wait_for_all_but_the_newest_group_covers_older_ones():
    newer = "HGMMA.64x64x16.F32.BF16 R64, gdesc[UR8], R64, gsb0 ;\n        /*0028*/  WARPGROUP.DEPBAR.LE gsb0, 0x1"
    assert overwritten_operands(SASS.format(newer)) == []


LOADED_AHEAD = """
        /*0000*/  LDSM.16.M88.4 R40, [R2] ;
        /*0010*/  HGMMA.64x64x16.F32.BF16 R24, R40, gdesc[UR8], RZ, gsb0 ;
        /*0020*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/  {} ;
        /*0040*/  @P0 BRA {} ;
        /*0050*/  EXIT ;
"""


@pytest.mark.parametrize(
    ("instruction", "begin", "faults"),
    [("FFMA R42, R1, R2, R3", "0x10", 1), ("FFMA R44, R1, R2, R3", "0x10", 0), ("FFMA R42, R1, R2, R3", "0x0", 0)],
)
def test_operands_that_a_loop_loses_are_found(instruction, begin, faults):
    """The operand is R40 to R43; a loop that begins with the load makes it anew in each round."""
    assert len(lost_operands(LOADED_AHEAD.format(instruction, begin))) == faults


AROUND = """
        /*0000*/  LDSM.16.M88.4 R40, [R2] ;
        /*0010*/  HGMMA.64x64x16.F32.BF16 R24, R40, gdesc[UR8], RZ, gsb0 ;
        /*0020*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0030*/  FFMA R42, R1, R2, R3 ;
        /*0040*/  @P0 BRA {} ;
        /*0050*/  EXIT ;
        /*0060*/  SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3], R4 ;
        /*0070*/  BRA 0x10 ;
"""


def test_operands_that_an_outer_loop_loads_anew_are_not_lost():
    assert lost_operands(AROUND.format("0x0")) == []
    assert len(lost_operands(AROUND.format("0x10"))) == 1


def test_a_wait_repeated_behind_the_code_makes_no_loop():
    """A jump to 0x60 returns to the product, which no path from there repeats without the load."""
    waiting = AROUND.format("0x0").replace("/*0000*/  LDSM", "/*0000*/  @P1 BRA 0x60 ;\n        /*0008*/  LDSM")
    assert lost_operands(waiting) == []


@pytest.mark.parametrize("ragged", [True, False])
def test_only_tile_schedules_have_tile_counters(monkeypatch, ragged):
    """Each kernel has a counter of its own, at 0, that begins at a multiple of 16 bytes."""
    monkeypatch.setattr(tuning, "is_hopper", lambda device: True)
    schedule = torch.zeros(3, 12, dtype=torch.int32) if ragged else None
    counters = tuple(dispatch.new_tile_counters(schedule, 2, torch.device("cpu")))
    if not ragged:
        assert counters == (None, None)
        return
    assert [int(x[0]) for x in counters] == [0, 0]
    assert counters[1].data_ptr() - counters[0].data_ptr() == 16


def _arguments(head_dim=128, length=2048, dtype=torch.bfloat16, dim_v=None, tensors=None, **scalars):
    q = torch.zeros(1, length, 2, head_dim, dtype=dtype).transpose(1, 2)
    v = torch.zeros(1, length, 2, dim_v or head_dim, dtype=dtype).transpose(1, 2)
    usual = {"softmax_scale": 1.0, "query_offset": 0, "deterministic": True, "backend": "triton"}
    usual = dict.fromkeys(CallScalars._fields) | usual
    return q, q.clone(), v, (), CallPlan(NO_TENSORS._replace(**tensors or {}), CallScalars(**usual | scalars))


@pytest.fixture
def on_hopper():
    with mock.patch.object(tuning, "is_hopper", lambda device: True):
        yield


@pytest.mark.parametrize("kernel", KERNELS)
def test_takes(on_hopper, kernel):
    assert dispatch.why_unsupported(kernel, *_arguments()) is None


def test_packed_documents_are_taken_where_they_were_faster(on_hopper):
    """At head dim 64: the forward with as many queries as keys, roughly, and without both causality and dropout; dq
    where segments tell what is padding."""
    q, k, v, others, plan = _arguments(64, tensors={"schedule_q": torch.zeros(1), "schedule_k": torch.zeros(1)})
    causal = plan._replace(scalars=plan.scalars._replace(window_right=0))
    for kernel, taken in (("forward", True), ("dkdv", True), ("dq", False)):
        for some in (plan, causal):
            assert dispatch.why_unsupported(kernel, q, k, v, others, some) == (None if taken else UNLISTED)
    for kernel, taken in (("forward", False), ("dkdv", True)):
        assert dispatch.why_unsupported(kernel, q[:, :, :1000], k, v, others, plan) == (None if taken else UNLISTED)
        dropout = causal._replace(scalars=causal.scalars._replace(drop_threshold=1))
        assert dispatch.why_unsupported(kernel, q, k, v, others, dropout) == (None if taken else UNLISTED)
    padded = plan._replace(tensors=plan.tensors._replace(segment_ids_k=torch.zeros(1)))
    assert dispatch.why_unsupported("dq", q, k, v, others, padded) is None


@pytest.mark.parametrize(("kernel", "min_window"), [("forward", 512), ("dq", 2048), ("dkdv", 0)])
def test_narrow_windows_are_left_where_that_was_faster(on_hopper, kernel, min_window):
    """At head dim 64."""
    for window_left in (0, 511, 512, 2047, 2048, None):
        wide = window_left is None or window_left >= min_window
        reason = dispatch.why_unsupported(kernel, *_arguments(64, window_left=window_left, window_right=0))
        assert reason == (None if wide else UNLISTED)
    assert dispatch.why_unsupported(kernel, *_arguments(64, window_left=min_window // 2)) is None


@pytest.mark.parametrize(
    ("tiles", "window", "stay"),
    [
        (64, (None, None), True),
        (65, (None, 0), False),
        (65, (1024, 1024), True),
        (65, (2049, 0), False),
        (65, (9, None), False),
    ],
)
def test_programs_stay_where_tiles_meet_little(tiles, window, stay):
    from hf_flashbsa.kernels.gluon_sm90 import launch

    plan = _arguments(window_left=window[0], window_right=window[1])[-1]
    assert launch._grid_size(1000, tiles, None, plan, torch.device("cpu")) == (132 if stay else 1000)
    assert launch._grid_size(1000, tiles, torch.zeros(1), plan, torch.device("cpu")) == 132


@pytest.mark.parametrize(("length", "causal", "taken"), [(4096, 0, True), (2048, 0, False), (16384, None, False)])
def test_the_fused_backward_is_for_long_causal_sequences(on_hopper, length, causal, taken):
    reason = dispatch.why_unsupported("fused_backward", *_arguments(64, length, window_right=causal))
    assert reason == (None if taken else UNLISTED)


def _layout_arguments(heads: int, heads_k: int, layout_heads: int, head_dim: int = 128):
    """What a call with a layout carries."""
    layout = BlockLayout(torch.ones(1, layout_heads, 16, 16, dtype=torch.int32), 128)
    tables = {f"block_table_{side}": block_table(*layout.lists(side)) for side in "qk"}
    q, _, _, *rest = _arguments(head_dim, tensors={"block_grid": layout.grid, **tables}, block_size=128)
    q, k = (q[:, :1].repeat(1, n, 1, 1) for n in (heads, heads_k))
    return q, k, k, *rest


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", ["dq", "dkdv"])
@pytest.mark.parametrize("heads", [(4, 4, 1), (4, 4, 4), (4, 2, 1)])
def test_takes_block_layouts(on_hopper, kernel, heads, head_dim):
    assert dispatch.why_unsupported(kernel, *_layout_arguments(*heads, head_dim)) is None


def test_leaves_heads_that_share_keys_but_no_list(on_hopper):
    """Hopper's `dkdv` walks over the same blocks for each head that shares keys; the others have one head each."""
    reasons = {kernel: dispatch.why_unsupported(kernel, *_layout_arguments(4, 2, 4)) for kernel in KERNELS}
    shared = "block layouts of their own for query heads that share keys"
    assert reasons == {"forward": None, "dq": None, "dkdv": shared}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("dtype torch.float32", {"dtype": torch.float32}),
        ("head dims 128 and 64", {"dim_v": 64}),
        (UNLISTED, {"head_dim": 96}),
        (UNLISTED, {"length": 16}),
        ("bias", {"tensors": {"bias": torch.zeros(1, 1, 2048, 2048)}}),
        ("alibi_slopes", {"tensors": {"alibi_slopes": torch.zeros(1, 2)}}),
        ("softcap", {"softcap": 30.0}),
        ("block layouts, blocks of 64", {"tensors": {"block_grid": torch.zeros(1)}, "block_size": 64}),
        ("no tokens", {"length": 0}),
    ],
)
def test_leaves_to_the_portable_kernels(on_hopper, kernel, reason, changes):
    assert dispatch.why_unsupported(kernel, *_arguments(**changes)) == reason


def test_leaves_what_tma_cannot_address(on_hopper):
    q, k, v, *rest = _arguments()
    odd = torch.zeros(1, 2, 2048, 129, dtype=torch.bfloat16)[..., :128]
    expanded = torch.zeros(1, 1, 2048, 128, dtype=torch.bfloat16).expand(1, 2, 2048, 128)
    for other in (odd, expanded):
        assert "16 bytes" in dispatch.why_unsupported("forward", q, other, v, *rest)


def test_leaves_a_kernel_whose_configuration_is_set(on_hopper):
    config = tuning.select("dq", "sm_90", 128, 2, True)
    with tuning.override("dq", config):
        for kernel in ("dq", "fused_backward"):
            assert "configuration" in dispatch.why_unsupported(kernel, *_arguments())
        assert dispatch.why_unsupported("dkdv", *_arguments()) is None


def test_other_gpus_have_portable_kernels_only():
    assert dispatch.why_unsupported("forward", *_arguments()) == "not a Hopper GPU"


def test_reasons_are_logged_once(on_hopper, caplog):
    dispatch._log_once.cache_clear()
    *tensors, plan = _arguments(softcap=5.0)
    with caplog.at_level(logging.INFO, logger="hf_flashbsa"):
        for _ in range(2):
            assert dispatch.select_launcher("forward", *tensors, None, plan) is None
    assert [record.message for record in caplog.records] == [
        "Hopper kernels: the portable forward kernel takes calls with softcap"
    ]


@pytest.fixture
def asked_anew():
    dispatch._unavailable_reason.cache_clear()
    yield
    dispatch._unavailable_reason.cache_clear()


def test_another_gluon_is_a_reason(on_hopper, asked_anew, caplog):
    """Releases of Triton change Gluon: without what the kernels need, everything runs on the portable ones."""
    reason = "this release of Triton lacks what they need (no name 'tma')"
    with mock.patch.object(dispatch.importlib, "import_module", side_effect=ImportError("no name 'tma'")):
        for _ in range(2):
            assert dispatch.why_unsupported("forward", *_arguments()) == reason
    assert [record.message for record in caplog.records] == [f"Hopper kernels: {reason}"]
