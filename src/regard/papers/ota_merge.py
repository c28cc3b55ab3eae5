"""Optimization-Trajectory-Aware merging with Fast Fisher Grafting (arXiv 2509.11167): experts made one by Adam's second moments.

A small base learns a little of three tasks of digits (sums, strings turned round, strings sorted); an expert of each is trained
from it, and its optimiser's moments are kept. Checked here:

* the merge against the least sum of quadratic losses, its limits, and files on disk against memory;
* what an expert keeps when a share of its edits stays, by curvature, by size and at random;
* exact match on the three tasks of the merged model, of its parts alone, of linear averaging, task arithmetic, TIES, DARE-TIES
  and plain Fisher merging, with the same densities, and of one model trained on all three;
* which roles keep their edits, how the masks are built, how alike the experts' curvature is, and what rank-one moments take.

Densities are chosen as published, the least at which an expert keeps its own score; on samples that are not those reported.
Beyond our scale: Llama-3.1-8B and its benchmarks. Left out: Breadcrumbs (at its published 1e-4 it drops no number of a matrix
of this size and is TIES by tensor), SCE and multislerp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regard.metrics.bootstrap import student
from regard.papers import Claim, Paper, Run
from regard.papers._ota_merge_runs import (
    GRID,
    KINDS,
    MATRICES,
    Size,
    measure,
    quadratic_gaps,
    tasks,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINES = ("linear", "task arithmetic", "TIES", "DARE-TIES")
BEST = "OTA + FFG"

PAPER = Paper(
    "ota-merge",
    claims=[
        Claim(
            "quadratic",
            "With curvature as moments and power 1 the merge is the least sum of diagonal quadratic losses: largest distance",
            setting="section on merging as preconditioned averaging; the published power is 1/2, which is not that point",
            expect="below 1e-10 at power 1, above 1e-3 at power 1/2",
        ),
        Claim(
            "files",
            "From files to a file the merge is that in memory, and stored rank-one moments are the rank-one form: differences",
            setting="not in the paper: the way a person uses it",
            expect="0, and below 1e-5 relative",
        ),
        Claim(
            "graft",
            "A graft keeps an expert's score at densities where pruning by size does not: points of exact match above it",
            setting="shown for Llama-3.1-8B at densities of 40 % and 30 %",
            unit=" points",
            expect="above 0 at densities 0.1 and 0.2, and random pruning below pruning by size; fails when 0 or less at both",
        ),
        Claim(
            "merge",
            "OTA with FFG is better than linear averaging: points of exact match, mean over the three tasks",
            setting="five experts of Llama-3.1-8B, mean over capability benchmarks",
            paper="best average",
            unit=" points",
            expect="at least 2",
        ),
        Claim(
            "best",
            "OTA with FFG has the best average: points above the best of linear, task arithmetic, TIES and DARE-TIES",
            setting="beside linear, TIES, DARE-TIES, Breadcrumbs, SCE, multislerp at the same densities",
            paper="best average",
            unit=" points",
            expect="at least 0, with the whole interval",
        ),
        Claim(
            "driver",
            "Grafting is what drives it: share of the gain over linear averaging that FFG with linear averaging has",
            setting="ablation",
            paper="most of the gain",
            expect="at least a half",
        ),
        Claim(
            "alone",
            "OTA without grafts is close to linear averaging: points above it",
            setting="ablation",
            paper="close",
            unit=" points",
            expect="within 2",
        ),
        Claim(
            "rank-one",
            "Moments of rank one keep the gain: points of OTA with FFG by them above those by whole moments",
            setting="ablation",
            unit=" points",
            expect="at least -2, with the whole interval",
        ),
        Claim(
            "memory",
            "Moments of rank one are cheap to keep: bytes over those of whole moments",
            setting="row and column sums of each matrix",
            unit=" x",
            expect="at most 0.1",
            holds=lambda ratio: ratio <= 0.1,
        ),
        Claim(
            "together",
            "Training one model on all tasks is still better: points above the merge",
            setting="coding, multi-task training 86.6, merge 78.8",
            paper="+7.8 on coding",
            unit=" points",
            expect="above 0",
            holds=lambda points: points > 0,
        ),
        Claim(
            "roles",
            "Edits of queries and keys are pruned harder than those of values, outputs and feed-forward layers: share kept",
            setting="masks of Llama-3.1-8B",
            expect="query and key each below value, output and feed-forward each",
        ),
        Claim(
            "embeddings",
            "Edits of embeddings are pruned hard too: share kept, less the share of values, outputs and feed-forward layers",
            setting="masks of Llama-3.1-8B",
            expect="below 0",
            holds=lambda gap: gap < 0,
        ),
        Claim(
            "low-rank",
            "Masks keep whole rows and columns: effective rank over that of shuffled masks, empty lines beside chance",
            setting="pictures of masks of Llama-3.1-8B",
            expect="rank below 0.9 of chance and more empty lines than by chance",
        ),
        Claim(
            "curvature",
            "Experts share curvature: cosine of the roots of two experts' moments, mean over pairs",
            setting="moments across tasks and schedules",
            paper="strongly similar",
            expect="above 0.7, and above that of shuffled tensors",
        ),
        Claim(
            "llama",
            "Five experts of Llama-3.1-8B (mathematics, code, instructions, chat, knowledge) merge to the best average",
            setting="Tulu-3 experts, capability benchmarks",
            paper="best average; code 78.8",
            beyond="it needs five full fine-tunings of a model of 8B parameters and its benchmarks",
        ),
    ],
    needs=("matplotlib", "scipy"),
)


def experiment(run: Run) -> None:
    run.seed(0)
    size = run.pick(
        quick=Size(width=16, layers=1, base_steps=3, steps=3, asked=20),
        full=Size(),
    )
    record_quadratic(run)
    found = []
    for seed in run.progress(run.pick(quick=[0], full=[0, 1, 2]), "families"):
        run.seed(seed)
        found.append(run.partial(f"family {seed}", lambda s=seed: measure(size, s)))
    where = (
        f"{found[0]['parameters']:,} parameters, {size.layers} layers of width {size.width}; base {size.base_steps} steps,"
        f" experts {size.steps} steps of {sum(size.shares)} samples, beta_2 0.999; {len(found)} seeds, {size.asked} held-out"
        " samples a task"
    )
    record_files(run, found, where)
    record_grafts(run, found, where)
    record_merges(run, found, where)
    record_masks(run, found, where)
    run.figure("merges", draw_merges(found))
    run.figure("grafts", draw_grafts(found))


def record_quadratic(run: Run) -> None:
    gaps = quadratic_gaps(0)
    run.record(
        "quadratic",
        here=gaps,
        holds=gaps["power 1"] < 1e-10 and gaps["power 0.5"] > 1e-3,
        setting="three losses of 1000 numbers in float64; the least point by a linear solve",
    )


def record_files(run: Run, found: list[dict[str, Any]], where: str) -> None:
    files = [one["files"] for one in found]
    merged, moments = (max(f[name] for f in files) for name in ("merged", "moments"))
    run.record(
        "files",
        here={"merged": merged, "moments": moments},
        holds=merged == 0 and moments < 1e-5,
        setting=f"directories by save_pretrained, merge_files, from_pretrained; {where}",
    )
    first = files[0]
    run.record(
        "memory",
        here=round(first["compressed"] / first["whole"], 4),
        setting=where,
        note=f"{first['compressed']:,} of {first['whole']:,} bytes; the share falls as one over the width",
    )


def record_grafts(run: Run, found: list[dict[str, Any]], where: str) -> None:
    at = {density: GRID.index(density) for density in (0.1, 0.2)}
    gains = {
        f"{density}": [
            one["grafts"]["curvature"][place] - one["grafts"]["size"][place] for one in found
        ]
        for density, place in at.items()
    }
    mean = {density: sum(values) / len(values) for density, values in gains.items()}
    curves = mean_curves(found)
    random = all(curves["random"][place] < curves["size"][place] for place in at.values())
    above = [value > 0 for value in mean.values()]
    holds = True if all(above) and random else False if not any(above) else None
    spread = {density: student(values) for density, values in gains.items()}
    run.record(
        "graft",
        here={density: round(value, 1) for density, value in mean.items()},
        holds=holds,
        setting=where,
        note="Student's 95 % intervals over seeds "
        + ", ".join(f"{d}: {one.low:.1f} to {one.high:.1f}" for d, one in spread.items())
        + "; exact match of experts on their own tasks at "
        + "; ".join(
            f"{density}: " + ", ".join(f"{kind} {curves[kind][place]:.1f}" for kind in KINDS)
            for density, place in at.items()
        )
        + ("" if holds is not None else "; the two densities or random pruning disagree"),
    )


def mean_curves(found: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Exact match by density of every way to graft, mean over seeds."""
    return {
        kind: [
            sum(values) / len(found)
            for values in zip(*(f["grafts"][kind] for f in found), strict=True)
        ]
        for kind in KINDS
    }


def averages(found: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Exact match of every model, mean over the tasks, by seed."""
    names = found[0]["scores"]
    return {
        name: [sum(f["scores"][name]) / len(f["scores"][name]) for f in found] for name in names
    }


def record_merges(run: Run, found: list[dict[str, Any]], where: str) -> None:
    every = averages(found)
    mean = {name: sum(values) / len(values) for name, values in every.items()}

    def gain(name: str, over: str) -> list[float]:
        return [a - b for a, b in zip(every[name], every[over], strict=True)]

    def told(values: list[float]) -> float:
        return round(sum(values) / len(values), 2)

    paired = "Student's 95 % interval of the paired difference over seeds"
    learnt = min(
        one["scores"][f"{name} expert"][place] - one["scores"]["base"][place]
        for one in found
        for place, name in enumerate(tasks())
    )
    table = ", ".join(f"{name} {value:.1f}" for name, value in mean.items())
    densities = "; ".join(
        ", ".join(f"{density:g}" for density in one["densities"]) for one in found
    )
    gains = gain(BEST, "linear")
    run.record(
        "merge",
        here=told(gains),
        interval=student(gains).ends,
        holds=student(gains).at_least(2) if learnt > 0 else None,
        setting=where,
        note=f"{paired}; exact match in percent: {table}; densities of the experts by seed {densities};"
        f" each expert is at least {learnt:.1f} points above the base on its task",
    )
    rival = max(BASELINES, key=lambda name: mean[name])
    against = gain(BEST, rival)
    run.record(
        "best",
        here=told(against),
        interval=student(against).ends,
        holds=student(against).at_least(0),
        setting=where,
        note=f"{paired}; the best is {rival} with {mean[rival]:.1f}; OTA + FFG {mean[BEST]:.1f},"
        f" plain Fisher {mean['Fisher']:.1f}, FFG + TIES {mean['FFG + TIES']:.1f}",
    )
    whole, part = told(gains), told(gain("FFG + linear", "linear"))
    shared = whole > 0 and student(gains).at_least(0) is True
    run.record(
        "driver",
        here=round(part / whole, 2) if whole > 0 else part,
        holds=part / whole >= 0.5 if shared else None,
        setting=where,
        note=f"FFG + linear {part:.2f} points above linear, OTA + FFG {whole:.2f}"
        + ("" if shared else "; a gain whose interval holds 0 has no shares to compare"),
    )
    alone = gain("OTA", "linear")
    near = student(alone)
    run.record(
        "alone",
        here=told(alone),
        interval=near.ends,
        holds=near.at_least(-2) if near.high <= 2 else False if near.low > 2 else None,
        setting=where,
        note=paired,
    )
    small = gain("OTA + FFG, rank 1", BEST)
    run.record(
        "rank-one",
        here=told(small),
        interval=student(small).ends,
        holds=student(small).at_least(-2),
        setting=where,
        note=f"{paired}; the graft and the weights are both of compressed moments",
    )
    joint = gain("trained on all", BEST)
    run.record(
        "together",
        here=told(joint),
        interval=student(joint).ends,
        setting=where,
        note=f"{paired}; the one model takes as many steps as the three experts together",
    )


def record_masks(run: Run, found: list[dict[str, Any]], where: str) -> None:
    masks = [one["masks"] for one in found]
    roles = {role: sum(m["roles"][role] for m in masks) / len(masks) for role in masks[0]["roles"]}
    kept = min(roles[role] for role in ("value", "output", "feed-forward"))
    shown = {role: round(roles[role], 3) for role in MATRICES}
    seeds = f"mean over {len(found)} seeds and three experts at their chosen densities"
    run.record(
        "roles",
        here=shown,
        holds=max(roles["query"], roles["key"]) < kept,
        setting=where,
        note=f"{seeds}; norms {roles['norm']:.3f}",
    )
    run.record(
        "embeddings",
        here=round(roles["embedding"] - kept, 3),
        setting=where,
        note=f"{seeds}; embeddings, which are tied to the head here, keep {roles['embedding']:.3f}; the vocabulary has 15 tokens,"
        " all of them in use",
    )
    rank, empty, chance = (
        sum(m[name] for m in masks) / len(masks) for name in ("rank", "empty", "chance empty")
    )
    run.record(
        "low-rank",
        here={
            "rank": round(rank, 3),
            "empty": round(empty, 4),
            "empty by chance": round(chance, 4),
        },
        holds=rank < 0.9 and empty > chance,
        setting=where,
        note=f"{seeds}; matrices of the layers; rank is the exponential of the entropy of singular values",
    )
    shared = {
        name: sum(one["curvature"][name] for one in found) / len(found)
        for name in found[0]["curvature"]
    }
    cosines = [one["curvature"]["cosine"] for one in found]
    run.record(
        "curvature",
        here={name: round(value, 3) for name, value in shared.items()},
        interval=student(cosines).ends,
        holds=shared["cosine"] > 0.7 and shared["cosine"] > shared["cosine, shuffled"],
        setting=where,
        note="Student's 95 % interval of the cosine over seeds; ranks are Spearman's correlation; shuffled within each tensor,"
        " which leaves the scale of tensors in common",
    )


def draw_merges(found: list[dict[str, Any]]) -> Figure:
    import matplotlib.pyplot as plt

    every = averages(found)
    names = sorted(every, key=lambda name: sum(every[name]))
    figure, ax = plt.subplots(figsize=(7, 4.4), layout="constrained")
    colours = ["tab:orange" if "FFG" in n or n == "OTA" else "tab:blue" for n in names]
    means = [sum(every[name]) / len(found) for name in names]
    ax.barh(names, means, color=colours, alpha=0.8)
    for place, (name, mean) in enumerate(zip(names, means, strict=True)):
        ax.plot(every[name], [place] * len(found), "k.", ms=4)
        ax.text(102, place, f"{mean:.0f}", fontsize=8, va="center")
    ax.set(xlabel="exact match, mean over three tasks, % (points: seeds)", xlim=(0, 108))
    return figure


def draw_grafts(found: list[dict[str, Any]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    for kind, curve in mean_curves(found).items():
        (line,) = left.plot(
            GRID, curve, marker=".", label=f"by {kind}" if kind != "random" else kind
        )
        for one in found:
            left.plot(GRID, one["grafts"][kind], color=line.get_color(), lw=0.5, alpha=0.5)
    left.set(
        xscale="log",
        xlabel="share of edits kept",
        ylabel="expert's exact match on its task, %",
        ylim=(-3, 103),
    )
    left.set_xticks([0.05, 0.1, 0.2, 0.4, 1.0])
    left.get_xaxis().set_major_formatter("{x:g}")
    left.minorticks_off()
    left.legend(fontsize=8)
    layers = range(len(found[0]["masks"]["layers"]))
    width = 0.8 / len(layers)
    for layer in layers:
        heights = [
            sum(one["masks"]["layers"][layer][role] for one in found) / len(found)
            for role in MATRICES
        ]
        right.bar(
            [place + width * (layer - (len(layers) - 1) / 2) for place in range(len(MATRICES))],
            heights,
            width,
            label=f"layer {layer}",
        )
    right.set_xticks(range(len(MATRICES)), MATRICES, fontsize=8)
    right.set(ylabel="share of edits kept at the chosen density")
    right.legend(fontsize=8)
    return figure
