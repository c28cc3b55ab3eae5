"""What massive activations are for: cap them, dose by dose, and measure what the model loses.

Each massive entry (stream.py has the rule) is clamped to a fraction of its natural size at every site where it lives; everything
else stays. The response is the change of held-out loss, of the attention on the first token and of attention entropy. The control
sets the same number of random other dimensions of the same tokens to 0.

Massive activations act as fixed biases that feed the attention sink (Sun et al., arXiv 2402.17762): setting them to 0 destroys a
model, setting random entries to 0 does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from regard._errors import InputError
from regard._progress import progress
from regard.attach import Session
from regard.engine import Method, State
from regard.instruments.entropy import Entropy
from regard.instruments.sinks import SinkMass
from regard.instruments.stream import ResidualPeaks, Skyline, site_of

if TYPE_CHECKING:
    import polars
    from matplotlib.axes import Axes

FRACTIONS = (1.0, 0.5, 0.25, 0.1, 0.03, 0.01, 0.0)


class CapMassive(Method):
    """Clamps massive entries to a fraction of their natural size and leaves every other entry alone.

    Args:
        natural: for each residual site (0 = embedding, l + 1 = after block l) the natural size of each massive dimension.
        thresholds: for each of these sites the size from which an entry counts as massive.
        fraction: what is left of it.
        instead: dimensions that are set to 0 at the massive tokens in place of the massive ones (the control).
    """

    def __init__(
        self,
        natural: dict[int, dict[int, float]],
        thresholds: dict[int, float],
        fraction: float | int,
        *,
        instead: Sequence[int] = (),
        stack: str = "",
    ) -> None:
        if not 0 <= fraction <= 1:
            raise InputError.of("fraction", given=fraction, expected="from 0 to 1")
        self.natural, self.thresholds, self.fraction = natural, thresholds, float(fraction)
        self.instead, self.stack = list(instead), stack

    def residual(self, state: State) -> Tensor | None:
        site = site_of(state)
        if state.stack != self.stack or site is None or site not in self.natural:
            return None
        dimensions = list(self.natural[site])
        entries = state.hidden[..., dimensions]
        massive = entries.abs() >= self.thresholds[site]
        if not bool(massive.any()):
            return None
        hidden = state.hidden.clone()
        if self.instead:
            chosen = hidden[..., self.instead]
            hidden[..., self.instead] = chosen.masked_fill(massive.any(-1, keepdim=True), 0)
            return hidden
        limit = entries.new_tensor([self.fraction * self.natural[site][d] for d in dimensions])
        hidden[..., dimensions] = torch.where(massive, entries.clamp(-limit, limit), entries)
        return hidden


class _Width(Method):
    """Notes the size of a stack's residual stream."""

    def __init__(self, stack: str) -> None:
        self.stack, self.dim = stack, 0

    def residual(self, state: State) -> None:
        if state.part == "embed" and state.stack == self.stack:
            self.dim = state.hidden.shape[-1]


@dataclass(frozen=True, slots=True)
class Change:
    """A mean change over sequences with a bootstrap interval."""

    mean: float
    low: float
    high: float


@dataclass(slots=True)
class Dose:
    """The response to capping at `fraction` of the natural size, against the untouched model."""

    fraction: float
    nll: Change
    sink: Change
    entropy: Change


@dataclass(slots=True)
class DoseResponse:
    """Dose-response of the massive activations of one stack.

    Attributes:
        natural: for each site the natural size of each massive dimension.
        doses: the response at each fraction (nats per token; share of attention on the first key; nats).
        controls: change of loss for each draw of random dimensions set to 0 (nats per token).
        nll, sink, entropy: the untouched model.
        tokens: predicted tokens the loss is averaged over; sequences: the number of windows.
    """

    natural: dict[int, dict[int, float]]
    doses: list[Dose]
    controls: list[float]
    nll: float
    sink: float
    entropy: float
    tokens: int
    sequences: int
    stack: str = ""
    drawn: list[list[int]] = field(default_factory=list)

    def __getitem__(self, fraction: float | int) -> Dose:
        for dose in self.doses:
            if dose.fraction == fraction:
                return dose
        known = [dose.fraction for dose in self.doses]
        raise InputError.of("fraction", given=fraction, expected=f"one of {known}")

    def to_frame(self) -> polars.DataFrame:
        """One row for each dose (needs the `frames` extra)."""
        import polars

        rows = [
            {"fraction": dose.fraction}
            | {
                f"{name}{end}": getattr(getattr(dose, name), key)
                for name in ("nll", "sink", "entropy")
                for end, key in (("", "mean"), ("_low", "low"), ("_high", "high"))
            }
            for dose in self.doses
        ]
        return polars.DataFrame(rows)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Change of loss against the dose, controls at the right edge (needs the `plot` extra)."""
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
        x = range(len(self.doses))
        y = [dose.nll.mean for dose in self.doses]
        error = [
            [max(d.nll.mean - d.nll.low, 0) for d in self.doses],
            [max(d.nll.high - d.nll.mean, 0) for d in self.doses],
        ]
        ax.errorbar(x, y, yerr=error, marker="o", capsize=3, label="massive dimensions")
        ax.plot(
            [len(x) - 1] * len(self.controls), self.controls, "x", label="random dimensions at 0"
        )
        labels = [f"{dose.fraction:g}" for dose in self.doses]
        ax.set_xticks(list(x), labels)
        ax.set(xlabel="share of the natural size that is left", ylabel="loss change, nats / token")
        ax.legend()
        return ax


def natural_sizes(
    skyline: Skyline, *, ratio: float | int = 1000, floor: float | int = 100
) -> tuple[dict[int, dict[int, float]], dict[int, float]]:
    """For each site with massive activations: the mean size of each massive dimension, and the threshold of the rule."""
    sums: dict[int, dict[int, list[float]]] = {}
    for item in skyline.massive:
        sums.setdefault(item.site, {}).setdefault(item.dimension, []).append(abs(item.value))
    natural = {
        site: {d: sum(values) / len(values) for d, values in sorted(table.items())}
        for site, table in sorted(sums.items())
    }
    return natural, {site: max(ratio * float(skyline.median[site]), floor) for site in natural}


def dose_response(
    model: nn.Module,
    input_ids: Int[Tensor, "sequences tokens"],
    *,
    probe: Int[Tensor, "probes tokens"] | None = None,
    fractions: Sequence[float | int] = FRACTIONS,
    controls: int = 8,
    ratio: float | int = 1000,
    floor: float | int = 100,
    seed: int = 0,
    stack: str = "",
) -> DoseResponse:
    """Caps massive activations at fractions of their natural size and measures loss, sink mass and entropy.

    Args:
        model: a causal language model.
        input_ids: windows of text without padding. The loss is that of the next token within each window.
        probe: windows on which massive activations and their sizes are found. When None, the first quarter of `input_ids` (at
            least one) is used for it and the rest is held out.
        fractions: the doses, 1 = natural size, 0 = gone.
        controls: draws of random dimensions, as many as there are massive ones, set to 0 at the same tokens and sites.
        ratio, floor: the rule for massive activations, as in `ResidualPeaks`.

    Returns:
        a `DoseResponse`; intervals are 95 % bootstrap intervals over windows of the paired difference.

    Cost: (1 + doses) observed forward passes and `controls` plain ones for each window.

    Raises:
        InputError: too few windows, or no activation that is massive by the rule.
    """
    if probe is None:
        cut = max(1, len(input_ids) // 4)
        probe, input_ids = input_ids[:cut], input_ids[cut:]
    if len(input_ids) < 2 or input_ids.shape[1] < 2:
        raise InputError.of(
            "input_ids",
            given=tuple(input_ids.shape),
            expected="at least two held-out windows of two tokens",
        )
    peaks, width = ResidualPeaks(ratio, floor), _Width(stack)
    with torch.inference_mode(), Session(model, peaks, width):
        for window in probe:
            model(input_ids=window[None])
    skyline = peaks.compute()[stack]
    natural, thresholds = natural_sizes(skyline, ratio=ratio, floor=floor)
    if not natural:
        site = int((skyline.peak / skyline.median).argmax())
        raise InputError(
            f"no activation is massive (>= {ratio:g} x median and > {floor:g}); the largest is {float(skyline.peak[site]):.3g}, "
            f"{float(skyline.peak[site] / skyline.median[site]):.0f} x the median; lower ratio or floor"
        )
    massive = sorted({d for table in natural.values() for d in table})
    generator = torch.Generator().manual_seed(seed)
    others = torch.tensor([d for d in range(width.dim) if d not in massive])
    drawn = [
        others[torch.randperm(len(others), generator=generator)[: len(massive)]].tolist()
        for _ in range(controls)
    ]
    with progress(
        (1 + len(fractions) + controls) * len(input_ids), "Capping massive activations"
    ) as step:
        base = _measure(model, input_ids, None, step, stack)
        doses = []
        for fraction in fractions:
            cap = CapMassive(natural, thresholds, fraction, stack=stack)
            after = _measure(model, input_ids, cap, step, stack)
            changes = [_change(row, generator) for row in (after - base).T]
            doses.append(Dose(float(fraction), *changes))
        effects = []
        for dimensions in drawn:
            cap = CapMassive(natural, thresholds, 0.0, instead=dimensions, stack=stack)
            after = _measure(model, input_ids, cap, step, stack, loss_only=True)
            effects.append(float((after[:, 0] - base[:, 0]).mean()))
    tokens = len(input_ids) * (input_ids.shape[1] - 1)
    nll, sink, entropy = base.mean(0).tolist()
    return DoseResponse(
        natural, doses, effects, nll, sink, entropy, tokens, len(input_ids), stack, drawn
    )


def _measure(
    model: nn.Module,
    windows: Tensor,
    cap: Method | None,
    step: Callable[[], object],
    stack: str,
    *,
    loss_only: bool = False,
) -> Float[Tensor, "windows 3"]:
    """Loss, sink mass and entropy of each window."""
    rows = []
    for window in windows:
        sink, entropy = SinkMass(), Entropy()
        reading = [] if loss_only else [sink, entropy]
        methods = [*([] if cap is None else [cap]), *reading]
        with torch.inference_mode(), Session(model, *methods):
            logits = model(input_ids=window[None]).logits[0, :-1].float()
        row = [float(cross_entropy(logits, window[1:])), 0.0, 0.0]
        if reading:
            row[1] = float(sink.compute()["sink mass"].matrix(stack).nanmean())
            row[2] = float(entropy.compute()["entropy"].matrix(stack).nanmean())
        rows.append(row)
        step()
    return torch.tensor(rows, dtype=torch.float64)


def _change(differences: Float[Tensor, " windows"], generator: torch.Generator) -> Change:
    draws = torch.randint(len(differences), (2000, len(differences)), generator=generator)
    means = differences[draws].mean(-1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return Change(float(differences.mean()), low, high)
