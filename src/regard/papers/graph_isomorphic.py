"""Graph-aware isomorphic attention (arXiv 2501.02393): GIN- and PNA-Attention, and Sparse-GIN to fine-tune a frozen model.

Checked here:

* identities of the layers, where a sparse graph has an edge, and which layers can count neighbours;
* byte models of equal numbers of parameters on so little text that they overfit: held-out loss, when it is lowest, the gap;
* a frozen byte model of English adapted to programs, and SmolLM2 to word problems with solutions: Sparse-GIN, the same with
  self-loops alone (what the released code computes), and LoRA, with equal numbers of trained parameters;
* how sparse the graphs of SmolLM2 are.

What the comparisons leave open: GIN has dropout inside its networks, as published, and the reference has none, so that a smaller
gap and a later minimum may be dropout's; Sparse-GIN was still falling at the highest rate and got few steps.

Beyond our scale: protein sequences with 25M parameters, a model of 3B parameters.
Not done here: scores from a network, differential attention, learnt thresholds.
"""

from __future__ import annotations

from functools import cache, partial
from statistics import fmean
from typing import Any

import torch

from regard import texts
from regard.metrics.bootstrap import Estimate, bootstrap
from regard.papers import Claim, Paper, Run
from regard.papers import _graph_isomorphic_runs as runs
from regard.papers._graph_isomorphic_figures import draw_adapting, draw_graphs, draw_training
from regard.papers._graph_isomorphic_runs import ARMS, Courses, Size, best_rate, course, gaps

SIZE = Size()
GINS = [name for name in ARMS if name.startswith("GIN")]
BEST = "GIN 0.5"
RATES = (1e-3, 3e-3, 1e-2)
SMALL = (9, 6)
"""Hidden width of Sparse-GIN and rank of LoRA on queries and values, for the byte model: 1152 parameters a layer both."""
SMALL_STEPS, LARGE_STEPS = 60, 10
SMOLLM2_RATES = (1e-3, 4e-3)
SMOLLM2 = (12, 8)
"""The same for SmolLM2: 15303 and 15360 parameters a layer."""
PROBLEMS = ((400, 1), (8, 2))
"""Number and seed of the word problems to train on and to judge by."""

PAPER = Paper(
    "graph-isomorphic",
    claims=[
        Claim(
            "exact",
            "GIN with an identity for its network is A x, PNA's mean is its sum, a product is a scatter: largest difference",
            setting="follows from the equations; float64",
            paper="equal",
            expect="below 1e-12",
            holds=lambda worst: worst < 1e-12,
        ),
        Claim(
            "edges",
            "A sparse graph has an edge exactly where the heads' attention is above 0.1 + log(1.5) / 10: pairs on the wrong side",
            setting="sigmoid of slope 10 at 0.1, kept above 0.6",
            paper="0",
            expect="0",
            holds=lambda wrong: wrong == 0,
        ),
        Claim(
            "counting",
            "The sum of GIN tells how many equal neighbours a token has: how far apart 2 and 4 of them are",
            setting="the paper's reason for GIN is that it tells graphs apart as well as the Weisfeiler-Lehman test",
            paper="told apart",
            expect="with softmaxed weights, which the best model of the paper has, above 1e-6",
        ),
        Claim(
            "perplexity",
            "GIN-Attention, m = 0.5, has a lower held-out loss than the reference of equal size: reference less GIN, lowest each",
            setting="protein sequences, 25M parameters, perplexity",
            paper="lowest of all",
            unit=" nats a byte",
            expect="lower end of the interval above 0",
        ),
        Claim(
            "variants",
            "All variants of GIN but one beat the reference: variants with a lower mean",
            setting="the same",
            paper="all but one",
            expect=f"at least {len(GINS) - 1} of {len(GINS)}",
            holds=lambda count: count >= len(GINS) - 1,
        ),
        Claim(
            "pna",
            "No PNA variant beats the reference: lowest held-out loss of PNA less the reference's",
            setting="the same, with a maximum that returns the token's own value; here it is that of the neighbours",
            paper="above 0",
            unit=" nats a byte",
            expect="lower end of the interval above 0",
        ),
        Claim(
            "width",
            "Wider networks in the heads are worse: held-out loss at m = 4 less that at m = 0.5",
            setting="m in 0.5, 1, 2, 4",
            paper="above 0, a power law",
            unit=" nats a byte",
            expect="lower end of the interval above 0",
        ),
        Claim(
            "gap",
            "GIN overfits less: gap between held-out and training loss at the end, the reference's less that of GIN, m = 0.5",
            setting="after 9 epochs; the reference's is the largest",
            paper="above 0",
            unit=" nats a byte",
            expect="lower end of the interval above 0",
        ),
        Claim(
            "minimum",
            "GIN's held-out loss is lowest later than the reference's: epochs later",
            setting="minimum at epoch 8 against 5",
            paper="3 epochs",
            unit=" epochs",
            expect="above 0 on average",
            holds=lambda later: later > 0,
        ),
        Claim(
            "alpha",
            "The sharpening alpha takes a value of its own in each layer, around 1",
            setting="GIN-Attention",
            paper="around 1",
            expect="all in 0.5 to 2, and layers that differ by 0.02 or more on average",
        ),
        Claim(
            "lora",
            "Sparse-GIN reaches a lower held-out loss than LoRA of equal size: LoRA less GIN, each at its best rate",
            setting="Llama-3.2-3B-Instruct, math problems",
            paper="above 0",
            unit=" nats a byte",
            expect="lower end of the interval above 0",
        ),
        Claim(
            "course",
            "It is ahead at every moment of the training: moments at which Sparse-GIN has the lower held-out loss",
            setting="every epoch",
            paper="all",
            expect="all",
        ),
        Claim(
            "neighbours",
            "The gain is the graph's: held-out loss with self-loops alone less that with all edges, each at its best rate",
            setting="not in the paper, whose released code keeps self-loops alone",
            unit=" nats a byte",
            expect="lower end of the interval above 0",
        ),
        Claim(
            "smollm2",
            "Sparse-GIN reaches a lower held-out loss than LoRA on SmolLM2: LoRA less GIN, each at its best rate",
            setting="Llama-3.2-3B-Instruct, math problems, 3 epochs",
            paper="above 0",
            unit=" nats a token",
            expect="lower end of the interval above 0",
        ),
        Claim(
            "smollm2-neighbours",
            "There too the gain is the graph's: held-out loss with self-loops alone less that with all edges",
            setting="not in the paper",
            unit=" nats a token",
            expect="lower end of the interval above 0",
        ),
        Claim(
            "falls",
            "The scales lambda fall at first: their mean change in the first quarter of the training",
            setting="Llama-3.2-3B-Instruct",
            paper="below 0",
            expect="below 0",
            holds=lambda change: change < 0,
        ),
        Claim(
            "depth",
            "The scales move apart by depth: rank correlation of their whole change and the layer",
            setting="smallest in early, largest in deep layers; they start in this order",
            paper="above 0",
            expect="above 0.3",
            holds=lambda correlation: correlation > 0.3,
        ),
        Claim(
            "sparse",
            "The graphs of a pretrained model are sparse: mean share of pairs with an edge",
            setting="Llama-3.2-3B-Instruct; the paper gives no number",
            unit=" %",
            expect="below 20 %",
            holds=lambda share: share < 20,
        ),
        Claim(
            "proteins",
            "Perplexities on protein sequences with secondary structure, 25M parameters",
            setting="5000 sequences and more, 9 epochs",
            paper="GIN lowest",
            beyond="neither the data nor the hours of training are at hand",
        ),
        Claim(
            "llama",
            "Fine-tuning of Llama-3.2-3B on math problems in 3 epochs",
            setting="length 1024, g = 155",
            paper="threshold of about 0.2",
            beyond="a model of 3B parameters does not train in minutes on two cores",
        ),
    ],
    needs=("matplotlib", "peft"),
)


def experiment(run: Run) -> None:
    run.seed(0)
    identities(run)
    size = run.pick(
        quick=Size(width=24, length=16, train=256, held_out=256, epochs=2, every=1), full=SIZE
    )
    seeds = run.pick(quick=[0], full=[0, 1, 2])
    fits = trained(run, size, seeds)
    record_fits(run, size, fits)
    small = adapted(run, size, seeds)
    large = smollm2(run)
    if not run.quick:
        record_small(run, size, small)
        record_smollm2(run, large)
    shapes = sparse(run)
    run.figure("training", draw_training(size, fits))
    run.figure("adapting", draw_adapting(small, large))
    run.figure("graphs", draw_graphs(shapes, large))


def identities(run: Run) -> None:
    worst, wrong = runs.exact_differences()
    run.record("exact", here=worst)
    run.record("edges", here=wrong, setting="50 graphs of 30 tokens and 4 heads: 45000 pairs")
    apart = runs.counting()
    run.record(
        "counting",
        here={name: round(value, 6) for name, value in apart.items()},
        holds=apart["GIN, softmax"] > 1e-6,
        setting="untrained layers in float64, equal scores; the last tokens of `a b` and `a b a b`",
        note="rows of a softmax sum to 1, so that a sum over neighbours is their mean; other edges (`adjacency`) count",
    )


def trained(run: Run, size: Size, seeds: list[int]) -> dict[str, list[dict[str, Any]]]:
    """What `fit` found, by arm and seed."""
    arms = run.pick(quick=["reference", BEST], full=list(ARMS))
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for arm, seed in run.progress([(a, s) for s in seeds for a in arms], "byte models"):
        run.seed(seed)
        kept = run.partial(f"fit/{arm}/{seed}", lambda a=arm, s=seed: runs.fit(a, s, size))
        found[arm].append(kept)
    return found


def lowest(results: list[dict[str, Any]]) -> list[float]:
    return [min(one["held out"]) for one in results]


def epochs(size: Size, results: list[dict[str, Any]]) -> list[int]:
    """When the held-out loss was lowest."""
    return [size.every * (1 + one["held out"].index(min(one["held out"]))) for one in results]


def less(left: list[float], right: list[float]) -> Estimate:
    """The mean of paired differences."""
    return bootstrap([a - b for a, b in zip(left, right, strict=True)])


def record_fits(run: Run, size: Size, found: dict[str, list[dict[str, Any]]]) -> None:
    if run.quick:
        return
    plain, seeds = found["reference"], len(found["reference"])
    counts = [one[0]["parameters"] for one in found.values()]
    where = (
        f"{size.layers} layers of width {size.width}, {min(counts)} to {max(counts)} parameters, {size.train} bytes of English,"
        f" {size.epochs} epochs, AdamW at {size.rate:g} (chosen for the reference alone), held out {size.held_out} bytes,"
        f" {seeds} seeds"
    )
    best = {arm: fmean(lowest(results)) for arm, results in found.items()}
    listed = ", ".join(f"{arm} {loss:.3f}" for arm, loss in best.items())
    between = "the interval is lowest and highest seed"
    for claim, left, right in (
        ("perplexity", "reference", BEST),
        ("pna", "PNA", "reference"),
        ("width", "GIN 4", BEST),
    ):
        lead = less(lowest(found[left]), lowest(found[right]))
        run.record(
            claim,
            here=round(lead.mean, 3),
            interval=(round(lead.low, 3), round(lead.high, 3)),
            holds=lead.low > 0,
            setting=where,
            note=f"lowest held-out loss, mean over seeds: {listed}; {between}",
        )
    ahead = sum(best[arm] < best["reference"] for arm in GINS)
    run.record("variants", here=ahead, setting=where, note=f"of {len(GINS)}: {listed}")
    lead = less(gaps(plain), gaps(found[BEST]))
    run.record(
        "gap",
        here=round(lead.mean, 3),
        interval=(round(lead.low, 3), round(lead.high, 3)),
        holds=lead.low > 0,
        setting=where,
        note="gap at the end: "
        + ", ".join(f"{arm} {fmean(gaps(results)):.2f}" for arm, results in found.items())
        + f"; {between}",
    )
    when = {arm: epochs(size, results) for arm, results in found.items()}
    run.record(
        "minimum",
        here=round(fmean(when[BEST]) - fmean(when["reference"]), 1),
        setting=where,
        note="epoch of the lowest loss by seed: "
        + "; ".join(f"{arm} {', '.join(map(str, row))}" for arm, row in when.items()),
    )
    alphas = [one["alpha"] for arm in GINS for one in found[arm]]
    spread = fmean(max(row) - min(row) for row in alphas)
    low, high = min(map(min, alphas)), max(map(max, alphas))
    run.record(
        "alpha",
        here={"smallest": round(low, 3), "largest": round(high, 3), "spread": round(spread, 3)},
        holds=low >= 0.5 and high <= 2 and spread >= 0.02,
        setting=where,
        note=f"over {len(alphas)} models of GIN; spread is largest less smallest layer, mean over models",
    )


def adapted(run: Run, size: Size, seeds: list[int]) -> Courses:
    """The byte model of English to programs."""
    steps = run.pick(quick=2, full=SMALL_STEPS)
    text = runs.bytes_of(texts.code(60_000))
    rows, unseen = (
        runs.windows(part, size.length) for part in (text[: -size.held_out], text[-size.held_out :])
    )
    arms = runs.adapters(*SMALL)
    rates = run.pick(quick=RATES[1:2], full=RATES)
    found: Courses = {arm: {rate: [] for rate in rates} for arm in arms}
    for seed in run.progress(seeds, "adapting byte models"):
        run.seed(seed)
        base = cache(partial(runs.base_model, size, run.pick(quick=2, full=300), seed))

        def measure(arm: str, rate: float, seed: int = seed, base: Any = base) -> dict[str, Any]:
            options: dict[str, Any] = {"rate": rate, "steps": steps, "every": max(1, steps // 4)}
            return runs.adapt(
                base(), arms[arm], rows, unseen, batch=size.batch, seed=seed, **options
            )

        for arm in arms:
            for rate in rates:
                kept = run.partial(f"adapt/{arm}/{rate}/{seed}", partial(measure, arm, rate))
                found[arm][rate].append(kept)
    return found


def smollm2(run: Run) -> Courses:
    """SmolLM2 to word problems; one seed."""
    if run.quick:
        return {}
    length, batch = 64, 2
    arms = runs.adapters(*SMOLLM2)
    found: Courses = {arm: {} for arm in arms}
    cases = [(arm, rate) for arm in arms for rate in SMOLLM2_RATES]
    for arm, rate in run.progress(cases, "adapting SmolLM2"):
        run.seed(0)

        def measure(arm: str = arm, rate: float = rate) -> dict[str, Any]:
            model = run.model()
            train, unseen = (runs.problems(model.tokenizer, n, length, s) for n, s in PROBLEMS)
            options: dict[str, Any] = {
                "rate": rate,
                "steps": LARGE_STEPS,
                "every": LARGE_STEPS // 2,
            }
            return runs.adapt(model, arms[arm], train, unseen, batch=batch, seed=0, **options)

        found[arm][rate] = [run.partial(f"smollm2/{arm}/{rate}", measure)]
    return found


def final(results: list[dict[str, Any]]) -> list[float]:
    """Held-out loss at the end, by seed."""
    return [fmean(one["losses"][-1]) for one in results]


def arms_in_words(found: Courses) -> str:
    return "; ".join(
        f"{arm} "
        + ", ".join(f"{course(results)[-1]:.3f} at {rate:g}" for rate, results in rates.items())
        for arm, rates in found.items()
    )


def record_small(run: Run, size: Size, found: Courses) -> None:
    top = {arm: found[arm][best_rate(found[arm])] for arm in found}
    counts = ", ".join(f"{arm} {results[0]['parameters']}" for arm, results in top.items())
    start = course(top["LoRA"])[0]
    where = (
        f"a byte model of {size.layers} layers of width {size.width}, trained 300 steps on English and frozen; {SMALL_STEPS}"
        f" steps of {size.batch} x {size.length} bytes of Python; trained parameters: {counts}; {len(top['LoRA'])} seeds"
    )
    note = f"held-out loss before {start:.3f}, after: {arms_in_words(found)}; the interval is lowest and highest seed"
    for claim, arm in (("lora", "LoRA"), ("neighbours", "self-loops")):
        lead = less(final(top[arm]), final(top["neighbours"]))
        run.record(
            claim,
            here=round(lead.mean, 3),
            interval=(round(lead.low, 3), round(lead.high, 3)),
            holds=lead.low > 0,
            setting=where,
            note=note,
        )
    moments = list(zip(course(top["neighbours"])[1:], course(top["LoRA"])[1:], strict=True))
    ahead = sum(gin < low_rank for gin, low_rank in moments)
    run.record(
        "course",
        here=ahead,
        holds=ahead == len(moments),
        setting=where,
        note=f"of {len(moments)}, mean over seeds (Sparse-GIN and LoRA): "
        + ", ".join(f"{gin:.3f} and {low_rank:.3f}" for gin, low_rank in moments),
    )


def record_smollm2(run: Run, found: Courses) -> None:
    top = {arm: found[arm][best_rate(found[arm])][0] for arm in found}
    counts = ", ".join(f"{arm} {one['parameters']}" for arm, one in top.items())
    windows = len(top["LoRA"]["losses"][0])
    where = (
        f"SmolLM2-135M-Instruct (4-bit weights) on arithmetic word problems with solutions, {LARGE_STEPS} steps of 2 x 64"
        f" tokens, held out {windows} windows; trained parameters: {counts}; one seed"
    )
    note = (
        f"held-out loss before {fmean(top['LoRA']['losses'][0]):.3f}, after: {arms_in_words(found)}; Sparse-GIN starts from"
        f" {fmean(top['neighbours']['losses'][0]):.3f}, because its lambda does not start at 0; the interval is over windows"
    )
    for claim, arm in (("smollm2", "LoRA"), ("smollm2-neighbours", "self-loops")):
        lead = less(top[arm]["losses"][-1], top["neighbours"]["losses"][-1])
        run.record(
            claim,
            here=round(lead.mean, 3),
            interval=(round(lead.low, 3), round(lead.high, 3)),
            holds=lead.low > 0,
            setting=where,
            note=note,
        )
    scales = torch.tensor(top["neighbours"]["scales"])
    early, whole = scales[LARGE_STEPS // 4] - scales[0], scales[-1] - scales[0]
    run.record(
        "falls",
        here=round(float(early.mean()), 4),
        setting=where,
        note="mean lambda by step: " + ", ".join(f"{row.mean():.4f}" for row in scales),
    )
    ranks = torch.stack([whole.argsort().argsort(), torch.arange(len(whole))]).double()
    third = len(whole) // 3
    run.record(
        "depth",
        here=round(float(torch.corrcoef(ranks)[0, 1]), 2),
        setting=where,
        note=f"mean change in the first third of the layers {whole[:third].mean():+.4f}, in the last"
        f" {whole[-third:].mean():+.4f}; lambda ends at {scales[-1, 0]:.3f} in the first layer, {scales[-1, -1]:.3f} in the last",
    )


def sparse(run: Run) -> list[dict[str, float]]:
    """The graphs of SmolLM2."""
    if run.quick:
        return []
    tokens = 256

    def measure() -> list[dict[str, float]]:
        model = run.model()
        ids = model.tokenizer(texts.prose(4000), return_tensors="pt")["input_ids"]
        return runs.graphs(model, ids[:, :tokens])

    layers = run.partial("graphs", measure)
    mean = {name: fmean(layer[name] for layer in layers) for name in layers[0]}
    shares = [100 * layer["density"] for layer in layers]
    run.record(
        "sparse",
        here=round(100 * mean["density"], 2),
        interval=(round(min(shares), 2), round(max(shares), 2)),
        setting=f"SmolLM2-135M-Instruct (4-bit weights), {tokens} tokens of English, {len(layers)} layers",
        note=f"{mean['degree']:.1f} edges into a token; of all edges {100 * mean['loops']:.0f} % are self-loops, and"
        f" {100 * mean['to the first token']:.0f} % come from the first token; mean distance {mean['distance']:.0f} tokens;"
        " the interval is lowest and highest layer",
    )
    return layers
