"""What a report shows, as data: one dataclass for each part of the page.

`ReportData` is the whole report. Instruments fill it, `render` draws it, `write_data` saves it;
nothing here computes attention. Shapes: L layers, H query heads, N tokens, S = L + 1 residual-
stream sites (the embedding and the output of each block). NaN marks a value that was not
measured.

A model is one or more `Stack`s (text decoder, encoder, vision tower). Every panel of a stack is
optional: a vision tower has no text, an encoder has no key cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8

SCHEMA_VERSION = 1

Severity = Literal["high", "notable", "info", "good"]
Scale = Literal["linear", "log", "diverging"]


@dataclass
class Definition:
    """What a number is: `formula` in plain text with Unicode mathematics, `source` the paper."""

    key: str
    name: str
    label: str
    unit: str
    short: str
    formula: str
    source: str


@dataclass
class Measure:
    """One number for each head of a stack.

    `low` and `high` bound the colour scale (None: from the data); `error` is the standard error
    when the numbers come from a sample of query rows. A `unit` of "share" in the definition
    prints as per cent.
    """

    definition: Definition
    values: Float[np.ndarray, "layers heads"]
    error: Float[np.ndarray, "layers heads"] | None = None
    scale: Scale = "linear"
    low: float | None = None
    high: float | None = None

    @property
    def key(self) -> str:
        return self.definition.key


@dataclass
class Proof:
    """A causal effect beside its controls: what was done, what it changed, what chance does.

    `effect` has the interval [`low`, `high`] at `level`; `controls` are the effects of random draws.
    It was measured on `tokens` of what `counted` says ("held-out tokens", "held-out needles").
    """

    label: str
    unit: str
    effect: float
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    controls: list[float] = field(default_factory=list)
    control_label: str = ""
    tokens: int | None = None
    counted: str = "held-out tokens"


@dataclass
class Finding:
    """One sentence of the first screen, with its figures, method, command and proof.

    `title` is two to five words, `sentence` the claim with its numbers, `method` one line on
    how it was measured, `command` what reproduces it. `heads` ("L5H3") are lit in the atlas
    coloured by `measure`; `panel` is the section that has the details ("atlas", "skyline",
    "text", "rhythm", "retrieval", "dormant", "domains", "budget", "causal").
    """

    severity: Severity
    title: str
    sentence: str
    method: str
    command: str
    proof: Proof | None = None
    heads: list[str] = field(default_factory=list)
    measure: str | None = None
    panel: str | None = None


@dataclass
class Header:
    """What was run, on what, how exactly, at what cost, and the check that nothing was changed.

    `rows` is the share of query rows read (1.0 = exact). `cost_ratio` is the time of the
    observed forward over the plain one, `extra_memory_mb` its extra peak memory. `equality` is
    the largest absolute logit difference between the observed and the untouched forward.
    """

    model: str
    dtype: str
    tokens: int
    seed: int
    date: str
    command: str
    rows: float = 1.0
    architecture: str = ""
    parameters: int | None = None
    quantisation: str | None = None
    weights_sha: str | None = None
    text_source: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    cost_ratio: float | None = None
    extra_memory_mb: float | None = None
    seconds: float | None = None
    equality: float | None = None
    equality_tolerance: float | None = None
    first_key_is_bos: bool | None = None
    hardware: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def sampled(self) -> bool:
        return self.rows < 1.0


@dataclass
class Sequence:
    """Numbers along the input. `tokens` are decoded strings (empty for an input that is not text).

    `received` is the mean weight a token gets from the queries that can see it, averaged over
    layers and heads; `received_by_layer` the same for each layer. `kept` is the share of all KV heads
    that hold the token in a cache of a fifth of the text. `sinks`, `anchors` and
    `peaks` are token positions (attention sinks, FAI anchors, WAAD peaks). `grid` is (rows,
    columns) of an image's patches.
    """

    tokens: list[str]
    received: Float[np.ndarray, " tokens"]
    received_by_layer: Float[np.ndarray, "layers tokens"] | None = None
    waad: Float[np.ndarray, " tokens"] | None = None
    fai: Float[np.ndarray, " tokens"] | None = None
    entropy: Float[np.ndarray, " tokens"] | None = None
    surprisal: Float[np.ndarray, " tokens"] | None = None
    kept: Float[np.ndarray, " tokens"] | None = None
    sinks: list[int] = field(default_factory=list)
    anchors: list[int] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    grid: tuple[int, int] | None = None


@dataclass
class DosePoint:
    """Loss change when the massive activation is capped at `cap` (absolute value)."""

    cap: float
    delta: float
    low: float | None = None
    high: float | None = None


@dataclass
class Writer:
    """A part of the model that writes the massive dimension; `site` is "mlp.4.n17" or "L5H3".

    `share` is `contribution` over the peak; negative parts erase it.
    """

    site: str
    contribution: float
    share: float | None = None


@dataclass
class Skyline:
    """Extreme activations of the residual stream, site by site (0 = embedding, l + 1 = block l).

    `peak` is max |activation| over tokens and dimensions, at `peak_token`, `peak_dimension`;
    `median` the median |activation|. `attention_write` and `mlp_write` are the signed amounts
    each sub-layer adds to dimension `dimension` of token `token`.
    """

    peak: Float[np.ndarray, " sites"]
    median: Float[np.ndarray, " sites"]
    peak_token: Int[np.ndarray, " sites"]
    peak_dimension: Int[np.ndarray, " sites"]
    first_norm: Float[np.ndarray, " sites"] | None = None
    median_norm: Float[np.ndarray, " sites"] | None = None
    token: int = 0
    dimension: int = 0
    attention_write: Float[np.ndarray, " layers"] | None = None
    mlp_write: Float[np.ndarray, " layers"] | None = None
    writers: list[Writer] = field(default_factory=list)
    dose: list[DosePoint] = field(default_factory=list)


@dataclass
class RetrievalHead:
    """One row of the retrieval table; `activation` is the share of runs where it retrieved."""

    head: str
    score: float
    activation: float | None = None
    delta: float | None = None


@dataclass
class MaskingPoint:
    """Needle recall after silencing the `k` best heads, and after `k` random layer-matched ones."""

    k: int
    top: float
    random: float
    random_low: float | None = None
    random_high: float | None = None


@dataclass
class Retrieval:
    """Retrieval heads of the needle task and what happens when they are silenced."""

    runs: int
    answered: int
    threshold: float
    heads: list[RetrievalHead]
    base_recall: float | None = None
    masking: list[MaskingPoint] = field(default_factory=list)
    control_label: str = ""


@dataclass
class Probe:
    """A generated probe (previous token, duplicate, induction): its best heads and its proof."""

    definition: Definition
    heads: list[str]
    scores: list[float]
    proof: Proof | None = None


@dataclass
class DormantSet:
    """The heads that one definition calls dormant."""

    definition: Definition
    threshold: str
    heads: list[str]


@dataclass
class DomainRow:
    """One head's mass on the first key in each domain of `DomainTable.domains`."""

    head: str
    values: list[float]
    difference: float
    p_value: float | None = None


@dataclass
class DomainTable:
    """Heads whose mass on the sink depends on the kind of text, largest difference first."""

    domains: list[str]
    rows: list[DomainRow]
    windows: int | None = None
    window_tokens: int | None = None


@dataclass
class BudgetLevel:
    """What a key-value cache of `fraction` of the tokens would keep, layer by layer.

    `kept` is the share of a layer's KV heads that hold a position, `retained` the share of attention mass on what its heads hold.
    `delta` is the measured change of loss (nats per token) with its interval, when it was
    measured.
    """

    fraction: float
    kept: Float[np.ndarray, "layers tokens"]
    retained: Float[np.ndarray, " layers"]
    delta: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass
class Budget:
    """Key-value budgets under one scorer. `bytes_per_token` is the cache cost over all layers."""

    scorer: str
    levels: list[BudgetLevel]
    bytes_per_token: int | None = None


@dataclass
class TopKey:
    """A key a head looks at: `mass` is the mean weight from the queries that can see it."""

    position: int
    token: str
    mass: float


@dataclass
class HeadCard:
    """The page of one head.

    `map` is the pooled attention map from `pool_levels`: cell (i, j) holds the share of
    attention that queries of block i give to the keys of block j (rows sum to 1), stored as 255
    * share ** (1/3). `received` is the mean weight received along the text, in blocks;
    `distance` the share of attention between consecutive `Stack.distance_edges`.
    """

    head: str
    map: UInt8[np.ndarray, "blocks blocks"] | None = None
    received: Float[np.ndarray, " blocks"] | None = None
    distance: Float[np.ndarray, " bins"] | None = None
    top_keys: list[TopKey] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)


@dataclass
class Stack:
    """One tower of attention layers. `name` is "" for the model's only or main text stack."""

    layers: int
    heads: int
    measures: list[Measure]
    name: str = ""
    label: str = "Attention"
    kv_heads: int | None = None
    kind: Literal["self", "cross"] = "self"
    causal: bool = True
    distance_edges: list[int] = field(default_factory=list)
    sequence: Sequence | None = None
    skyline: Skyline | None = None
    retrieval: Retrieval | None = None
    probes: list[Probe] = field(default_factory=list)
    dormant: list[DormantSet] = field(default_factory=list)
    domains: DomainTable | None = None
    budget: Budget | None = None
    cards: list[HeadCard] = field(default_factory=list)


@dataclass
class Intervention:
    """A row of the before/after table: one change to the model and one number it was judged by.

    `low` and `high` bound `after`; `controls` are the values after each random change. The page draws
    them all as differences from `before`.
    """

    name: str
    metric: str
    unit: str
    before: float
    after: float
    low: float | None = None
    high: float | None = None
    controls: list[float] = field(default_factory=list)
    control_label: str = ""
    command: str = ""


@dataclass
class ReportData:
    """Everything a report shows. `stacks[0]` is the one the page opens with."""

    header: Header
    findings: list[Finding]
    stacks: list[Stack]
    interventions: list[Intervention] = field(default_factory=list)
    limits: list[str] = field(default_factory=list)
    schema: int = SCHEMA_VERSION


def pool_levels(shares: Float[np.ndarray, "blocks blocks"]) -> UInt8[np.ndarray, "blocks blocks"]:
    """Store block-to-block shares in [0, 1] as bytes: 255 * share ** (1/3). O(blocks^2)."""
    clipped = np.nan_to_num(np.clip(np.asarray(shares, dtype=np.float64), 0.0, 1.0))
    return np.rint(255.0 * np.cbrt(clipped)).astype(np.uint8)


def pooled_shares(levels: UInt8[np.ndarray, "blocks blocks"]) -> Float[np.ndarray, "blocks blocks"]:
    """Invert `pool_levels` (to within 1.2 % of a share of 1, finer for small shares)."""
    return (np.asarray(levels, dtype=np.float64) / 255.0) ** 3
