"""Tables of what benchmarks/padding_free.py measured, and of what is claimed about padding-free training."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.table import Table

STEPS = ("variant", "batch", "ms", "examples_per_s", "peak_gib", "reserved_gib", "live_share")
COLUMNS = {
    "steps": STEPS,
    "train": STEPS,
    "ledger": ("variant", "batch", "moment", "peak_gib", "explained", "explained_double",
               "double_predicted_over_measured"),
    "largest": ("variant", "budget_gib", "batch", "tokens", "peak_gib", "tries"),
}  # fmt: skip
PACKED = "bsa_dense+padding_free"
FUSED = f"{PACKED}+fused_ce"
FA2 = "flash_attention_2"


def measurements(rows: list[dict]) -> Iterator[Table]:
    """One table for each model and part among the rows."""
    for model, part in dict.fromkeys((row["model"], row["part"]) for row in rows):
        table = Table(*COLUMNS[part], "s", "error", title=f"{model}: {part}", box=SIMPLE)
        for row in rows:
            if (row["model"], row["part"]) == (model, part):
                values = (row.get(name) for name in (*COLUMNS[part], "took_s", "error"))
                table.add_row(*("" if value is None else str(value)[:60] for value in values))
        yield table


class Measured(NamedTuple):
    """Looks a number up in the rows."""

    rows: list[dict]

    def __call__(self, name: str, model: str, part: str, variant: str, **given: Any) -> float:
        """The newest value of `name`; KeyError where it was not measured."""
        wanted = {"model": model, "part": part, "variant": variant, **given}
        for row in reversed(self.rows):
            if row.get(name) is not None and all(row.get(key) == value for key, value in wanted.items()):
                return row[name]
        raise KeyError(f"{name} of {wanted}")


def _ratio(name: str, over: str, under: str, model: str, part: str, **given: Any) -> Callable[[Measured], float]:
    return lambda of: of(name, model, part, over, **given) / of(name, model, part, under, **given)


def _of_128(name: str, over: str, under: str) -> Callable[[Measured], float]:
    return _ratio(name, over, under, "bart-large", "steps", batch=128)


def _worst(name: str, model: str, badness: Callable[[float], float]) -> Callable[[Measured], float]:
    return lambda of: max((of(name, model, "ledger", variant) for variant in ("bsa_dense", PACKED)), key=badness)


def _all_claims() -> Iterator[tuple[str, Callable[[Measured], float], float | None, float | None]]:
    """What is claimed, how the number is made, and the bounds it must lie within; none where it is only shown."""
    large = "bart-large B=128: "
    yield f"{large}speed over flash_attention_2", _of_128("ms", FA2, PACKED), 1.75, None
    yield f"{large}speed over fa2_repaired", _of_128("ms", "fa2_repaired", PACKED), None, None
    yield f"{large}peak over flash_attention_2's", _of_128("peak_gib", PACKED, FA2), None, 0.55
    yield f"{large}peak with fused_ce over without", _of_128("peak_gib", FUSED, PACKED), None, 1.0
    yield f"{large}speed over full rows", _of_128("examples_per_s", PACKED, "bsa_dense+full_rows"), 0.85, None
    for name in (FA2, "bsa_dense"):
        grouped = f"{name}+grouped"
        yield f"{large}speed over length grouping, {name}", _of_128("ms", grouped, PACKED), None, None
        yield f"{large}peak over length grouping's, {name}", _of_128("peak_gib", PACKED, grouped), None, None
    for options, low in (("", 2.0), ("+fused_ce", None), ("+fused_ce+checkpointing", None)):
        within = _ratio("batch", PACKED + options, FA2, "bart-large", "largest", budget_gib=40)
        yield f"bart-large in 40 GiB{options}: batch over flash_attention_2's", within, low, None
    for model in ("bart-large", "llama-1b"):
        least = _worst("explained", model, operator.neg)
        yield f"{model}: least share of the peak explained", least, 0.95, None
        furthest = _worst("double_predicted_over_measured", model, lambda x: abs(x - 1))
        yield f"{model}: double the batch, predicted over measured", furthest, 0.95, 1.05
    for size in (32, 128):
        number = _ratio("ms", "bsa_dense", PACKED, "t5-base", "steps", batch=size)
        yield f"t5-base B={size}: speed over its padded self", number, 1.5, None


def claims(rows: list[dict]) -> Iterator[Table]:
    """The table of claims that the rows bear on; none where they bear on none."""
    table = Table("claim", "measured", "bounds", "holds", title="claims", box=SIMPLE)
    of = Measured(rows)
    for text, number, low, high in _all_claims():
        try:
            value = number(of)
        except KeyError:
            continue
        bounds = " ".join(f"{sign} {bound}" for sign, bound in ((">=", low), ("<=", high)) if bound is not None)
        holds = (low is None or value >= low) and (high is None or value <= high)
        table.add_row(text, f"{value:.3f}", bounds, ("yes" if holds else "NO") if bounds else "")
    if table.row_count:
        yield table
