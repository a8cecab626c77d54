"""vmap rules of the ops: the mapped dimension is folded into the batch, `(N, B, ...)` to `(N * B, ...)`.

Rows of the batch are independent in all that the ops do, so that one call computes all samples. A rule runs them one
after the other where a row's result depends on which row it is, or where the kernels have no batch dimension for what
differs: dropout, sinks or tile masks that are mapped, biases, slopes and layouts
of packed rows.
"""

from __future__ import annotations

import torch

from hf_flashbsa.kernels.call_plan import ROWS_K, ROWS_Q, SHARED_ROWS, sinks_gradient
from hf_flashbsa.kernels.tables import ScheduleColumn

#: Arguments with an entry for each batch row.
_ROWS_Q = ("q", "out", "lse", "dout", "dlse", "q_t", *ROWS_Q)
_ROWS_K = ("k", "v", "k_t", "v_t", *ROWS_K)
#: Those whose batch dimension may be 1, for all rows.
_SHARED = ("bias_t", *SHARED_ROWS)


def run_mapped(op, info, in_dims: tuple, *args) -> tuple:
    """The rule of `torch.library.register_vmap` for `op`: its outputs with the mapped dimension in front, and 0s."""
    names = [argument.name for argument in op._schema.arguments]
    call, mapped = dict(zip(names, args, strict=True)), set()
    for name, dim in zip(names, in_dims, strict=True):
        if dim is not None:
            mapped.add(name)
            call[name] = call[name].movedim(dim, 0)
    run = _one_by_one if _differ_by_row(call, mapped) else _at_once
    outputs = run(op, call, mapped, info.batch_size)
    return outputs, (0,) * len(outputs)


def _rows(call: dict, mapped: set[str]) -> tuple[int, int]:
    """Batch rows of the queries and of the keys of one sample."""
    return tuple(call[name].shape[1 if name in mapped else 0] for name in "qk")


def _differ_by_row(call: dict, mapped: set[str]) -> bool:
    rows_q, rows_k = _rows(call, mapped)
    sequences = call["sequences"]
    packed = rows_q != rows_k or (sequences is not None and sequences.shape[-2] != rows_q)
    return (
        call["drop_threshold"] is not None
        or "block_masks" in mapped
        or "query_offset_tensor" in mapped
        or ("sinks" in mapped and "dout" not in call)
        or "sinks_t" in mapped
        or (packed and (call.get("need_dbias", False) or not mapped.isdisjoint(_SHARED)))
    )


def _one_by_one(op, call: dict, mapped: set[str], count: int) -> tuple[torch.Tensor, ...]:
    samples = [op(*(value[i] if name in mapped else value for name, value in call.items())) for i in range(count)]
    return tuple(map(torch.stack, zip(*samples, strict=True)))


def _at_once(op, call: dict, mapped: set[str], count: int) -> tuple[torch.Tensor, ...]:
    rows_q, rows_k = _rows(call, mapped)
    folded = dict(call)
    for name, x in call.items():
        if x is None:
            continue
        if name in _ROWS_Q or name in _ROWS_K:
            folded[name] = _fold(x, name in mapped, count, rows_q if name in _ROWS_Q else rows_k)
        elif name in _SHARED:
            own_gradient = name == "bias" and call.get("need_dbias", False)
            if name in mapped or x.shape[0] > 1 or own_gradient:
                folded[name] = _fold(x, name in mapped, count, rows_q)
        elif name in ("schedule_q", "schedule_k"):
            rows = (rows_q, rows_k) if name == "schedule_q" else (rows_k, rows_q)
            folded[name] = _fold_schedule(x if name in mapped else x.expand(count, *x.shape), *rows)
        elif name == "sequences":
            x = x if name in mapped else x.expand(count, *x.shape)
            folded[name] = _moved(x, rows_q, rows_k).flatten(0, 1)
    if "dout" not in call:
        return tuple(x.unflatten(0, (count, -1)) for x in op(*folded.values()))
    sinks, folded["sinks"] = call["sinks"], None
    dq, dk, dv, dbias, dsinks = op(*folded.values())
    dq, dk, dv = (x.unflatten(0, (count, -1)) for x in (dq, dk, dv))
    if call["need_dbias"]:
        rows = call["bias"].shape[1 if "bias" in mapped else 0]
        dbias = dbias.unflatten(0, (count, -1))
        if rows < rows_q:
            dbias = dbias.sum(1, keepdim=True)
    else:
        dbias = dbias.expand(count, -1)
    if sinks is None:
        dsinks = dsinks.expand(count, -1)
    else:
        dout, dlse, out, lse = (folded[name] for name in ("dout", "dlse", "out", "lse"))
        delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        delta = delta if dlse is None else delta - dlse
        dsinks = sinks_gradient(sinks, *(x.unflatten(0, (count, -1)) for x in (lse, delta)))
    return dq, dk, dv, dbias, dsinks


def _fold(x: torch.Tensor, mapped: bool, count: int, rows: int) -> torch.Tensor:
    """`(N, B or 1, ...)`, or `(B or 1, ...)` for all samples, as `(N * B, ...)`, in whose rows memory is contiguous.
    Dimensions that `x` is expanded along stay so."""
    x = x if mapped else x.expand(count, *x.shape)
    x = x.expand(-1, rows, *x.shape[2:])
    shape = x.shape
    for dim in range(2, x.ndim):
        if x.stride(dim) == 0:
            x = x.narrow(dim, 0, 1)
    return x.flatten(0, 1).contiguous().expand(count * rows, *shape[2:])


def _moved(table: torch.Tensor, rows_own: int, rows_other: int) -> torch.Tensor:
    """Tile schedules or sequence tables `(N, n, columns)`, in which batch rows count through all samples."""
    sample = torch.arange(table.shape[0], dtype=table.dtype, device=table.device)[:, None, None]
    column = torch.arange(table.shape[2], device=table.device)
    return table + sample * (
        rows_own * (column == ScheduleColumn.BATCH) + rows_other * (column == ScheduleColumn.OTHER_BATCH)
    ).to(table.dtype)


def _fold_schedule(tables: torch.Tensor, rows_own: int, rows_other: int) -> torch.Tensor:
    """Tile schedules `(N, tiles, 12)` of the samples as the schedule of all of them."""
    used = torch.arange(tables.shape[1], device=tables.device) < tables[..., ScheduleColumn.NUM_TILES]
    table, used = _moved(tables, rows_own, rows_other).flatten(0, 1), used.flatten()
    amount = (table[:, ScheduleColumn.HI] - table[:, ScheduleColumn.LO]).masked_fill(~used, -1)
    order = torch.argsort(amount, descending=True, stable=True)
    total = used.sum(dtype=table.dtype).expand(table.shape[0], 1)
    return torch.cat([table[order][:, : ScheduleColumn.NUM_TILES], total], dim=1)
