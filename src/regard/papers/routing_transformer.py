"""Routing Transformer (arXiv 2003.05997): tokens attend within clusters found by online k-means, in O(n^1.5 d).

Checked here:

* the module against dense attention and against the published rule applied to every prefix;
* multiplications by length and by number of clusters;
* how far the published membership lets later tokens change earlier outputs, and that the prefix rule does not;
* recall over a distance that a window does not bridge: full attention, window, window and routing, window and random clusters;
* a character model with and without routing heads, and how differently its heads look;
* SmolLM2: how much of its strongest attention lies inside clusters of its queries and keys.

Beyond our scale: the perplexities on Wikitext-103, PG-19 and images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from regard.metrics.bootstrap import bootstrap, paired
from regard.papers import Claim, Paper, Run

if TYPE_CHECKING:
    from regard.papers._routing_transformer_runs import Setting

SMOLLM2 = "SmolLM2-135M-Instruct (30 layers, 9 heads; de-quantised Q4_1)"

PAPER = Paper(
    "routing-transformer",
    claims=[
        Claim(
            "exact",
            "Routing with one cluster is dense attention, and the prefix rule is the published one on every prefix:"
            " largest difference",
            setting="not in the paper: a check of the implementation",
            expect="below 1e-9 in float64",
            holds=lambda worst: worst < 1e-9,
        ),
        Claim(
            "slope",
            "Cost grows as n^1.5 with k = sqrt(n) clusters: slope of log multiplications over log tokens",
            setting="O(n^1.5 d)",
            paper="1.5",
            expect="at most 1.65 for both rules of membership",
        ),
        Claim(
            "optimum",
            "k ~ sqrt(n) clusters are cheapest: the best number at 4096 tokens, over powers of 2",
            setting="O(n k d + n^2 d / k)",
            paper="64 (sqrt of 4096)",
            expect="within a factor of 2 of 64",
            holds=lambda best: 32 <= best <= 128,
        ),
        Claim(
            "leak",
            "Published membership lets the future change the past: share of first-half outputs that change with the second half",
            setting="the paper calls the model causal",
            expect="0 % with the prefix rule; above 0 % as published",
            unit=" %",
        ),
        Claim(
            "recall",
            "Routing heads bridge a distance that windows do not: accuracy of recall in percent of full attention's",
            setting="implied by the gain over local attention",
            unit=" %",
            expect="routing at least 80 %, a window alone at chance (within 5 points)",
        ),
        Claim(
            "content",
            "Clusters must follow content: routing above random clusters of equal size, points of recall",
            setting="the paper's random Transformer is worse (Wikitext-103, enwik8)",
            unit=" points",
            expect="interval over seeds above 0",
        ),
        Claim(
            "text",
            "Half of the heads routing instead of local lowers the loss on text: difference to windows alone, bits a character",
            setting="Wikitext-103: 15.8 against 19.8 for local attention alone",
            unit=" bits a character",
            expect="interval below 0",
        ),
        Claim(
            "divergence",
            "Local and routing heads differ more than local heads do: Jensen-Shannon divergence in nats",
            setting="Wikitext-103, by layer",
            expect="local-routing above local-local with every seed",
        ),
        Claim(
            "outside",
            "Tokens that no cluster takes when clusters hold n / k tokens each",
            setting="not in the paper",
            unit=" %",
            expect="10 to 35 %",
            holds=lambda share: 10 <= share <= 35,
        ),
        Claim(
            "coverage",
            "Clusters of a trained model's queries and keys hold its strongest attention: share of the 16 largest weights inside,"
            " middle layers",
            setting="implied: attention is near where query and key are near",
            unit=" %",
            expect="at least twice that of random clusters of equal size",
        ),
        Claim(
            "published",
            "15.8 perplexity on Wikitext-103, 33.2 on PG-19, 3.43 bits a dimension on ImageNet-64",
            setting="10 to 22 layers, 16 heads, 4k to 12k tokens, TPUs",
            paper="15.8; 33.2; 3.43",
            beyond="needs models of 10 or more layers on 4k tokens and more, trained for days",
        ),
    ],
    needs=("matplotlib",),
)


def experiment(run: Run) -> None:
    from regard.nn.routing_attention import RoutingAttention, WholeTextRoutingAttention
    from regard.papers import _routing_transformer_runs as runs

    run.seed(0)
    run.record("exact", here=runs.deviation(), note="40 tokens, 5 clusters of 8, 2 heads")
    counts = _record_cost(run)
    seeds = run.pick(quick=[0], full=[0, 1])
    leaks = {
        name: 100 * float(np.mean([runs.leak(kind, seed) for seed in seeds]))
        for name, kind in (("prefix", RoutingAttention), ("published", WholeTextRoutingAttention))
    }
    run.record(
        "leak",
        here=leaks,
        holds=leaks["prefix"] == 0 and leaks["published"] > 0,
        setting=f"untrained layer of 4 heads (2 routing), 128 tokens, 8 clusters of 16, {len(seeds)} seed(s)",
        note="outputs that move by more than 1e-4 of their norm",
    )
    setting = run.pick(
        quick=runs.Setting(36, 6, 6, steps=3, batch=8, width=32),
        full=runs.Setting(36, 6, 6, steps=RECALL_STEPS, rate=1e-2),
    )
    cases = [(a, s) for s in seeds for a in runs.ARMS if s == 0 or a != "published"]
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in runs.ARMS}
    for arm, seed in run.progress(cases, "recall"):
        run.seed(seed)
        kept = run.partial(
            f"recall/{arm}/{seed}", lambda a=arm, s=seed: runs.recalled(a, setting, s)
        )
        found[arm].append(kept)
    _record_recall(run, setting, found)
    pairs = setting.pairs
    setting = run.pick(
        quick=runs.Setting(64, 16, 4, steps=3, batch=4, width=32, layers=2),
        full=runs.Setting(96, 12, 8, steps=TEXT_STEPS, batch=16, layers=2),
    )
    texts: dict[str, list[dict[str, Any]]] = {"local": [], "routing": []}
    for arm, seed in run.progress([(a, s) for s in seeds for a in texts], "text"):
        run.seed(seed)
        kept = run.partial(f"text/{arm}/{seed}", lambda a=arm, s=seed: runs.written(a, setting, s))
        texts[arm].append(kept)
    _record_text(run, setting, texts)
    caught = run.partial("caught", lambda: _caught(run))
    _record_caught(run, caught)
    run.figure("recall", _draw_recall(found, 100 / pairs))
    run.figure("cost", _draw_cost(counts))
    run.figure("coverage", _draw_coverage(caught))


RECALL_STEPS = 500
TEXT_STEPS = 150


def _record_cost(run: Run) -> dict[str, dict[int, int]]:
    from regard.papers import _routing_transformer_runs as runs

    sizes = run.pick(quick=(256, 1024), full=(256, 1024, 4096))
    counts = {
        rule: {n: runs.products(n, int(n**0.5), rule) for n in sizes}
        for rule in ("published", "prefix")
    }
    slopes = {rule: runs.slope(sizes, list(by.values())) for rule, by in counts.items()}
    run.record(
        "slope",
        here=slopes,
        holds=max(slopes.values()) <= 1.65,
        setting=f"one head of 64 dimensions on random states, {sizes[0]} to {sizes[-1]} tokens",
        note="counted in matrix products (of which half of each triangle is not needed); the prefix rule takes"
        f" {counts['prefix'][sizes[-1]] / counts['published'][sizes[-1]]:.1f} times the published rule's at {sizes[-1]} tokens",
    )
    by_clusters = {k: runs.products(4096, k, "published") for k in (8, 16, 32, 64, 128, 256, 512)}
    best = min(by_clusters, key=lambda k: by_clusters[k])
    run.record(
        "optimum",
        here=best,
        setting="published rule, one head of 64 dimensions",
        note="; ".join(f"k = {k}: {count / 1e6:.0f} M" for k, count in by_clusters.items())
        + "; scores and values both count, so the least lies at sqrt(2 n) = 90",
    )
    return {**counts, "clusters": by_clusters}


def _accuracy(found: dict[str, list[dict[str, Any]]], arm: str) -> list[float]:
    return [100 * one["accuracy"] for one in found[arm]]


def _words(found: dict[str, list[dict[str, Any]]], arms: tuple[str, ...]) -> str:
    return ", ".join(
        f"{arm} {' '.join(f'{value:.0f}' for value in _accuracy(found, arm))}" for arm in arms
    )


def _record_recall(run: Run, setting: Setting, found: dict[str, list[dict[str, Any]]]) -> None:
    chance = 100 / setting.pairs
    learnt = float(np.mean(_accuracy(found, "full"))) > 50  # else there is nothing to compare with
    mean = {arm: float(np.mean(_accuracy(found, arm))) for arm in found}
    where = (
        f"{setting.pairs} pairs (a token each) at the beginning of {setting.length} tokens, their keys at the end,"
        f" window {setting.window},"
        f" {setting.clusters} clusters of {setting.window}; {setting.layers} layers, width {setting.width},"
        f" {setting.heads} heads, {setting.steps} steps of {setting.batch}, {len(found['full'])} seed(s)"
    )
    run.record(
        "recall",
        here={"routing": 100 * mean["routing"] / max(mean["full"], 1e-9), "window": mean["local"]},
        holds=mean["routing"] >= 0.8 * mean["full"] and mean["local"] <= chance + 5
        if learnt
        else None,
        setting=where,
        note=f"accuracy in % by seed: {_words(found, ('full', 'local', 'routing', 'random', 'published'))}; chance {chance:.1f};"
        " the model of published membership decoded token by token: "
        + " ".join(f"{100 * one['stepwise']:.0f}" for one in found["published"]),
    )
    lead = paired(_accuracy(found, "routing"), _accuracy(found, "random"))
    known = lead.n > 1 and learnt
    run.record(
        "content",
        here=lead.mean,
        interval=(lead.low, lead.high) if known else None,
        holds=lead.low > 0 if known else None,
        setting=where,
        note="interval: bootstrap over seeds, which are few"
        if known
        else "undecided: one seed, or full attention itself has not learnt the task",
    )
    outside = [100 * one["outside"] for one in found["routing"]]
    run.record(
        "outside",
        here=float(np.mean(outside)),
        interval=(min(outside), max(outside)),
        setting=f"trained on recall, prefix rule; {where}",
        note="share of tokens and routing heads; interval: range over seeds; random clusters"
        f" {100 * np.mean([one['outside'] for one in found['random']]):.0f} %, published membership"
        f" {100 * np.mean([one['outside'] for one in found['published']]):.0f} %",
    )


def _record_text(run: Run, setting: Setting, texts: dict[str, list[dict[str, Any]]]) -> None:
    bit = np.log(2)
    by_seed = [
        paired(one["nats"], other["nats"])
        for one, other in zip(texts["routing"], texts["local"], strict=True)
    ]
    lead = [float(one.mean / bit) for one in by_seed]
    whole = bootstrap(lead)
    known = whole.n > 1
    where = (
        f"windows of {setting.length} characters of Python's reference, window {setting.window}, {setting.clusters} clusters;"
        f" {setting.layers} layers, width {setting.width}, {setting.steps} steps of {setting.batch}, {len(lead)} seed(s)"
    )
    run.record(
        "text",
        here=whole.mean,
        interval=(whole.low, whole.high) if known else None,
        holds=whole.high < 0 if known else None,
        setting=where,
        note=("interval: bootstrap over seeds, which are few; " if known else "one seed; ")
        + "; ".join(
            f"seed {i}: {value:+.3f} [{one.low / bit:+.3f}, {one.high / bit:+.3f}] over windows"
            for i, (value, one) in enumerate(zip(lead, by_seed, strict=True))
        )
        + f"; windows alone {np.mean([np.mean(one['nats']) for one in texts['local']]) / bit:.3f} bits",
    )
    names = ("local, local", "local, routing", "routing, routing")
    table = {name: [one[name] for one in texts["routing"]] for name in names}
    run.record(
        "divergence",
        here={name: float(np.mean(values)) for name, values in table.items()},
        holds=all(
            a > b for a, b in zip(table["local, routing"], table["local, local"], strict=True)
        ),
        setting=where,
        note="rows in which both heads attend; ln 2 = 0.69 is the most there can be; tokens in no cluster "
        f"{100 * np.mean([one['outside'] for one in texts['routing']]):.0f} %; smallest cluster"
        f" {np.mean([one['smallest cluster'] for one in texts['routing']]):.2f} of an even share",
    )


def _caught(run: Run) -> dict[str, list[Any]]:
    import torch

    from regard.papers import _routing_transformer_runs as runs
    from regard.texts import default_text, prose

    model, tokens = run.model(), run.pick(quick=96, full=512)
    layers = run.pick(quick=(3, 15), full=tuple(range(1, 30, 3)))
    ids = [
        torch.tensor(model.tokenizer(text)["input_ids"][:tokens])
        for text in (prose(8 * tokens), default_text(n_tokens=2 * tokens))
    ]
    clusters = run.pick(quick=8, full=16)
    return {"layer": list(layers), **runs.caught(model, ids[0], ids[1], clusters, layers)}


def _record_caught(run: Run, caught: dict[str, list[Any]]) -> None:
    layers = np.array(caught["layer"])
    middle = (layers >= 10) & (layers < 20)
    mean = {
        name: float(np.mean(np.array(values)[middle]))
        for name, values in caught.items()
        if name != "layer"
    }
    run.record(
        "coverage",
        here={name: 100 * mean[name] for name in ("routing", "random", "local")},
        holds=mean["routing"] >= 2 * mean["random"],
        setting=f"{SMOLLM2}, {run.pick(quick=96, full=512)} tokens, {run.pick(quick=8, full=16)} clusters of another text",
        note=f"layers 10 to 19, rows from 64 on; without the first key: routing {100 * mean['routing, no sink']:.0f} %,"
        f" random {100 * mean['random, no sink']:.0f} %, local {100 * mean['local, no sink']:.0f} %; keys a query:"
        f" routing and local {mean['keys a query']:.0f}, random {mean['keys a query, random']:.0f};"
        " queries and keys after their rotary turn, each with clusters of its own tokens (not shared)",
    )


def _draw_recall(found: dict[str, list[dict[str, Any]]], chance: float) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for i, (arm, several) in enumerate(found.items()):
        losses = np.mean([one["losses"] for one in several], 0)
        span = max(1, len(losses) // 30)
        axes[0].plot(np.convolve(losses, np.ones(span) / span, "valid"), label=arm, color=f"C{i}")
        axes[1].plot(
            [i] * len(several), _accuracy(found, arm), "o", color=f"C{i}", alpha=0.7, clip_on=False
        )
    axes[0].set(xlabel="step", ylabel="loss, nats an answer (mean over seeds)", ylim=(0, None))
    axes[0].legend(frameon=False)
    axes[1].set_xticks(range(len(found)), list(found))
    axes[1].axhline(chance, color="grey", lw=0.8, ls=":")
    axes[1].set(ylabel="accuracy on far pairs, % (a dot a seed)", ylim=(0, 100))
    return figure


def _draw_cost(counts: dict[str, dict[int, int]]) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for rule in ("published", "prefix"):
        axes[0].loglog(list(counts[rule]), list(counts[rule].values()), "o-", label=f"{rule} rule")
    sizes = np.array(list(counts["published"]))
    axes[0].loglog(sizes, 2 * 64 * sizes.astype(float) ** 2, color="grey", ls=":", label="dense")
    axes[0].set(xlabel="tokens", ylabel="multiplications of a head", title="sqrt(n) clusters")
    axes[0].legend(frameon=False)
    by = counts["clusters"]
    axes[1].loglog(list(by), list(by.values()), "o-", base=2)
    axes[1].axvline(64, color="grey", lw=0.8, ls=":")
    axes[1].set_yscale("log", base=10)
    axes[1].set(xlabel="clusters", ylabel="multiplications of a head", title="4096 tokens")
    return figure


def _draw_coverage(caught: dict[str, list[Any]]) -> Any:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for ax, end, title in zip(
        axes, ("", ", no sink"), ("all keys", "without the first key"), strict=True
    ):
        for name in ("routing", "random", "local"):
            ax.plot(caught["layer"], 100 * np.array(caught[name + end]), "o-", ms=3, label=name)
        ax.set(xlabel="layer", title=title, ylim=(0, 100))
    axes[0].set_ylabel("% of the 16 strongest weights caught")
    axes[0].legend(frameon=False)
    return figure
