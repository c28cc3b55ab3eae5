"""The catalogue of definitions that the report prints beside its figures.

`measure("entropy", values)` builds a `Measure` with the right definition and colour scale, so
that a collector names a measure once and the page, the console and the data files agree on what
it is.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from regard.report.schema import Definition, Measure, Scale

_ROWS: list[tuple[str, str, str, str, str, str, str]] = [
    (
        "entropy",
        "Attention entropy",
        "Entropy",
        "nats",
        "How widely a query spreads its attention, averaged over queries. 0 is a single key.",
        "H = mean over queries t of −Σ_s A[t,s] ln A[t,s]",
        "Shannon entropy of the attention row; Clark et al. 2019, arXiv 1906.04341",
    ),
    (
        "entropy_normalised",
        "Normalised entropy",
        "Norm. entropy",
        "share",
        "Entropy divided by its largest possible value for the number of visible keys. 1"
        " is uniform.",
        "H / ln(number of visible keys), averaged over queries with at least 2 visible keys",
        "Shannon entropy of the attention row, relative to uniform",
    ),
    (
        "distance",
        "Mean attention distance",
        "Distance",
        "tokens",
        "How far back a head looks on average.",
        "d = mean over queries t of Σ_s A[t,s] (t − s)",
        "arXiv 2510.13554 (head split by span); Dosovitskiy et al. 2021 for images",
    ),
    (
        "waad",
        "Windowed average attention distance",
        "WAAD",
        "tokens",
        "Mean distance clipped at W = 10 tokens: near 0 looks at itself, near 10 looks"
        " beyond the window.",
        "WAAD = mean over queries t of Σ_s A[t,s] min(t − s, W), W = 10",
        "arXiv 2510.13554 (the preplan-and-anchor rhythm)",
    ),
    (
        "fai",
        "Future attention influence",
        "FAI",
        "share",
        "How much later tokens look back at a token, averaged over the tokens.",
        "FAI_s = mean over queries t in [s + lo, s + hi] of A[t,s]; the head's figure is"
        " the mean over s",
        "arXiv 2510.13554 (the preplan-and-anchor rhythm)",
    ),
    (
        "sink",
        "Sink mass",
        "Sink mass",
        "share",
        "Share of a head's attention that goes to the first key it can see.",
        "mean over queries t ≥ 8 of A[t,0]",
        "Xiao et al. 2023, arXiv 2309.17453; Gu et al. 2024, arXiv 2410.10781",
    ),
    (
        "drain",
        "Value-norm ratio of the sink",
        "Value drain",
        "ratio",
        "Norm of the first key's value vector over the mean norm of the others. Near 0,"
        " attention paid to it adds nothing.",
        "‖v_0‖ / mean over s > 0 of ‖v_s‖",
        "Guo et al. 2024, arXiv 2410.13835 (value-state drain)",
    ),
    (
        "output_norm",
        "Head output norm",
        "Output norm",
        "",
        "Length of what the head adds, before the output projection, averaged over tokens.",
        "mean over queries t of ‖Σ_s A[t,s] v_s‖",
        "Kobayashi et al. 2020, arXiv 2004.10102",
    ),
    (
        "local",
        "Local share",
        "Local",
        "share",
        "Share of attention on the last 16 keys, the query's own included.",
        "mean over queries t of Σ A[t,s] over keys with t − s < 16",
        "Pattern profile; arXiv 2303.13731 for images",
    ),
    (
        "global",
        "Global share",
        "Global",
        "share",
        "Share of attention on keys farther back, the first key not counted.",
        "mean over queries t of 1 − local share − A[t,0] (the first key only where t ≥ 16)",
        "Pattern profile; arXiv 2303.13731 for images",
    ),
    (
        "uniform",
        "Uniformity",
        "Uniform",
        "share",
        "The share of the visible keys that a query effectively uses. 1 is uniform.",
        "mean over queries t of exp(H_t) / visible keys, H_t the entropy of the row",
        "Perplexity of the attention row over the number of keys it sees",
    ),
    (
        "previous_token",
        "Previous-token score",
        "Previous token",
        "share",
        "Attention on the token just before, on random-token probes.",
        "mean over queries t ≥ 1 of A[t, t − 1]",
        "Elhage et al. 2021, A Mathematical Framework for Transformer Circuits",
    ),
    (
        "duplicate_token",
        "Duplicate-token score",
        "Duplicate token",
        "share",
        "Attention on earlier copies of the same token, on repeated random-token probes.",
        "mean over queries in the second copy of A[t, t − P], P the period",
        "Wang et al. 2022, arXiv 2211.00593",
    ),
    (
        "induction",
        "Induction score",
        "Induction",
        "share",
        "Attention on the token that followed the previous copy, on repeated random-token probes.",
        "mean over queries in the second copy of A[t, t − P + 1], P the period",
        "Olsson et al. 2022, arXiv 2209.11895",
    ),
    (
        "retrieval",
        "Retrieval score",
        "Retrieval",
        "share",
        "How often the head's strongest key is the needle token that the model is just writing.",
        "|needle tokens copied by the head| / |needle tokens|, mean over answered runs",
        "Wu et al. 2024, arXiv 2404.15574",
    ),
    (
        "ablation",
        "Loss change when silenced",
        "Δ loss",
        "nats",
        "Change of the loss on held-out tokens when the head's output is set to zero.",
        "Δ = loss(head output := 0) − loss, nats per token",
        "Michel et al. 2019, arXiv 1905.10650",
    ),
    (
        "dormant_sink",
        "Dormant by sink mass",
        "Dormant (sink)",
        "share",
        "Mean attention on the first key over a corpus, queries from the eighth on.",
        "D = mean over texts and queries t ≥ 8 of A[t,0]",
        "Guo et al. 2024, arXiv 2410.13835 (active-dormant heads)",
    ),
    (
        "dormant_output",
        "Dormant by output norm",
        "Dormant (output)",
        "ratio",
        "The head's output norm over the median head of its layer. Small is dormant.",
        "‖output of the head‖ / median over heads of the layer",
        "Output-norm definition of a dormant head",
    ),
    (
        "dormant_ablation",
        "Dormant by ablation",
        "Dormant (ablation)",
        "nats",
        "Absolute loss change when the head is silenced. Small is dormant.",
        "|loss(head output := 0) − loss|, nats per token",
        "Ablation definition of a dormant head",
    ),
    (
        "received",
        "Attention received",
        "Received",
        "share",
        "Mean weight a token gets from the queries that can see it.",
        "a_s = mean over queries t ≥ s of A[t,s], averaged over heads (and layers)",
        "Gu et al. 2024, arXiv 2410.10781 (importance); H2O sums the same column, arXiv 2306.14048",
    ),
    (
        "surprisal",
        "Surprisal",
        "Surprisal",
        "nats",
        "How little the model expected the token.",
        "−ln p(token | tokens before it)",
        "Shannon 1948",
    ),
    (
        "peak",
        "Largest residual activation",
        "Peak",
        "",
        "The largest absolute entry of the residual stream after a block, over tokens"
        " and dimensions.",
        "max over t, d of |h[t,d]|",
        "Sun et al. 2024, arXiv 2402.17762 (massive activations)",
    ),
    (
        "write",
        "Write to the massive dimension",
        "Write",
        "",
        "What a sub-layer adds to the dimension and token where the peak sits. A"
        " negative write erases it.",
        "Δ h[t*, d*] by attention or MLP of the layer, t*, d* the peak's token and dimension",
        "Sun et al. 2024, arXiv 2402.17762; Guo et al. 2024, arXiv 2410.13835",
    ),
    (
        "retained",
        "Attention retained",
        "Retained",
        "share",
        "Share of the layer's attention that falls on the positions its heads keep within a budget.",
        "Σ over heads of received mass on kept positions / Σ of received mass",
        "Zhang et al. 2023, arXiv 2306.14048 (H2O)",
    ),
    (
        "kept",
        "Kept by a budget",
        "Kept",
        "share",
        "Share of KV heads that still hold a token after the text was read within a budget.",
        "cache.kept(layer, head) of regard.cache.H2O, every KV head with the same number of slots",
        "Zhang et al. 2023, arXiv 2306.14048 (H2O)",
    ),
]

DEFINITIONS: dict[str, Definition] = {row[0]: Definition(*row) for row in _ROWS}

# key -> (scale, low, high); what is not listed takes its range from the data on a linear scale
_SCALES: dict[str, tuple[Scale, float | None, float | None]] = {
    "entropy_normalised": ("linear", 0.0, 1.0),
    "distance": ("log", 1.0, None),
    "waad": ("linear", 0.0, 10.0),
    "fai": ("log", None, None),
    "sink": ("linear", 0.0, None),
    "drain": ("linear", 0.0, None),
    "output_norm": ("log", None, None),
    "local": ("linear", 0.0, None),
    "global": ("linear", 0.0, None),
    "uniform": ("linear", 0.0, None),
    "previous_token": ("linear", 0.0, None),
    "duplicate_token": ("linear", 0.0, None),
    "induction": ("linear", 0.0, None),
    "retrieval": ("linear", 0.0, None),
    "ablation": ("diverging", None, None),
    "dormant_sink": ("linear", 0.0, None),
    "dormant_output": ("log", None, None),
    "dormant_ablation": ("log", None, None),
}


def definition(key: str) -> Definition:
    """The catalogue's definition of `key`; `KeyError` lists the known keys."""
    if key not in DEFINITIONS:
        raise KeyError(f"no definition of {key!r}; known: {', '.join(DEFINITIONS)}")
    return DEFINITIONS[key]


def measure(
    key: str,
    values: Float[np.ndarray, "layers heads"],
    error: Float[np.ndarray, "layers heads"] | None = None,
) -> Measure:
    """A `Measure` of the catalogue. `values` and `error` are [L, H]; NaN where not measured."""
    scale, low, high = _SCALES.get(key, ("linear", None, None))
    return Measure(definition(key), np.asarray(values), error, scale, low, high)
