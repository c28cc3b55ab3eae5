"""Directions behind a sink: hidden states that point along the first token's, queries that point at its key.

* `bos_cosine`: cos(x_first, x_t) on the residual stream (Mitigating Attention Sinks and Massive Activations in AVSR,
  arXiv 2510.22603; intermediate sinks have a cosine near 1);
* `QueryKeyAngle`: cos(q_t, k_1) - mean_{1 < j <= t} cos(q_t, k_j), positive where a head parks on the first key by direction
  rather than by norm (When Attention Sink Emerges, arXiv 2410.10781). The mean over keys is the query against a running mean
  of unit keys, so no queries x keys map is made;
* `norm_report`: both papers' norms of hidden states, keys and values, layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from regard.attach import Session
from regard.engine import AttentionCall, State
from regard.instruments._tokens import first_token, prompt_keys, real, wide
from regard.instruments.base import HeadMeasure, Instrument, SiteKey
from regard.instruments.stream import ResidualPeaks, site_of
from regard.instruments.values import ValueDrain

if TYPE_CHECKING:
    import polars


def bos_cosine(
    hidden: Float[Tensor, "batch tokens dim"], valid: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch tokens"]:
    """cos(x_first, x_t) for each token; 1 at the first real token, NaN at padding. Differentiable, O(tokens x dim).

    >>> import torch
    >>> bos_cosine(torch.tensor([[[2.0, 0.0], [0.0, 1.0], [-3.0, 0.0]]])).tolist()
    [[1.0, 0.0, -1.0]]
    """
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    unit = normalize(hidden, dim=-1, eps=1e-30)
    start = first_token(valid, hidden.shape[0], hidden.device)
    cosine = torch.einsum("btd,bd->bt", unit, unit[torch.arange(len(unit)), start])
    return cosine if valid is None else cosine.masked_fill(~valid, float("nan"))


class BosCosine(Instrument):
    """cos(x_first, x_t) of every token at every residual site (0 = embedding, l + 1 = after block l).

    `compute()` gives, for each stack, a list over sequences batches of `[sites, batch, tokens]`. Decode steps are left out.

    Cost: one pass over the residual stream; memory O(sites x tokens).
    """

    states = {"cosine": "list"}

    def residual(self, state: State) -> None:
        site = site_of(state)
        if site is None or state.hidden.dim() != 3 or state.hidden.shape[1] == 1:
            return
        cosine = bos_cosine(state.hidden.detach(), state.valid)
        self.accumulate("cosine", (state.stack, site), [cosine.float().cpu()])

    def compute(self) -> dict[str, list[Tensor]]:
        table: dict[str, list[Tensor]] = {}
        for stack in dict.fromkeys(name for name, _ in self.state["cosine"]):
            sites = [
                rows for (name, _), rows in sorted(self.state["cosine"].items()) if name == stack
            ]
            table[stack] = [torch.stack(batch) for batch in zip(*sites, strict=True)]
        return table


class QueryKeyAngle(Instrument):
    """How much more queries point at the first key than at the other keys before them.

    For each head and query t with at least one other key: cos(q_t, k_first) - mean over the other keys up to t of
    cos(q_t, k_j), with query and key after the position encoding; averaged over real queries. Attention windows are not taken
    into account (this is geometry, not attention), and decode steps are left out.

    Cost: O(tokens x heads x dim) time, a running sum of the keys of one layer as memory.

    >>> import torch
    >>> from regard.engine import AttentionCall, Pipeline, attend
    >>> angle, key = QueryKeyAngle(), torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]])
    >>> _ = attend(AttentionCall.make(key[:, :, :1].expand_as(key), key, key), Pipeline([angle]))
    >>> angle.compute()["angle to first key"]["L0H0"]
    1.0
    """

    states = {"first": "sum", "others": "sum", "queries": "sum"}

    def after(self, call: AttentionCall) -> None:
        found = prompt_keys(call)
        if found is None:
            return
        key, _, valid = found
        batch, heads, queries, dim = call.query.shape
        query = normalize(wide(call.query), dim=-1, eps=1e-30)
        query = query.view(batch, call.kv_heads, call.group, queries, dim)
        key = normalize(wide(key), dim=-1, eps=1e-30)
        start = first_token(valid, batch, key.device)
        rows = torch.arange(batch, device=key.device)
        others = valid.clone()
        others[rows, start] = False
        counts = others.double()
        sums = torch.where(others[:, None, :, None], key.double(), 0)
        if call.site.causal:
            sums, counts = sums.cumsum(2), counts.cumsum(-1)
        else:
            sums, counts = sums.sum(2, keepdim=True), counts.sum(-1, keepdim=True)
        mean = (sums / counts.clamp_min(1)[:, None, :, None]).to(query.dtype)
        to_others = (query * mean[:, :, None]).sum(-1)
        to_first = torch.einsum("bgrqd,bgd->bgrq", query, key[rows, :, start])
        counted = (counts > 0).expand(-1, queries) & real(call.valid, batch, queries, key.device)
        for name, values in (("first", to_first), ("others", to_others)):
            kept = torch.where(counted[:, None, None], values, 0)
            total = kept.double().sum((0, 3)).reshape(heads)
            self.accumulate(name, call.site.key, total.cpu())
        self.accumulate("queries", call.site.key, counted.sum().double().cpu())

    def compute(self) -> dict[str, HeadMeasure]:
        first, others, gap = {}, {}, {}
        for site, total in self.state["first"].items():
            count = self.state["queries"][site]
            first[site] = (total / count).float()
            others[site] = (self.state["others"][site] / count).float()
            gap[site] = ((total - self.state["others"][site]) / count).float()
        made = (
            ("cosine to first key", first, "mean over queries of cos(q_t, k_first)"),
            (
                "cosine to other keys",
                others,
                "mean over queries of the mean cos(q_t, k_j) over other keys",
            ),
            (
                "angle to first key",
                gap,
                "cos(q_t, k_first) - mean over the other keys of cos(q_t, k_j)",
            ),
        )
        return {name: HeadMeasure(name, "cosine", table, {}, text) for name, table, text in made}


def qk_angle_report(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None
) -> dict[str, HeadMeasure]:
    """`QueryKeyAngle` of a model on token ids `[batch, tokens]`, in one forward pass."""
    angle = QueryKeyAngle()
    _run(model, input_ids, attention_mask, angle)
    return angle.compute()


@dataclass(slots=True)
class LayerNorms:
    """Mean norms of one block: what leaves it, and the keys (after RoPE) and values of its attention, over heads."""

    layer: int
    hidden_first: float
    hidden_others: float
    key_first: float
    key_others: float
    value_first: float
    value_others: float


@dataclass(slots=True)
class NormReport:
    """||h_t||, ||k_t||, ||v_t|| of the first token and of the others, for every layer of one stack."""

    layers: list[LayerNorms]

    def to_frame(self) -> polars.DataFrame:
        """One row for each layer (needs the `frames` extra)."""
        import polars

        names = LayerNorms.__slots__  # type: ignore[attr-defined]
        rows = [[getattr(layer, name) for name in names] for layer in self.layers]
        return polars.DataFrame(rows, schema=list(names), orient="row")

    def plot(self) -> Any:
        """Three panels, norm against layer, first token and others (needs the `plot` extra)."""
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
        x = [layer.layer for layer in self.layers]
        for ax, part in zip(axes, ("hidden", "key", "value"), strict=True):
            for who in ("first", "others"):
                y = [getattr(layer, f"{part}_{who}") for layer in self.layers]
                ax.plot(
                    x, y, label=f"{who.removesuffix('s')} token{'s' if who == 'others' else ''}"
                )
            ax.set(title=f"{part} state", xlabel="layer", ylabel="mean norm", yscale="log")
        axes[0].legend()
        return figure


def norm_report(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *, stack: str = ""
) -> NormReport:
    """Norms of hidden states, keys and values, first token against the others, on token ids `[batch, tokens]`.

    The others' hidden norm is the median over tokens, averaged over sequences; keys and values are means. One forward pass.
    """
    peaks, drain = ResidualPeaks(), ValueDrain()
    _run(model, input_ids, attention_mask, peaks, drain)
    skyline, norms = peaks.compute()[stack], drain.compute()
    layers = []
    for layer in range(len(skyline.peak) - 1):
        key: SiteKey = (stack, layer)
        numbers = [
            float(norms[name].values[key].mean()) if key in norms[name].values else float("nan")
            for name in ("first key norm", "other key norm", "first value norm", "other value norm")
        ]
        hidden = float(skyline.first_norm[layer + 1]), float(skyline.median_norm[layer + 1])
        layers.append(LayerNorms(layer, *hidden, *numbers))
    return NormReport(layers)


def _run(model: nn.Module, ids: Tensor, mask: Tensor | None, *instruments: Instrument) -> None:
    padding = {} if mask is None else {"attention_mask": mask}
    with torch.inference_mode(), Session(model, *instruments):
        model(input_ids=ids, **padding)
