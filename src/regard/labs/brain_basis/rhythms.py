"""Phase gates and the phase code beside what is expected of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from regard.labs.brain_basis import phases, spikes
from regard.labs.brain_basis.comparing import columns, mean_of
from regard.labs.results import Check, Series

if TYPE_CHECKING:
    from regard.labs.brain_basis.laboratory import BrainBasis

SPIKING = {
    # drive: rate in Hz, phase of the first spike in rad
    1.05: (0.0, math.nan),
    1.2: (7.3, 3.51),
    1.4: (7.7, 2.80),
    1.6: (15.0, 2.34),
    1.8: (22.7, 1.91),
    2.0: (30.0, 1.43),
}
"""What the phase code did when it was measured before."""


def phases_part(lab: BrainBasis) -> tuple[list[Series], list[Check]]:
    generator = torch.Generator().manual_seed(lab.seed + 200)
    leaks = [measured_leak(kappa) for kappa in lab.kappas]
    theory = [phases.phase_leak(kappa) for kappa in lab.kappas]
    cycle = 32
    right, turn = phases.switch_sender(
        torch.tensor(lab.kappas, dtype=torch.float64), lab.trials, generator, cycle=cycle
    )
    at = int(turn)
    before, after = right[:, :at].mean(1).numpy(), right[:, at + cycle :].mean(1).numpy()
    bar = 1.96 * np.sqrt(np.maximum(after * (1 - after), 1e-12) / lab.trials)
    nothing = np.zeros(len(leaks))
    x = np.array(lab.kappas)
    series = [
        Series(
            "leak",
            x,
            np.array(leaks),
            nothing,
            np.array(theory),
            "kappa",
            "antiphase over in phase",
            log="y",
        ),
        Series(
            "sender heard",
            x,
            after,
            bar,
            np.full(len(x), np.nan),
            "kappa",
            "right message, share of trials",
        ),
    ]
    for kappa, row in zip(lab.kappas, right.numpy(), strict=True):
        time = (np.arange(len(row)) - at) / cycle
        series.append(
            Series(
                f"kappa = {kappa:g}",
                time[::4],
                row[::4],
                np.zeros(len(row[::4])),
                np.full(len(row[::4]), np.nan),
                "slow cycles since the turn",
                "right message, share of trials",
                panel="turning to the other sender",
            )
        )
    off = float(np.abs(np.array(leaks) / np.array(theory) - 1).max())
    checks = [
        Check(
            "leak",
            "A key in antiphase gets exp(-2 kappa) of one in phase: largest relative difference",
            off,
            0.0,
            tolerance=1e-12,
            why="rounding in float64",
        )
    ]
    strong = [i for i, kappa in enumerate(lab.kappas) if kappa >= 2]
    if strong:
        worst = min(strong, key=lambda i: min(after[i], before[i]))
        checks.append(
            Check(
                "channel",
                "The receiver hears the sender of its phase, before the turn and one cycle after it (kappa >= 2): share",
                float(min(after[worst], before[worst])),
                0.95,
                error=float(bar[worst]),
                sense=">",
            )
        )
        late = right[worst, at:].numpy()
        when = int(np.argmax(late > 0.95)) if (late > 0.95).any() else len(late)
        checks.append(
            Check(
                "one cycle",
                "... and has turned within one slow cycle: cycles until 95 % are right",
                when / cycle,
                1.0,
                sense="<",
            )
        )
    if 0.0 in lab.kappas:
        row = lab.kappas.index(0.0)
        checks.append(
            Check(
                "no gate",
                "Without a gate it hears either: share",
                float(after[row]),
                0.5,
                tolerance=0.05,
                error=float(bar[row]),
                why="0.05, or the trials' error bar",
            )
        )
    return series, checks


def spikes_part(lab: BrainBasis) -> tuple[list[Series], list[Check]]:
    drives = np.array(lab.drives)
    found = spikes.simulate(drives, lab.cycles, lab.seed)
    bare = spikes.simulate(drives, lab.cycles, lab.seed, depth=0.0, noise=0.0)
    closed = np.array([spikes.lif_rate(drive) for drive in lab.drives])
    first = [row[np.isfinite(row)] for row in found.first_phase]
    phase = [mean_of(row) if len(row) > 1 else (math.nan, math.nan) for row in first]
    rate = [mean_of(row * 7.5) for row in found.counts]
    heard = np.array([np.isfinite(middle) for middle, _ in phase])
    before_rate, before_phase = (
        np.array([SPIKING.get(d, (math.nan, math.nan))[i] for d in lab.drives]) for i in range(2)
    )
    series = [
        Series("rate", drives, *columns(rate), before_rate, "drive, thresholds", "spikes a second"),
        Series(
            "first-spike phase",
            drives[heard],
            *columns([p for p in phase if math.isfinite(p[0])]),
            before_phase[heard],
            "drive, thresholds",
            "phase from peak inhibition, rad",
        ),
        Series(
            "rate without rhythm",
            drives,
            bare.steady_rate,
            np.zeros(len(drives)),
            closed,
            "drive, thresholds",
            "spikes a second",
        ),
    ]
    fast = closed > 0
    gap = np.abs(bare.steady_rate[fast] / closed[fast] - 1).max() if fast.any() else math.nan
    middle = np.array([p[0] for p in phase])[heard]
    advance = (
        float(np.diff(middle[np.argsort(drives[heard])]).max()) if heard.sum() > 1 else math.nan
    )
    checks = [
        Check(
            "closed form",
            "Without rhythm and noise the rate is 1 / (t_ref + tau ln(I / (I - 1))): largest relative difference",
            float(gap),
            0.0,
            tolerance=0.02,
            why="steps of 0.1 ms",
        ),
        Check(
            "advance",
            "A stronger drive spikes earlier in the cycle: largest change of phase to the next drive, rad",
            advance,
            0.0,
            sense="<",
        ),
    ]
    known = np.isfinite(before_rate) & (before_rate > 0)
    if known.any():
        rates = np.array([r[0] for r in rate])
        checks.append(
            Check(
                "rates",
                "Rates as measured before: largest relative difference",
                float(np.abs(rates[known] / before_rate[known] - 1).max()),
                0.2,
                sense="<",
                why="20 %",
            )
        )
        seen = np.isfinite(before_phase) & heard
        apart = (
            np.abs(np.array([p[0] for p in phase])[seen] / before_phase[seen] - 1).max()
            if seen.any()
            else math.nan
        )
        checks.append(
            Check(
                "phases",
                "Phases as measured before: largest relative difference",
                float(apart),
                0.2,
                sense="<",
                why="20 %",
            )
        )
    if {1.2, 1.4} <= set(lab.drives):
        one, two = (lab.drives.index(d) for d in (1.2, 1.4))
        by_phase = spikes.decode(found.first_phase[one], found.first_phase[two])
        by_count = spikes.decode(found.counts[one], found.counts[two])
        checks += [
            Check(
                "phase decodes",
                "Drives 1.2 and 1.4 are told apart by the phase of one cycle: share right",
                by_phase,
                0.9,
                sense=">",
            ),
            Check(
                "count is blind",
                "... and hardly by the number of its spikes: share right",
                by_count,
                0.5,
                tolerance=0.1,
                why="0.1: nearly every cycle has one spike",
            ),
        ]
    return series, checks


def measured_leak(kappa: float | int) -> float:
    """Weight of a key in antiphase over that of one in phase, of equal content."""
    query = torch.ones(1, 1, 4, dtype=torch.float64)
    phase = torch.tensor([[0.0, math.pi]], dtype=torch.float64)
    weights = phases.phase_gated_attention(
        query,
        query.expand(1, 2, 4),
        torch.eye(2, dtype=torch.float64)[None],
        phase[:, :1],
        phase,
        kappa,
    )
    return float(weights[0, 0, 1] / weights[0, 0, 0])
