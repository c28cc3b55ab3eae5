"""KV drift: how far keys and values of a masked-diffusion model move between two denoising steps.

    drift(i, l) = ||K_l[i] now - K_l[i] before|| + ||V_l[i] now - V_l[i] before||      (norms over heads and dimensions)

for tokens i that were decided in both steps, so that what moves is their context and not the token. Besides it, what
Elastic-Cache (arXiv 2510.14973) builds on: whether the decided token that the active masks attended to most in the step
before drifts less than the mean decided token, and how much attention the active masks give to masks behind their window.

Keys and values must be fresh in every step: measure without a cache.

    drift = KVDrift(window=16)
    with regard.attach(model, drift):
        model.generate(prompts, before_step=drift.before_step)
    drift.compute()

Cost: one difference of keys and values and one reduction of the attention weights in each layer and step; memory one copy of
all keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError
from regard.engine import AttentionCall, Block
from regard.instruments.base import Instrument

if TYPE_CHECKING:
    import polars
    from matplotlib.axes import Axes

    from regard.cache.diffusion import Canvas

COLUMNS = ("drift", "relative", "tracked", "below", "far", "far_keys")


@dataclass(frozen=True)
class DriftProfile:
    """Per layer and sequence, means over steps; NaN where a sequence had no two steps.

    Attributes:
        drift: `[layers, sequences]`, mean drift of the decided tokens.
        relative: `[layers, sequences]`, the same divided by the norms of key and value before, `||dK||/||K|| + ||dV||/||V||`.
        tracked: `[layers, sequences]`, drift of the decided token that the active masks attended to most a step before.
        below: `[layers, sequences]`, share of steps in which the tracked token drifted less than the mean decided token.
        far: `[layers, sequences]`, attention of the active masks on masks behind the window, mean over heads.
        far_keys: `[layers, sequences]`, share of the keys that are such masks: what uniform attention would give them.
    """

    drift: Float[Tensor, "layers sequences"]
    relative: Float[Tensor, "layers sequences"]
    tracked: Float[Tensor, "layers sequences"]
    below: Float[Tensor, "layers sequences"]
    far: Float[Tensor, "layers sequences"]
    far_keys: Float[Tensor, "layers sequences"]

    def to_frame(self) -> polars.DataFrame:
        """One row for each layer: the means over sequences (needs the `frames` extra)."""
        import polars

        table = {name: getattr(self, name).nanmean(1).tolist() for name in COLUMNS}
        return polars.DataFrame({"layer": list(range(len(self.drift))), **table})

    def plot(self, ax: Axes | None = None) -> Axes:
        """Mean and tracked drift by layer (needs the `plot` extra)."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(5, 3.5), layout="constrained")
        layers = range(len(self.drift))
        ax.plot(layers, self.drift.nanmean(1), "o-", label="decided tokens, mean")
        ax.plot(layers, self.tracked.nanmean(1), "s--", label="most attended decided token")
        ax.set(xlabel="layer", ylabel="drift of key + value in a step")
        ax.legend(frameon=False)
        return ax


class KVDrift(Instrument):
    """Drift of keys and values from step to step.

    Args:
        window: the leftmost masks that count as active.
    """

    states = {"rows": "list"}

    def __init__(self, window: int = 16) -> None:
        super().__init__()
        if window < 1:
            raise InputError.of("window", given=window, expected="a whole number >= 1")
        self.window = window
        self._canvas: Any = None
        self._active = torch.empty(0)
        self._received: dict[int, Tensor] = {}
        self._before: dict[int, tuple[Tensor, ...]] = {}
        self._sequences = 0
        self._batch = 0

    def before_step(self, canvas: Canvas) -> None:
        """Tells the instrument what is decided; pass it to `generate`."""
        if bool((canvas.step == 0).any()):  # a new batch
            self._before.clear()
            self._sequences += self._batch
            self._batch = len(canvas.sequences)
        self._canvas = canvas
        self._active = canvas.open & (canvas.open.cumsum(1) <= self.window)

    def weights(self, block: Block) -> None:
        canvas, layer = self._given(block.call), block.site.layer
        rows = self._active[:, block.rows].to(block.weights.dtype)
        taken = torch.einsum("bhrk,br->bk", block.weights, rows)
        received = torch.zeros(canvas.open.shape, dtype=taken.dtype, device=taken.device)
        received[:, block.keys] = taken
        self._received[layer] = self._received.get(layer, 0) + received

    def after(self, call: AttentionCall) -> None:
        canvas, layer = self._given(call), call.site.layer
        received = self._received.pop(layer)
        active, now = self._active, canvas.decoded
        given = active.sum(1) * call.heads
        behind = ~now & ~active
        far = (received * behind).sum(1) / given
        tracked = received.masked_fill(~now, -1).argmax(1)
        key, value = (
            states.transpose(1, 2).flatten(2).float() for states in (call.key, call.value)
        )
        if layer in self._before:
            ids, old_key, old_value, old_decoded, old_tracked = self._before[layer]
            kept = torch.searchsorted(ids, canvas.sequences)
            old_key, old_value, old_tracked = old_key[kept], old_value[kept], old_tracked[kept]
            moved = [(key - old_key).norm(dim=-1), (value - old_value).norm(dim=-1)]
            size = [old_key.norm(dim=-1), old_value.norm(dim=-1)]
            both = now & old_decoded[kept]
            drift = moved[0] + moved[1]
            relative = moved[0] / size[0] + moved[1] / size[1]
            mean = (drift * both).sum(1) / both.sum(1)
            followed = drift.gather(1, old_tracked[:, None])[:, 0]
            columns = [
                canvas.sequences + self._sequences,
                mean,
                (relative * both).sum(1) / both.sum(1),
                followed,
                followed < mean,
                far,
                behind.float().mean(1),
            ]
            self.accumulate(
                "rows", call.site.key, [torch.stack([c.double() for c in columns], 1).cpu()]
            )
        self._before[layer] = (canvas.sequences, key, value, now, tracked)

    def _given(self, call: AttentionCall) -> Any:
        if self._canvas is None or len(self._canvas.sequences) != call.query.shape[0]:
            raise InputError(
                "KVDrift does not know what is decided; pass before_step=drift.before_step to generate"
            )
        if call.queries != call.keys:
            raise InputError(
                f"KVDrift needs fresh keys and values in every step, got {call.queries} rows against {call.keys} keys; "
                "generate without a cache (NoCache)"
            )
        return self._canvas

    def compute(self) -> DriftProfile:
        """The profile of everything observed.

        Raises:
            InputError: nothing was observed, or no sequence had two steps.
        """
        table = self.state["rows"]
        if not table:
            raise InputError("KVDrift saw no two steps in a row; attach it and generate first")
        profiles = [_by_sequence(torch.cat(table[key])) for key in sorted(table)]
        stacked = torch.stack(profiles)  # [layers, sequences, columns]
        return DriftProfile(*(stacked[..., i].float() for i in range(len(COLUMNS))))


def _by_sequence(rows: Tensor) -> Tensor:
    """`[steps, 1 + columns]` with the sequence in front to means `[sequences, columns]`."""
    sequence = rows[:, 0].long()
    sums = torch.zeros(int(sequence.max()) + 1, rows.shape[1], dtype=rows.dtype)
    sums.index_add_(0, sequence, torch.cat([torch.ones(len(rows), 1).to(rows), rows[:, 1:]], 1))
    return sums[:, 1:] / sums[:, :1]
