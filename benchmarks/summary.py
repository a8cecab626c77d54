"""The README's picture, results table and badges, made from the committed rows and from pyproject.toml.

    python benchmarks/summary.py  # writes docs/assets/ and the table between README's `results` markers

The newest row of each measurement counts. Every number in the table is a committed value or a quotient of two.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

import tomllib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_flashbsa.bench import report  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"
MARKERS = ("<!-- results: benchmarks/summary.py -->\n", "<!-- end of results -->")
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
HOPPER = "`hf-flashbsa bench --preset hopper`"
SPARSE = "`hf-flashbsa bench --preset sparse`"
TRAINING = "`benchmarks/padding_free.py`"
OURS, PADDED, PEER, RIVAL = "#1f5fbf", "#8fb3e6", "#9aa3ad", "#d98a2b"
PACKED = "bsa_dense+padding_free"

#: Variants of benchmarks/padding_free.py, slowest first, with the words for them.
BARS = {
    "sdpa": "sdpa",
    "flash_attention_2": "flash_attention_2",
    "bsa_dense": "bsa_dense",
    "flash_attention_2+grouped": "flash_attention_2,\ngrouped by length",
    "bsa_dense+grouped": "bsa_dense,\ngrouped by length",
    PACKED: "bsa_dense,\npadding-free",
    f"{PACKED}+fused_ce": "bsa_dense, padding-free,\nfused loss",
}


class Rows(NamedTuple):
    """The committed measurements: of attention, of block layouts, of training steps."""

    attention: list[dict]
    sparse: list[dict]
    training: list[dict]

    @classmethod
    def read(cls) -> Rows:
        attention, sparse = (report.read([RESULTS / f"nvidia-h200{name}.jsonl"]) for name in ("", "-sparse"))
        return cls(attention, sparse, list(report.rows_of([RESULTS / "nvidia-h200-padding-free.jsonl"])))


def newest(rows: list[dict], **wanted) -> dict:
    """The last row with these values that holds a measurement. Raises KeyError where there is none."""
    for row in reversed(rows):
        if row.get("error") is None and all(row.get(name) == value for name, value in wanted.items()):
            return row
    raise KeyError(f"no row of {wanted}")


def attention_row(rows: list[dict], provider: str, **wanted) -> dict:
    """A measurement of 16,384 tokens, hidden size 2,048, without dropout and bias, unless `wanted` says otherwise."""
    usual = {"clock": "device", "dropout_p": 0.0, "bias": False, "provider": provider, "pattern": None}
    heads = 2048 // wanted["head_dim"]
    sizes = {"heads": heads, "heads_k": heads, "batch": 16384 // wanted["length"]}
    return newest(rows, **usual | sizes | wanted)


def step(rows: list[dict], variant: str, model: str = "bart-large", batch: int = 128) -> dict:
    return newest(rows, part="steps", variant=variant, model=model, batch=batch)


def speedups(rows: list[dict], over: str, lengths: tuple[int, ...], **wanted) -> str:
    """Speed over another provider at each length, as "a to b"."""
    ratios = [
        attention_row(rows, over, length=n, **wanted)["ms"]
        / attention_row(rows, "hf_flashbsa", length=n, **wanted)["ms"]
        for n in lengths
    ]
    low, high = f"{min(ratios):.2f}x", f"{max(ratios):.2f}x"
    return low if low == high else f"{low} to {high}"


def table(rows: Rows) -> str:
    """The README's results, one Markdown line for each."""
    packed, flash = step(rows.training, PACKED), step(rows.training, "flash_attention_2")
    t5, t5_sdpa = (step(rows.training, name, "t5-base", 32) for name in (PACKED, "sdpa"))
    largest = {
        name: newest(rows.training, part="largest", variant=name, model="bart-large", budget_gib=40)["batch"]
        for name in (PACKED, "flash_attention_2")
    }
    forward = {"pass": "forward", "mask": "causal", "head_dim": 128}
    backward = forward | {"pass": "backward"}
    layout = {"mask": "full", "pass": "both", "length": 16384, "head_dim": 128, "pattern": "longformer"}
    sparse, dense = (attention_row(rows.sparse, provider, **layout) for provider in ("hf_flashbsa", "fa2"))
    lines = [
        ("BART-large training step, 128 XSum documents, padding-free", "`flash_attention_2`",
         f"{flash['ms'] / packed['ms']:.2f}x as fast, {packed['peak_gib']:.1f} instead of {flash['peak_gib']:.1f} GiB",
         TRAINING),
        ("T5-base training step, 32 XSum documents, padding-free", "`sdpa`",
         f"{t5_sdpa['ms'] / t5['ms']:.2f}x as fast, {t5['peak_gib']:.1f} instead of {t5_sdpa['peak_gib']:.1f} GiB",
         TRAINING),
        ("Largest BART-large batch in 40 GiB, padding-free", "`flash_attention_2`",
         f"{largest[PACKED]} instead of {largest['flash_attention_2']} documents (earlier kernels)", TRAINING),
        ("Attention forward, causal, D=128, 512 to 16,384 tokens", "cuDNN",
         f"{speedups(rows.attention, 'cudnn', LENGTHS, **forward)} as fast", HOPPER),
        ("Attention backward, causal, D=128, 512 to 16,384 tokens", "cuDNN; FlashAttention-2",
         f"{speedups(rows.attention, 'cudnn', LENGTHS, **backward)}; "
         f"{speedups(rows.attention, 'fa2', LENGTHS, **backward)} as fast", HOPPER),
        ("Longformer layout, window 512, 128 global tokens, N=16,384, D=128, forward + backward",
         "dense FlashAttention-2", f"{dense['ms'] / sparse['ms']:.1f}x as fast", SPARSE),
    ]  # fmt: skip
    head = ["| what | compared with | result | measured by |", "|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)]) + "\n"


def _lines(axis, rows: list[dict], pass_: str, providers: dict[str, tuple[str, str]]) -> None:
    """TFLOP/s over length: one line for each provider."""
    for provider, (label, color) in providers.items():
        found = [
            attention_row(rows, provider, **{"pass": pass_}, mask="causal", head_dim=128, length=n)["tflops"]
            for n in LENGTHS
        ]
        width = 2.4 if provider == "hf_flashbsa" else 1.6
        axis.plot(LENGTHS, found, marker="o", markersize=4, linewidth=width, color=color, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(LENGTHS, [f"{n // 1024}k" if n >= 1024 else str(n) for n in LENGTHS])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("sequence length")
    axis.grid(axis="y", alpha=0.25)
    axis.set_title(f"Attention, {pass_}, TFLOP/s", fontsize=10, loc="left")


def _bars(axis, values: list[float], title: str, text: str) -> None:
    colors = [OURS if PACKED in name else PADDED if name.startswith("bsa") else PEER for name in BARS]
    drawn = axis.barh(list(BARS.values()), values, color=colors, height=0.72)
    axis.bar_label(drawn, [text.format(value) for value in values], padding=3, fontsize=8)
    axis.set_xlim(right=1.18 * max(values))
    axis.set_xticks([])
    axis.set_title(title, fontsize=10, loc="left")
    axis.spines["bottom"].set_visible(False)


def draw(rows: Rows, path: Path) -> None:
    """Attention's speed over the length, beside speed and memory of a training step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "hf_flashbsa"}
    with pyplot.rc_context(style):
        widths = {"width_ratios": (1, 1, 0.9, 0.9)}
        figure, axes = pyplot.subplots(1, 4, figsize=(11.5, 3.4), layout="constrained", gridspec_kw=widths)
        ours, cudnn, flash = ("hf_flashbsa", OURS), ("cuDNN", PEER), ("FlashAttention-2", RIVAL)
        _lines(axes[0], rows.attention, "forward", {"cudnn": cudnn, "hf_flashbsa": ours})
        _lines(axes[1], rows.attention, "backward", {"cudnn": cudnn, "fa2": flash, "hf_flashbsa": ours})
        axes[1].sharey(axes[0])
        axes[1].legend(frameon=False, fontsize=8, loc="lower right")
        steps = [step(rows.training, name) for name in BARS]
        _bars(axes[2], [row["examples_per_s"] for row in steps], "BART-large, documents/s", "{:.0f}")
        _bars(axes[3], [row["peak_gib"] for row in steps], "BART-large, peak GiB", "{:.0f}")
        axes[3].set_yticks([])
        for axis in axes[2:]:
            axis.invert_yaxis()
        first, padding = steps[0], 1 - steps[0]["live_share"]
        versions = f"{first['gpu']}, torch {first['torch']}, Triton {first['triton']}, bf16"
        figure.supxlabel(
            f"{versions}. Attention: causal, head dim 128, 16,384 tokens. "
            f"Training: 128 XSum documents a step, {padding:.0%} of the padded batch is padding.",
            fontsize=8,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, metadata={"Software": None})
        pyplot.close(figure)


def with_table(text: str, lines: str) -> str:
    """README's text with these results between the markers."""
    begin, end = MARKERS
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no results between {begin.strip()} and {end}")
    return pattern.sub(lambda _: f"{begin}{lines}{end}", text)


_BADGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20">
<title>{label}: {value}</title>
<rect width="{width}" height="20" rx="3" fill="#555"/>
<rect x="{split}" width="{rest}" height="20" rx="3" fill="#1f5fbf"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">
<text x="{left}" y="14">{label}</text><text x="{right}" y="14">{value}</text></g></svg>
"""


def badge(label: str, value: str) -> str:
    """An SVG of two words side by side."""
    split, rest = (7 * len(word) + 12 for word in (label, value))
    sizes = {"width": split + rest, "split": split, "rest": rest, "left": split // 2, "right": split + rest // 2}
    return _BADGE.format(label=label, value=value, **sizes)


def badges() -> dict[str, str]:
    """File name to SVG: what pyproject.toml says of licence and versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = dict(word.split(">=") for word in project["dependencies"])
    values = {
        "license": project["license"],
        "python": project["requires-python"].removeprefix(">=") + "+",
        **{name: version + "+" for name, version in versions.items()},
    }
    return {f"badge-{label}.svg": badge(label, value) for label, value in values.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    rows, readme = Rows.read(), ROOT / "README.md"
    draw(rows, ASSETS / "overview.png")
    for name, text in badges().items():
        (ASSETS / name).write_text(text)
    readme.write_text(with_table(readme.read_text(), table(rows)))


if __name__ == "__main__":
    main()
