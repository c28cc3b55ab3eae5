"""The causal twin of a score: silence the heads it names, and as many random heads of the same layers.

A score says where heads look, not whether it matters. The twin measures what the model loses without the named heads,

    effect = loss(model without the named heads) - loss(model)

and compares it with the same difference for at least 8 random sets that have as many heads in each layer and none of the
named ones. Without the control a large effect proves nothing: in some layers any few heads are worth as much.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard._errors import InputError
from regard._progress import track
from regard.attach import anatomy
from regard.coordinates import Head
from regard.instruments._intervals import bootstrap, bootstrap_items
from regard.instruments._variants import BUDGET, variant_losses
from regard.instruments.controls import free_draws, layer_matched_draws
from regard.instruments.importance import held_out
from regard.instruments.outputs import MeanOutput, mean_outputs
from regard.interventions import ablate, find_heads
from regard.interventions._places import head_grid

if TYPE_CHECKING:
    import polars
    from matplotlib.axes import Axes


@dataclass(slots=True)
class CausalTwin:
    """What silencing named heads does, beside what silencing random heads does.

    Attributes:
        heads: the named heads.
        base: the measured quantity of the untouched model (the loss in nats per token unless `unit` says otherwise).
        effect: its change when the named heads are silenced; `interval` its 95 % bootstrap interval over stretches of 32 tokens
            (over items for a measure of one's own; NaN when that gives a single number).
        controls: the change for each random draw, with the drawn heads in `control_heads`.
        excess: `effect` minus the mean of the controls, with `excess_interval`.
        p: share of draws (the named set counted as one) at least as far from 0 in the direction of the effect; with n draws
            it cannot be below 1 / (n + 1).
        z: `excess` in standard deviations of the controls.
    """

    heads: tuple[Head, ...]
    mode: str
    unit: str
    base: float
    effect: float
    interval: tuple[float, float]
    controls: Float[Tensor, " draws"]
    control_heads: list[tuple[Head, ...]]
    excess: float
    excess_interval: tuple[float, float]
    layer_matched: bool
    samples: int
    seconds: float

    @property
    def p(self) -> float:
        sign = 1.0 if self.effect >= 0 else -1.0
        beyond = int((sign * self.controls >= sign * self.effect).sum())
        return (1 + beyond) / (1 + len(self.controls))

    @property
    def z(self) -> float:
        return self.excess / float(self.controls.std()) if len(self.controls) > 1 else float("nan")

    def sentence(self) -> str:
        """The finding in one line, with its control."""
        names = ", ".join(map(str, self.heads[:3])) + (", ..." if len(self.heads) > 3 else "")
        what = f"the {len(self.heads)} heads {names}" if len(self.heads) > 1 else f"head {names}"
        low, high = self.interval
        where = "from the same layers" if self.layer_matched else "from any layer"
        many = f"{len(self.heads)} random heads" if len(self.heads) > 1 else "one random head"
        result = "the loss" if self.unit.startswith("nats") else "the result"
        return (
            f"Silencing {what} changes {result} by {self.effect:+.3f} {self.unit} (95 % interval {low:+.3f} to {high:+.3f}); "
            f"{many} {where}: {float(self.controls.mean()):+.3f} on average over {len(self.controls)} draws, "
            f"{float(self.controls.min()):+.3f} to {float(self.controls.max()):+.3f} (p = {self.p:.2f})."
        )

    def to_frame(self) -> polars.DataFrame:
        """Columns `set, heads, effect`: the named heads and every draw (needs the `frames` extra)."""
        import polars

        sets = [("named", self.heads, self.effect)]
        sets += [
            (f"control {i}", heads, value)
            for i, (heads, value) in enumerate(
                zip(self.control_heads, self.controls.tolist(), strict=True)
            )
        ]
        rows = [(name, " ".join(map(str, heads)), value) for name, heads, value in sets]
        return polars.DataFrame(rows, schema=["set", "heads", "effect"], orient="row")

    def plot(self, ax: Axes | None = None) -> Axes:
        """The named heads' effect with its interval, and every control as a dot (needs the `plot` extra)."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(6, 1.8), layout="constrained")
        ax.plot(
            self.controls.numpy(), [0] * len(self.controls), "o", color="0.6", label="random heads"
        )
        reach = [[max(self.effect - self.interval[0], 0)], [max(self.interval[1] - self.effect, 0)]]
        ax.errorbar([self.effect], [1], xerr=reach, fmt="o", capsize=4, label="named heads")
        ax.axvline(0, color="0.8", zorder=0)
        ax.set(
            yticks=[0, 1],
            yticklabels=["random", "named"],
            ylim=(-0.7, 1.7),
            xlabel=f"change, {self.unit}",
        )
        return ax

    def __repr__(self) -> str:
        return f"CausalTwin: {self.sentence()}"


def causal_twin(
    model: nn.Module,
    heads: Any,
    evaluate: Any = None,
    *,
    draws: int = 8,
    seed: int = 0,
    layer_matched: bool = True,
    mode: str = "zero",
    means: Any = None,
    phase: str = "all",
    unit: str | None = None,
    window: int = 512,
    budget: int = BUDGET,
) -> CausalTwin:
    """Silences the named heads together and compares with random draws of as many others.

    Args:
        heads: coordinates of the named heads.
        evaluate: held-out text, token ids or a dict of inputs, on which the loss is measured; or a function of the model that
            returns a number or one number for each item (a tensor). By default 512 tokens of English.
        draws: random sets, 8 or more.
        layer_matched: draw as many heads from each layer as are named there (nearest layers where too few are left).
        mode, means: as in `regard.ablate`.
        phase: as in `regard.ablate`, for a function of the model ("decode": only while it generates).
        unit: of the measured quantity ("nats/token" for the loss).

    Raises:
        InputError: fewer than 8 draws, no heads, a head outside the model, or more heads than could be drawn as controls.

    Cost: for text, one batch with `draws + 1` copies of it, from the first affected block on; for a function, `draws + 2` calls.
    """
    began = time.perf_counter()
    if draws < 8:
        raise InputError.of(
            "draws", given=draws, expected="at least 8", fix="fewer say nothing about chance"
        )
    named = find_heads(model, heads)
    if not named:
        raise InputError('no heads are named; give coordinates such as heads=["L5H3"]')
    draw = layer_matched_draws if layer_matched else free_draws
    sets = draw(named, head_grid(anatomy(model)), draws, seed)
    if callable(evaluate):
        base, values = _by_function(model, evaluate, [named, *sets], mode, means, phase)
        changes = values - base
        interval = bootstrap_items
        unit = unit or ""
    else:
        if phase != "all":
            raise InputError(
                "phase='decode' needs a function that generates; on a text every token is read at once"
            )
        text = held_out(model, window) if evaluate is None else evaluate
        found = variant_losses(
            model,
            text,
            [named, *sets],
            mode=mode,
            means=means,
            window=window,
            budget=budget,
            together=True,
        )
        base, changes, interval, unit = found.base, found.changes, bootstrap, unit or "nats/token"
    dims = tuple(range(1, changes.dim()))
    effects = changes.nanmean(dims)
    excess = changes[0] - changes[1:].mean(0)
    edges = interval(torch.stack([changes[0], excess])).tolist()
    return CausalTwin(
        named,
        mode,
        unit,
        float(base.nanmean()),
        float(effects[0]),
        (edges[0][0], edges[0][1]),
        effects[1:].double(),
        sets,
        float(excess.nanmean()),
        (edges[1][0], edges[1][1]),
        layer_matched,
        int(torch.isfinite(base).sum()),
        time.perf_counter() - began,
    )


def _by_function(
    model: nn.Module,
    evaluate: Callable[[Any], Any],
    sets: Sequence[Any],
    mode: str,
    means: Any,
    phase: str,
) -> tuple[Tensor, Tensor]:
    """`[items]` of the untouched model and `[sets, items]`."""
    if mode == "mean":
        means = means.compute() if isinstance(means, MeanOutput) else means
        means = means if isinstance(means, dict) else mean_outputs(model, means)
    base = _items(evaluate(model))
    rows = []
    for heads in track(sets, "Silencing named and random heads"):
        with ablate(model, heads, mode, means=means, phase=phase):
            rows.append(_items(evaluate(model)))
    return base, torch.stack(rows)


def _items(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).detach().cpu().reshape(-1)
