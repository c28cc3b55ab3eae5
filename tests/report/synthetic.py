"""A made-up report with the shape of a real one: SmolLM2-like heads, a long English text, every panel."""

from __future__ import annotations

import pydoc_data.topics
import re

import numpy as np

from regard.report.definitions import definition, measure
from regard.report.schema import (
    Budget,
    BudgetLevel,
    DomainRow,
    DomainTable,
    DormantSet,
    DosePoint,
    Finding,
    HeadCard,
    Header,
    Intervention,
    MaskingPoint,
    Measure,
    Probe,
    Proof,
    ReportData,
    Retrieval,
    RetrievalHead,
    Sequence,
    Skyline,
    Stack,
    TopKey,
    Writer,
    pool_levels,
)

BLOCKS = 64
COMMAND = "regard report smollm2 --text gardens.txt --seed 0"


def words(count: int) -> list[str]:
    """`count` token-like pieces of English prose (pieces of words, leading spaces kept)."""
    prose = " ".join(text for text in pydoc_data.topics.topics.values() if len(text) > 2000)
    pieces = re.findall(r"\n+| ?[A-Za-z]{1,6}|[A-Za-z]{1,6}| ?\d|[^\w\s]| +", prose)
    while len(pieces) < count:
        pieces = pieces + pieces
    return pieces[:count]


def head_name(flat: int, heads: int) -> str:
    return f"L{flat // heads}H{flat % heads}"


def top(values: np.ndarray, count: int) -> list[int]:
    return np.argsort(-np.nan_to_num(values).ravel())[:count].tolist()


def shares(rng: np.random.Generator, layers: int, heads: int) -> dict[str, np.ndarray]:
    """Sink, previous-token, induction, local and uniform shares of each head."""
    depth = np.linspace(0, 1, layers)[:, None]
    sink = np.clip(
        rng.beta(1.1, 0.9, (layers, heads)) * (0.25 + 1.5 * depth * (1.25 - depth)), 0, 0.97
    )
    sink[:2] *= 0.1
    previous = rng.beta(0.35, 6, (layers, heads)) * (1 - sink)
    induction = rng.beta(0.3, 9, (layers, heads)) * (depth > 0.25) * (1 - sink)
    for layer, head, value in ((3, 2, 0.78), (5, 7, 0.52), (2, 1, 0.44)):
        if layer < layers and head < heads:
            sink[layer, head], previous[layer, head] = 0.06, value
    for share, head, value in ((0.55, 3, 0.58), (0.6, 6, 0.49), (0.75, 2, 0.41)):
        layer = int(share * layers)
        sink[layer, head % heads], induction[layer, head % heads] = 0.21, value
    rest = 1 - sink - previous - induction
    local = rest * rng.beta(1.4 - 0.6 * depth, 1.6, (layers, heads))
    return {
        "sink": sink,
        "previous_token": previous,
        "induction": induction,
        "local": local + previous,
        "rest": np.clip(rest - local, 0, 1),
    }


def pooled_map(rng: np.random.Generator, part: dict[str, float], columns: np.ndarray) -> np.ndarray:
    """Block-to-block shares of one head with these parts; `columns` are the texts' attractive blocks."""
    n = BLOCKS
    i, j = np.indices((n, n))
    visible = j <= i
    near = np.exp(-(i - j) / 1.6) * visible
    far = (columns[None, :] * rng.lognormal(0, 0.25, (n, n))) * visible
    copy = np.exp(-(((i - j) - n // 3) ** 2) / 1.5) * visible + 1e-9 * visible
    grid = np.zeros((n, n))
    grid[:, 0] += part["sink"]
    for name, weight in (("local", near), ("rest", far), ("induction", copy)):
        grid += part[name] * weight / weight.sum(1, keepdims=True)
    grid *= rng.lognormal(0, 0.06, (n, n))
    return grid / grid.sum(1, keepdims=True)


def make_measures(
    rng: np.random.Generator, part: dict[str, np.ndarray], tokens: int, sampled: bool
) -> list[Measure]:
    sink, layers = part["sink"], part["sink"].shape[0]
    shape = sink.shape
    spread = (1 - sink) * (0.35 + 0.6 * part["rest"])
    distance = 3 + tokens * 0.5 * (sink + 0.55 * part["rest"]) * rng.lognormal(0, 0.1, shape)
    drain = np.clip(0.19 + 0.1 * rng.standard_normal(shape) + 0.6 * (sink < 0.1), 0.02, None)
    norm = (
        np.exp(0.4 * rng.standard_normal(shape))
        * (1.15 - sink)
        * np.linspace(1, 6, layers)[:, None]
    )
    ablation = 0.004 * rng.standard_normal(shape) + 0.03 * (part["induction"] > 0.3)
    ablation[0] += np.abs(0.08 * rng.standard_normal(shape[1]))
    retrieval = np.where(part["induction"] > 0.12, part["induction"] * rng.beta(4, 3, shape), 0.0)
    values = {
        "sink": sink,
        "entropy": spread * np.log(tokens),
        "entropy_normalised": spread,
        "distance": distance,
        "waad": 10 * np.clip(sink + 0.9 * part["rest"] + 0.25 * part["local"], 0, 1),
        "fai": (1 - part["local"]) / tokens * rng.lognormal(0, 0.3, shape),
        "local": part["local"],
        "global": part["rest"] + part["induction"],
        "uniform": np.clip(spread * 0.7, 0, 1),
        "previous_token": part["previous_token"],
        "duplicate_token": part["induction"] * 0.3 * rng.random(shape),
        "induction": part["induction"],
        "retrieval": retrieval,
        "drain": drain,
        "output_norm": norm,
        "ablation": ablation,
        "dormant_sink": np.clip(sink + 0.05 * rng.standard_normal(shape), 0, 1),
        "dormant_output": norm / np.median(norm, axis=1, keepdims=True),
    }
    rows = (
        "sink",
        "entropy",
        "entropy_normalised",
        "distance",
        "waad",
        "local",
        "global",
        "uniform",
    )
    return [
        measure(key, value, np.abs(value) * 0.01 + 0.001 if sampled and key in rows else None)
        for key, value in values.items()
    ]


def make_sequence(rng: np.random.Generator, tokens: list[str], layers: int) -> Sequence:
    n = len(tokens)
    base = rng.lognormal(-0.4, 0.9, n) / n
    marks = np.array([t.strip() in {".", ",", ":", ";"} or "\n" in t for t in tokens])
    base[marks] *= 6
    received = np.tile(base, (layers, 1)) * rng.lognormal(0, 0.55, (layers, n))
    sinks = [0, *sorted({int(n * s) for s in (0.07, 0.31)} if n > 40 else set())]
    received[:, sinks[0]] = np.linspace(0.03, 0.55, layers)
    for position in sinks[1:]:
        received[layers // 3 :, position] += 0.06
    t = np.arange(n)
    waad = 4.6 + 1.6 * np.sin(t / 7.3) * (0.6 + 0.4 * np.sin(t / 61)) + 0.7 * rng.standard_normal(n)
    waad = np.minimum(np.clip(waad, 0.1, 9.8), t)
    fai = base * n * rng.lognormal(0, 0.3, n) / max(n, 100)
    peaks = [i for i in range(2, n - 1) if waad[i] > 6.2 and waad[i] == waad[i - 2 : i + 2].max()]
    anchors = np.sort(np.argsort(-fai)[: max(1, n // 40)]).tolist()
    return Sequence(
        tokens=tokens,
        received=received.mean(0),
        received_by_layer=received,
        waad=waad,
        fai=fai,
        entropy=0.3 + 0.25 * np.sin(t / 90) + 0.05 * rng.standard_normal(n),
        surprisal=rng.gamma(1.2, 2.0, n),
        sinks=sinks,
        anchors=anchors,
        peaks=peaks,
    )


def make_skyline(rng: np.random.Generator, layers: int) -> Skyline:
    sites = layers + 1
    peak = 3 + 2 * rng.random(sites)
    start, stop = max(1, layers // 10), layers - 1
    peak[start + 1 : stop + 1] = 4000 + np.cumsum(600 * rng.random(stop - start))
    if layers > 12:
        peak[13 : stop + 1] += 12000
    mlp = 30 * rng.standard_normal(layers)
    if layers > 3:
        mlp[start], mlp[layers - 1] = 4100, -21000
    if layers > 12:
        mlp[12] = 12300
    return Skyline(
        peak=peak,
        median=0.2 + 0.03 * np.arange(sites),
        peak_token=np.where(peak > 1000, 0, rng.integers(1, 40, sites)),
        peak_dimension=np.where(peak > 1000, 314, rng.integers(0, 576, sites)),
        first_norm=peak * 1.05,
        median_norm=8.0 + 6.0 * np.arange(sites),
        token=0,
        dimension=314,
        attention_write=18 * rng.standard_normal(layers),
        mlp_write=mlp,
        writers=[
            Writer("mlp.3.n1171", 3980.0, 0.97),
            Writer("mlp.12.n842", 9120.0, 0.74),
            Writer("mlp.12.n77", 2240.0, 0.18),
            Writer("mlp.29.n1402", -19850.0, 0.94),
        ],
        dose=[
            DosePoint(float(cap), delta, delta - 0.04 - 0.1 * delta, delta + 0.04 + 0.1 * delta)
            for cap, delta in (
                (20000, 0.0), (10000, 0.01), (5000, 0.05), (2000, 0.31), (1000, 0.9), (300, 2.2), (0, 3.6),
            )
        ],
    )  # fmt: skip


def make_retrieval(rng: np.random.Generator, score: np.ndarray, heads: int) -> Retrieval:
    best = [i for i in top(score, 12) if score.ravel()[i] > 0.02]
    points = ((1, 0.78), (2, 0.55), (5, 0.3), (10, 0.11), (20, 0.02))
    return Retrieval(
        runs=120,
        answered=93,
        threshold=0.1,
        heads=[
            RetrievalHead(head_name(i, heads), float(score.ravel()[i]), float(rng.beta(5, 2)), 0.02)
            for i in best
        ],
        base_recall=0.94,
        masking=[MaskingPoint(k, v, 0.95 - 0.012 * k, 0.9 - 0.02 * k, 0.99) for k, v in points],
        control_label="8 random draws, matched by layer",
    )


def make_budget(sequence: Sequence) -> Budget:
    mass = sequence.received_by_layer
    assert mass is not None
    order = np.argsort(np.argsort(-mass, axis=1), axis=1)
    levels = []
    for fraction, delta in ((0.1, 0.41), (0.2, 0.16), (0.5, 0.012)):
        kept = (order < max(1, round(fraction * mass.shape[1]))).astype(float)
        retained = (mass * kept).sum(1) / mass.sum(1)
        levels.append(
            BudgetLevel(fraction, kept, retained, delta, delta * 0.8, delta * 1.2 + 0.004)
        )
    return Budget("received mass (H2O-like)", levels, bytes_per_token=46080)


def proof(label: str, effect: float, rng: np.random.Generator, unit: str = "nats") -> Proof:
    controls = (abs(effect) * 0.06 * rng.standard_normal(8)).tolist()
    width = 0.12 * abs(effect) + 0.002
    text = "8 layer-matched random draws"
    return Proof(label, unit, effect, effect - width, effect + width, 0.95, controls, text, 4096)


def make_cards(
    rng: np.random.Generator, part: dict[str, np.ndarray], sequence: Sequence | None, bins: int
) -> list[HeadCard]:
    layers, heads = part["sink"].shape
    columns = rng.lognormal(0, 0.8, BLOCKS)
    cards = []
    for layer in range(layers):
        for head in range(heads):
            one = {name: float(value[layer, head]) for name, value in part.items()}
            grid = pooled_map(rng, one, columns)
            reach = np.exp(-np.arange(bins) * (0.2 + 2 * one["local"])) + 0.5 * one["sink"]
            tags = [
                tag
                for tag, on in (
                    ("sink", one["sink"] > 0.8),
                    ("previous token", one["previous_token"] > 0.3),
                    ("induction", one["induction"] > 0.3),
                )
                if on
            ]
            keys = []
            if sequence is not None and sequence.tokens:
                places = [0, *rng.choice(len(sequence.tokens), 5).tolist()]
                keys = [
                    TopKey(p, sequence.tokens[p], one["sink"] * 0.6**k)
                    for k, p in enumerate(places)
                ]
            cards.append(
                HeadCard(
                    f"L{layer}H{head}",
                    pool_levels(grid),
                    grid.mean(0),
                    reach / reach.sum(),
                    keys,
                    tags,
                )
            )
    return cards


def make_stack(
    rng: np.random.Generator,
    tokens: list[str],
    layers: int,
    heads: int,
    name: str = "",
    sampled: bool = False,
    full: bool = True,
) -> Stack:
    part = shares(rng, layers, heads)
    measures = make_measures(rng, part, max(len(tokens), 64), sampled)
    by_key = {m.key: m.values for m in measures}
    sequence = make_sequence(rng, tokens, layers) if tokens else None
    edges = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
    stack = Stack(
        layers=layers,
        heads=heads,
        measures=measures,
        name=name,
        label="Text decoder" if not name else name.capitalize(),
        kv_heads=max(1, heads // 3),
        causal=not name,
        distance_edges=edges,
        sequence=sequence,
        cards=make_cards(rng, part, sequence, len(edges) - 1),
    )
    if not full or sequence is None:
        return stack
    stack.skyline = make_skyline(rng, layers)
    stack.retrieval = make_retrieval(rng, by_key["retrieval"], heads)
    stack.probes = [
        Probe(
            definition(key),
            [head_name(i, heads) for i in top(by_key[key], 5)],
            [float(by_key[key].ravel()[i]) for i in top(by_key[key], 5)],
            proof("Δ loss on the probe, top 5 silenced", effect, rng),
        )
        for key, effect in (
            ("previous_token", 0.62),
            ("duplicate_token", 0.11),
            ("induction", 1.85),
        )
    ]
    quiet = -np.abs(by_key["ablation"])
    stack.dormant = [
        DormantSet(definition("dormant_sink"), "sink mass > 0.8",
                   [head_name(i, heads) for i in np.flatnonzero(by_key["dormant_sink"] > 0.8)]),
        DormantSet(definition("dormant_output"), "output norm < 0.5 x the layer's median",
                   [head_name(i, heads) for i in np.flatnonzero(by_key["dormant_output"] < 0.5)]),
        DormantSet(definition("dormant_ablation"), "|Δ loss| < 0.001 nats",
                   [head_name(i, heads) for i in np.flatnonzero(quiet > -0.001)]),
    ]  # fmt: skip
    rows = []
    for i in range(8):
        values = np.clip(rng.normal(0.55, 0.2, 3), 0.02, 0.98).tolist()
        rows.append(
            DomainRow(
                head_name(int(rng.integers(0, layers * heads)), heads),
                values, values[0] - values[1], 0.004 * (i + 1),
            )
        )  # fmt: skip
    rows.sort(key=lambda row: -abs(row.difference))
    stack.domains = DomainTable(["prose", "code", "dialogue"], rows, 16, 128)
    stack.budget = make_budget(sequence)
    return stack


def make_report(
    tokens: int = 1024,
    layers: int = 30,
    heads: int = 9,
    sampled: bool | None = None,
    seed: int = 0,
    stacks: tuple[str, ...] = (),
    text: list[str] | None = None,
) -> ReportData:
    """A whole report. `stacks` names further towers without text; `text` replaces the tokens."""
    rng = np.random.default_rng(seed)
    sampled = tokens > 4096 if sampled is None else sampled
    pieces = words(tokens) if text is None else text
    main = make_stack(rng, pieces, layers, heads, sampled=sampled)
    extra = [make_stack(rng, [], 4, 4, name=name, full=False) for name in stacks]
    sink = next(m.values for m in main.measures if m.key == "sink")
    lazy = [head_name(i, heads) for i in np.flatnonzero(sink > 0.8)]
    best = [h.head for h in main.retrieval.heads[:5]] if main.retrieval else []
    findings = [
        Finding(
            "high", "Heads parked on the first token",
            f"{len(lazy)} of {layers * heads} heads put more than 80 % of their attention on the first"
            f" token; {sink.mean():.0%} of all attention goes there.",
            "Mean weight on key 0 over all queries, each head; silenced together on held-out text.",
            'regard ablate smollm2 --heads "sink>0.8"', proof("Δ loss, heads silenced", 0.021, rng),
            lazy, "sink", "atlas",
        ),
        Finding(
            "high", "One residual dimension carries the sink",
            "Dimension 314 of the first token is 2 300 times the median activation from layer 3 to"
            " layer 28; MLP 3 and MLP 12 write it, MLP 29 erases it.",
            "Largest |activation| of the residual stream after each block, and what each sub-layer adds.",
            "regard report smollm2 --only residual", proof("Δ loss, capped at 1 000", 0.9, rng),
            [], None, "skyline",
        ),
        Finding(
            "notable", "Few heads retrieve",
            f"5 heads answer most needle questions; silencing them cuts recall from 94 % to 30 %."
            f" The strongest is {best[0] if best else 'L17H3'}.",
            "Needle task, 120 prompts of 300 to 1 000 tokens; the heads' outputs set to zero.",
            "regard reproduce retrieval-head", proof("Δ recall, top 5 silenced", -64.0, rng, "points"),
            best, "retrieval", "retrieval",
        ),
        Finding(
            "good", "A fifth of the cache holds 86 % of the attention",
            "Keeping 20 % of the keys by received mass retains 86 % of the attention and costs"
            " 0.16 nats a token; keeping half costs 0.012.",
            "Keys ranked by received attention in each layer; loss measured with the others dropped.",
            "regard report smollm2 --only budget", proof("Δ loss at 20 %", 0.16, rng), [], None, "budget",
        ),
        Finding(
            "info", "Three definitions of dormant disagree",
            "Of the heads called dormant by sink mass, only 31 % are also dormant by ablation.",
            "Heads below each threshold, over 32 windows of 128 tokens.",
            "regard report smollm2 --only dormant", None, [], "dormant_sink", "dormant",
        ),
    ]  # fmt: skip
    interventions = [
        Intervention(name, metric, unit, before, after, low, high, controls, "8 random draws", command)
        for name, metric, unit, before, after, low, high, controls, command in (
            ("Silence 46 sink heads", "loss", "nats", 2.913, 2.934, 2.927, 2.941,
             (3.1 + 0.05 * rng.standard_normal(8)).tolist(), 'regard ablate smollm2 --heads "sink>0.8"'),
            ("Silence 5 retrieval heads", "needle recall", "share", 0.94, 0.30, 0.22, 0.39,
             (0.89 + 0.03 * rng.standard_normal(8)).tolist(), "regard reproduce retrieval-head"),
            ("Silence 5 induction heads", "loss on repeats", "nats", 0.41, 2.26, 2.1, 2.4,
             (0.51 + 0.08 * rng.standard_normal(8)).tolist(), "regard report smollm2 --only probes"),
            ("Cap the residual peak at 1 000", "loss", "nats", 2.913, 3.81, 3.73, 3.89, [],
             "regard report smollm2 --only residual"),
        )
    ]  # fmt: skip
    header = Header(
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        dtype="float32",
        tokens=len(pieces),
        seed=seed,
        date="2026-11-24T04:20:00Z",
        command=COMMAND,
        rows=1 / 16 if sampled else 1.0,
        architecture="LlamaForCausalLM",
        parameters=134_515_008,
        quantisation="Q4_1 (GGUF), dequantised",
        weights_sha="9f2c5a1d77be03c4",
        text_source="gardens.txt",
        versions={
            "regard": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "python": "3.11.9",
        },
        cost_ratio=1.06 if sampled else 1.31,
        extra_memory_mb=148.0,
        seconds=212.0,
        equality=8.7e-5,
        equality_tolerance=1e-3,
        first_key_is_bos=False,
        hardware="2 CPU cores",
    )
    limits = [
        "One text: figures that depend on content (retrieval, domains) come from their own probes,"
        " everything else from this text.",
        "Weights were quantised to 4 bits before this run; the original may differ.",
        "Silencing a head sets its output to zero, which is outside what the model saw in training.",
    ]
    return ReportData(header, findings, [main, *extra], interventions, limits)
