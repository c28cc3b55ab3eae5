"""Draws docs/benchmarks-shrink.md from benchmarks/results/{cache,statistics,sparse}.json; nothing here measures.

python -m benchmarks.shrink_page
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = HERE.parent / "docs" / "benchmarks-shrink.md"
CACHE_GOALS = (
    ("128k tokens, full cache against DynamicCache", "long: full against dynamic", 8.0),
    ("128k tokens, 1,024 kept against our full cache", "long: even against full", 30.0),
    ("128k tokens, 1,024 kept against DynamicCache", "long: even against dynamic", 150.0),
    ("SmolLM2, 8k tokens, full cache against DynamicCache", "model: full against dynamic", 1.5),
    (
        "SmolLM2, 8k to 512 with lengths per head, against DynamicCache",
        "model: per_head against dynamic",
        2.5,
    ),
)
SPARSE_GOALS = {"sliding window 512": 10.0, "powers of two, 1 sink block": 6.5}
NAMES = {
    "dynamic": "transformers `DynamicCache`",
    "full": "`regard.cache.Full`",
    "even": "kept, the same in every head",
    "per_head": "kept, lengths per layer and head",
    "bare": "nothing held: the model itself",
}


def verdict(met: bool) -> str:
    return "yes" if met else "**no**"


def decoding(found: dict[str, Any]) -> list[str]:
    """Time and bytes of a generated token under each cache."""
    lines: list[str] = []
    for part, title in (
        ("long", "Four random layers of width 256, 128k tokens, 1,024 kept"),
        ("model", "SmolLM2-135M, 8k tokens, 512 kept"),
    ):
        rows = found[part]
        lines += [
            f"**{title}**",
            "",
            "| cache | ms a token | held | floor, ms |",
            "|---|---|---|---|",
        ]
        for key, name in NAMES.items():
            row = rows[key]
            lines.append(
                f"| {name} | {row['ms']:.1f} | {row['bytes'] / 1e6:,.1f} MB | {row['floor_ms']:.1f} |"
            )
        lines.append("")
    ratios = found["ratios"]
    lines += [
        "Every run that was taken, in turn, with the speed of memory in it: what reads much gains where memory is slow. The most"
        " that any cache could reach is the time against that of the model with one token held, in the last run.",
        "",
        "| goal | at least | measured | the most possible | met |",
        "|---|---|---|---|---|",
    ]
    for part, title in (("long", "128k tokens"), ("model", "SmolLM2")):
        speeds = ", ".join(
            f"{run[part]['bandwidth_gb_s']:.0f}" for run in found["runs"] if part in run
        )
        lines.append(f"| {title}, memory read by one thread, GB/s | | {speeds} | | |")
    for what, key, bound in CACHE_GOALS:
        part, against = key.split(": ")[0], key.rsplit(" ", 1)[-1]
        measured = [run[part][key] for run in found["runs"] if part in run]
        ceiling = ratios[f"{part}: nothing held against {against}"]
        most = "" if "full against" in key else f"{ceiling:.1f}x"
        met = [one >= bound for one in measured]
        word = verdict(all(met)) if len(set(met)) == 1 else "**not in every run**"
        lines.append(
            f"| {what} | {bound:g}x | {', '.join(f'{one:.1f}x' for one in measured)} | {most} | {word} |"
        )
    share = ratios["bytes of 20 % per head"]
    lines.append(
        f"| bytes of a 20 % budget with lengths per head, of all | at most 0.21 | {share:.3f} | | {verdict(share <= 0.21)} |"
    )
    prefill = found.get("prefill", {})
    if "cascade_mb" in prefill:
        held = prefill["cascade_mb"]
        plain = f" (plain: {prefill['plain_mb']:.0f})" if "plain_mb" in prefill else ""
        lines.append(
            f"| extra peak of an 8k prefill, 1,024 kept between chunks{plain} | at most 250 MB | {held:.0f} MB | |"
            f" {verdict(held <= 250)} |"
        )
    return lines


def statistics(found: dict[str, Any]) -> list[str]:
    """What watching attention adds to a prefill."""
    lines = [
        f"Extra CPU time of a {found['length']:,}-token prefill with the fused kernel, one thread. Rank correlation: of the"
        " scores from sampled rows with those from every row.",
        "",
        "| scores | extra time | rank correlation |",
        "|---|---|---|",
    ]
    for row in found["rows"]:
        same = f"{row['rank_correlation']:.2f}" if "rank_correlation" in row else ""
        lines.append(f"| {row['method']} | {100 * row['extra']:.1f} % | {same} |")
    goals, exact = found["goals"], found["rows"][0]["extra"]
    lines += ["", "| goal | bound | measured | met |", "|---|---|---|---|"]
    lines.append(
        f"| every row: extra time | at most {goals['exact']:.0%} | {exact:.1%} | {verdict(exact <= goals['exact'])} |"
    )
    near = goals["rank correlation of sampled"]
    ranked = [row for row in found["rows"] if row.get("rank_correlation", 0) >= near]
    if ranked:
        best = min(row["extra"] for row in ranked)
        lines.append(
            f"| sampled rows, rank correlation at least {near:g}: extra time | at most {goals['sampled']:.0%} | {best:.1%} |"
            f" {verdict(best <= goals['sampled'])} |"
        )
    else:
        lines.append(f"| sampled rows, rank correlation at least {near:g} | | none | **no** |")
    return lines


def sparse(found: dict[str, Any]) -> list[str]:
    """Speed-up of each pattern over dense attention by length."""
    rows = [row for row in found["rows"] if row["kv_heads"] == 9]
    lengths = sorted({row["length"] for row in rows})
    names = list(dict.fromkeys(row["pattern"] for row in rows if row["pattern"] != "dense"))
    lines = [
        "Causal attention of 9 heads of 64 dimensions, blocks of 128, one thread: how many times faster than dense fused"
        " attention; in brackets, what the share of named pairs would allow.",
        "",
        "| pattern | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    at = {(row["pattern"], row["length"]): row for row in rows}
    for name in names:
        cells = []
        for length in lengths:
            row = at.get((name, length))
            ideal = f" ({row['ideal']:.1f})" if row and row["ideal"] else ""
            cells.append("" if row is None else f"{row['speedup']:.1f}x{ideal}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| goal at 16,384 tokens | at least | measured | met |", "|---|---|---|---|"]
    for name, bound in SPARSE_GOALS.items():
        row = at.get((name, 16384))
        if row is not None:
            lines.append(
                f"| {name} | {bound:g}x | {row['speedup']:.1f}x | {verdict(row['speedup'] >= bound)} |"
            )
    slower = [row for row in rows if row["pattern"] != "dense" and row["high"] < 1]
    lines += [
        "",
        f"{len(slower)} of {len(rows) - len(lengths)} cells are slower than dense attention in every round"
        + (
            ": " + ", ".join(f"{row['pattern']} at {row['length']:,}" for row in slower)
            if slower
            else ""
        )
        + ".",
    ]
    return lines


def main() -> None:
    found = {
        name: json.loads((HERE / "results" / f"{name}.json").read_text())
        for name in ("cache", "statistics", "sparse")
    }
    lines = [
        "# Shrinking: time and memory",
        "",
        "Ratios are taken between neighbours of one interleaved run on 2 cores without a GPU. `python -m benchmarks.cache`,"
        " `.statistics` and `.sparse` repeat them. What caches cost in quality is measured by [the bench](bench.md).",
        "",
        "## Decoding",
        "",
        "The floor is the time to read the weights and everything held once, at the measured bandwidth.",
        "",
        *decoding(found["cache"]),
        "",
        "## Statistics for the scores",
        "",
        *statistics(found["statistics"]),
        "",
        "## Sparse prefill",
        "",
        *sparse(found["sparse"]),
        "",
    ]
    OUT.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
