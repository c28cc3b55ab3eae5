"""Pictures of the experiment on walks in embedding space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from regard.instruments.walk import embedding_walk
from regard.labs.embedding_walk.laboratory import REDUNDANT
from regard.papers import _embedding_walk_runs as runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SENTENCE = "The capital of France is"


def draw_walk(model: Any) -> Figure:
    """One sentence in two principal axes, and what each token is nearest to on the way."""
    import matplotlib.pyplot as plt

    found = embedding_walk(model, SENTENCE)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.8), layout="constrained", width_ratios=[1, 1.1]
    )
    found.plot(ax=left)
    left.set_title("normed states after each block; o embedding, X last", fontsize=10)
    shown = list(range(0, len(found.nearest), 3))
    places = list(range(1, len(found.tokens)))
    final = np.array([[found.nearest[s][t] == found.nearest[-1][t] for t in places] for s in shown])
    right.imshow(final, aspect="auto", cmap="Blues", vmin=0, vmax=2.2, origin="lower")
    for row, site in enumerate(shown):
        for column, place in enumerate(places):
            word = found.nearest[site][place]
            word = word if word.isascii() and word.isprintable() else "…"
            right.text(column, row, word.strip()[:11] or "_", ha="center", va="center", fontsize=8)
    right.set_xticks(range(len(places)), [repr(found.tokens[t]) for t in places])
    right.set_yticks(range(len(shown)), [str(s) for s in shown])
    right.set(xlabel="token", ylabel="block")
    right.set_title("nearest word after a block; blue: the one at the end", fontsize=10)
    return figure


def draw_steps(found: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    layers = range(len(found["attention"]))
    left.plot(layers, found["attention"], "o-", ms=3, label="attention")
    left.plot(layers, found["mlp"], "s-", ms=3, label="MLP")
    left.set(xlabel="block", ylabel="length of a step (median)", yscale="log")
    left.legend(frameon=False, fontsize=8)
    middle.axhline(0, color="0.7", lw=0.8)
    middle.plot(range(1, len(found["turning"]) + 1), found["turning"], "o-", ms=3, color="C2")
    middle.set(xlabel="block", ylabel="cosine with the step before (median)")
    right.hist(found["arrival"], bins=np.arange(-0.5, len(layers) + 1.5).tolist(), color="C0")
    right.set(xlabel="block after which the final word is first nearest", ylabel="tokens")
    return figure


def draw_concepts(
    found: dict[str, list[bool]],
    told: dict[str, list[bool]],
    words: np.ndarray,
    layers: tuple[int, ...],
    count: int,
    scored: int,
) -> Figure:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 4.2), layout="constrained", width_ratios=[1.7, 1]
    )
    low, high = (100 * end for end in runs.chance_band(count))
    left.axhspan(low, high, color="0.9", label="guesses (95 %)")
    left.axhline(100 * words.mean(), color="k", ls="--", lw=1, label="bag of words")
    marks = {"mean": "o", "w1mean": "s", "last": "^"}
    for way, mark in marks.items():
        for norm, colour in (("none", "C0"), ("z", "C1")):
            for act, filled in (("identity", True), ("-act", False)):
                if way == "last" and norm == "z":
                    continue
                rates = [100 * np.mean(found[str(runs.Cell(at, act, way, norm))]) for at in layers]
                label = f"{way}, {'no norm' if norm == 'none' else 'z'}" if filled else None
                face = colour if filled else "none"
                left.plot(
                    range(len(layers)),
                    rates,
                    mark + "-",
                    color=colour,
                    mfc=face,
                    ms=5,
                    lw=0.7,
                    label=label,
                )
    left.set_xticks(range(len(layers)), [{0: "E", -1: "top"}.get(at, str(at)) for at in layers])
    top = max(100 * words.mean(), left.get_ylim()[1])
    left.set(xlabel="states after block", ylabel="right (%)", ylim=(10, top + 18))
    left.set_title(
        f"T2, products of vectors, {count} items (hollow: -act(-h), the first token left out)",
        fontsize=10,
    )
    left.legend(frameon=False, fontsize=8, ncol=2)
    names = {
        "cross": "the text itself",
        "top all": "all top states",
        "top mean": "mean of top states",
        "embedding mean": "mean of -act(-E)",
        "bare": "no parameters, E",
    }
    low, high = (100 * end for end in runs.chance_band(scored))
    right.axvspan(low, high, color="0.9")
    for row, (name, label) in enumerate(names.items()):
        middle, ends = runs.share(told[name])
        bar = [[100 * (middle - ends[0])], [100 * (ends[1] - middle)]]
        right.errorbar(100 * middle, row, xerr=bar, fmt="o", color="C0", capsize=3)
        names[name] = label
    right.set_yticks(range(len(names)), list(names.values()))
    right.invert_yaxis()
    right.set(xlabel="right (%), with 95 % bootstrap", xlim=(0, 100))
    right.set_title(f"T1, likelihood behind vectors, {scored} items", fontsize=10)
    return figure


def draw_association(
    found: dict[str, Any], clean: np.ndarray, costs: np.ndarray, mixes: tuple[float, ...]
) -> Figure:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 3.8), layout="constrained", width_ratios=[1.8, 1]
    )
    ends = [runs.resampled(row) for row in costs]
    middle = np.array([one[0] for one in ends])
    bars = np.array([[one[0] - one[1][0], one[1][1] - one[0]] for one in ends]).T
    colours = ["C0" if value < REDUNDANT else "C1" for value in middle]
    left.bar(range(len(middle)), middle, yerr=bars, color=colours, capsize=2)
    left.axhline(REDUNDANT, color="k", ls="--", lw=0.8)
    left.set_yscale("symlog", linthresh=0.1)
    left.set(xlabel="block with a running mean for attention", ylabel="cost (nats a token)")
    left.set_title("one block at a time; dashed: redundant below", fontsize=10)
    line = [clean.mean(), *(np.mean(rows) for rows in found["mixed"])]
    line.append(np.mean(found["all"]["running mean"]))
    right.plot([0, *mixes, 1], np.array(line) - clean.mean(), "o-", label="running mean")
    for name, mark in (("mean by distance", "s"), ("self only", "^")):
        cost = np.mean(found["all"][name]) - clean.mean()
        right.plot([1], [cost], mark, label=name)
    right.set(xlabel="share of other weights, in all blocks", ylabel="cost (nats a token)")
    right.legend(frameon=False, fontsize=8)
    return figure
