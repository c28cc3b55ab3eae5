"""Draws docs/benchmarks.md and its picture from benchmarks/results/observe.json; nothing here measures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NAMES = {
    "plain": "plain forward pass (fused attention)",
    "attached": "`regard.attach` without a method",
    "exact": "**regard, exact**: all instruments of the report",
    "sampled": "**regard, 1 row in 16**: the same instruments",
    "eager": "transformers eager, `output_attentions=True`",
    "transformer_lens": "TransformerLens 4.3, `run_with_cache`",
    "nnsight": "nnsight 0.8.1, saved attention weights",
}
GOALS = (
    ("exact, 2,048 tokens: time", "exact", 2048, "ratio", 1.4),
    ("exact, 4,096 tokens: time", "exact", 4096, "ratio", 1.5),
    ("exact, 8,192 tokens: time", "exact", 8192, "ratio", 1.6),
    ("exact, 2,048 tokens: extra memory, MB", "exact", 2048, "memory_mb", 300),
    ("exact, 4,096 tokens: extra memory, MB", "exact", 4096, "memory_mb", 300),
    ("exact, 8,192 tokens: extra memory, MB", "exact", 8192, "memory_mb", 500),
    ("sampled, 4,096 tokens: time", "sampled", 4096, "ratio", 1.1),
    ("sampled, 8,192 tokens: time", "sampled", 8192, "ratio", 1.1),
    ("no method attached, 2,048 tokens: time", "attached", 2048, "ratio", 1.02),
    ("row statistics while generating: time", "generate", 512, "ratio", 1.1),
    (
        "32,768 tokens, 4 random layers: extra memory, MB",
        "exact, 4 random layers",
        32768,
        "memory_mb",
        2000,
    ),
)


def find(rows: list[dict[str, Any]], method: str, length: int) -> dict[str, Any]:
    return next((r for r in rows if r["method"] == method and r["length"] == length), {})


def cell(row: dict[str, Any]) -> str:
    if "ratio" not in row:
        return row.get("failed", "")
    text = f"{row['ratio']:.2f}x"
    return text + (f", {row['memory_mb']:,.0f} MB" if row.get("memory_mb") is not None else "")


def table(rows: list[dict[str, Any]]) -> list[str]:
    lengths = sorted({r["length"] for r in rows if r["method"] == "plain"})
    lines = [
        "| | " + " | ".join(f"{n:,} tokens" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for key, name in NAMES.items():
        cells = [cell(find(rows, key, n)) for n in lengths]
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def goals(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| goal | bound | median (least to most) | met |", "|---|---|---|---|"]
    for what, method, length, field, bound in GOALS:
        row = find(rows, method, length)
        value, part = row.get(field), field.split("_")[0]
        if value is None:
            lines.append(f"| {what} | {bound} | not measured | |")
            continue
        digits = 2 if field == "ratio" else 0
        span = ""
        if f"{part}_low" in row:
            span = f" ({row[f'{part}_low']:,.{digits}f} to {row[f'{part}_high']:,.{digits}f})"
        met = "yes" if value <= bound else "**no**"
        lines.append(f"| {what} | {bound} | {value:,.{digits}f}{span} | {met} |")
    return lines


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for key, name in NAMES.items():
        found = [r for r in rows if r["method"] == key and "ratio" in r]
        label = name.replace("*", "").replace("`", "").split(",")[0].split(":")[0]
        label += " 1/16" if key == "sampled" else ""
        if key not in ("plain", "attached"):
            axes[0].plot(
                [r["length"] for r in found], [r["ratio"] for r in found], "o-", ms=4, label=label
            )
        held = [r for r in found if r.get("memory_mb")]
        if key != "attached":
            axes[1].plot(
                [r["length"] for r in held], [r["memory_mb"] for r in held], "o-", ms=4, label=label
            )
    axes[0].axhline(1, color="0.7", lw=1)
    axes[0].set(xscale="log", xlabel="tokens", ylabel="time / plain forward pass", ylim=(0.8, None))
    axes[1].set(xscale="log", yscale="log", xlabel="tokens", ylabel="extra peak memory, MB")
    for ax in axes:
        ticks = sorted({r["length"] for r in rows if r["method"] == "plain"})
        ax.set_xticks(ticks, [f"{n:,}" for n in ticks])
        ax.minorticks_off()
    axes[1].legend(fontsize=7, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def write(results: Path) -> None:
    found = json.loads(results.read_text())
    rows, machine, versions = found["rows"], found["machine"], found["versions"]
    picture(rows, ROOT / "docs" / "assets" / "benchmarks.svg")
    lines = [
        "# Benchmarks",
        "",
        "What it costs to observe every head of SmolLM2-135M on English prose, beside the plain forward pass and beside the",
        "usual ways of getting attention statistics. `make bench` repeats it; `benchmarks/` has the code.",
        "",
        f"Machine: {machine['cores']} cores, {machine['threads']} threads; torch {versions['torch']}, transformers"
        f" {versions['transformers']}. Time is the median over rounds of (method / plain), both in the same round; memory is the"
        " highest resident size during one pass above what was resident before it, in a process of its own (of three for"
        " regard and the plain pass, the median).",
        "",
        *table(rows),
        "",
        "![Time and memory against length](assets/benchmarks.svg)",
        "",
        "regard reads entropy, distance, WAAD, FAI, sink mass, token importance, pattern shares with 128 diagonals, 64 x 64"
        " pooled maps, value drains, head output norms and residual peaks. The other rows get only entropy, first-key mass,"
        " distance and column sums from their maps.",
        "",
        *([f"Note: {found['note']}.", ""] if found.get("note") else []),
        "## Goals",
        "",
        *goals(rows),
        "",
    ]
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(lines))


if __name__ == "__main__":
    write(
        Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results" / "observe.json"
    )
