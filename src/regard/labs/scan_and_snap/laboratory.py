"""The laboratory: predictions beside the dynamics and beside training on sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from regard._errors import InputError
from regard.labs.results import Check, Result, Series, interval
from regard.labs.scan_and_snap.dynamics import (
    Classes,
    crossing,
    decoder_time,
    early_growth,
    entropy,
    follow,
    late_exponent,
    local_exponent,
    make_classes,
    relative_growth,
    token_mass,
)
from regard.labs.scan_and_snap.sampled import (
    train_sampled,
)
from regard.labs.settings import Lab, setting


@dataclass(frozen=True, kw_only=True)
class ScanAndSnap(Lab):
    """The laboratory: the long-sequence flow against the theorems, and training on sampled sequences.

    The first group of settings is the long-sequence model (plain gradient flow), the second training on sequences with momentum.
    """

    name: ClassVar[str] = "scan-and-snap"
    classes: int = setting(20, "next tokens K, each with its own last token", low=2, high=200)
    common_mass: float = setting(0.2, "probability of the one common token", above=0, below=1)
    distinct: tuple[float, ...] = setting(
        (0.05, 0.1, 0.15, 0.2, 0.3),
        "weights of the distinct tokens of a class",
        above=0,
        high=1e6,
        least=2,
        most=50,
    )
    rate_decoder: float = setting(2.0, "eta_Y", above=0, high=100)
    rate_attention: float = setting(0.05, "eta_Z", above=0, high=100)
    horizon: float = setting(3000.0, "time of the flow", low=10, high=1e6)
    step: float = setting(
        1.0, "step size of gradient descent, in the flow's time", above=0, high=10
    )
    sweep_rates: tuple[float, ...] = setting(
        (1.0, 2.0, 4.0), "eta_Y of the sweep", above=0, high=100, most=32
    )
    sweep_classes: tuple[int, ...] = setting((10, 20), "K of the sweep", low=2, high=200, most=8)
    last: int = setting(3, "sampled: last tokens", low=1, high=50)
    each: int = setting(2, "sampled: next tokens of each last token", low=1, high=10)
    length: int = setting(128, "sampled: tokens of a sequence", low=2, high=4096)
    batch: int = setting(128, "sampled: sequences of a step", low=1, high=10_000)
    steps: int = setting(100, "sampled: steps", low=1, high=100_000)
    momentum: float = setting(0.9, "sampled: momentum", low=0, below=1)
    sampled_attention: float = setting(2.0, "sampled: eta_Z", above=0, high=100)
    ratios: tuple[float, ...] = setting(
        (1.0, 2.0, 5.0, 10.0), "sampled: eta_Y / eta_Z", above=0, high=1000, most=32
    )
    seeds: int = setting(3, "sampled: runs of each ratio", low=2, high=256)
    seed: int = setting(0, "first of the random seeds", low=0, high=2**31)

    def check(self) -> None:
        if len(set(self.distinct)) < 2:
            raise InputError.of(
                "distinct",
                given=self.distinct,
                expected="at least two different weights",
                fix="growth compares them",
            )
        start, _ = decoder_time(self.classes, self.tokens, self.rate_decoder)
        if self.horizon < 2 * start:
            raise InputError.of(
                "horizon",
                given=self.horizon,
                expected=f"at least {2 * start:.4g}, where snapping begins",
            )
        if self.last * self.each < 2:
            raise InputError.of(
                "last",
                given=self.last,
                expected="at least 2 when each is 1",
                fix="one class has nothing in common",
            )

    @property
    def tokens(self) -> int:
        """M, the vocabulary."""
        return 1 + self.classes * (len(self.distinct) + 2)

    def population(self, classes: int | None = None) -> Classes:
        """The classes of the long-sequence model."""
        own = np.array(self.distinct) / sum(self.distinct) * (1 - self.common_mass)
        return make_classes(classes or self.classes, 1, [self.common_mass], own.tolist())

    def official(self) -> Classes:
        """The classes of the sampled model: 10 common tokens of weight 1, 10 distinct ones of weights 0.1 to 1."""
        return make_classes(self.last, self.each, [1.0] * 10, np.linspace(0.1, 1, 10).tolist())

    def run(self) -> Result:
        return Result.of(self, self._flow(), self._sweep(), self._sampled())

    def times(self) -> np.ndarray:
        """Logged times, whole numbers of steps."""
        grid = np.geomspace(self.step, self.horizon, 60)
        return np.unique(np.rint(np.r_[0, grid] / self.step)) * self.step

    def _flow(self) -> tuple[list[Series], list[Check]]:
        classes, times = self.population(), self.times()
        rates = np.array(self.rate_decoder), np.array(self.rate_attention)
        solved = follow(classes, *rates, times)
        walked = follow(classes, *rates, times, step=self.step)
        first, second = decoder_time(self.classes, self.tokens, self.rate_decoder)
        late = times > 0
        drive, walked_drive = solved.drive[:, 0], walked.drive[:, 0]
        early = early_growth(times, classes, self.rate_decoder, self.rate_attention)
        chi = relative_growth(solved, classes)
        unit = classes.probability[0] / np.linalg.norm(classes.probability[0])
        lowest = float(unit[classes.distinct[0]].max() ** 2)
        band = chi[late] / (2 * drive[late, None])
        common = -solved.attention[:, 0, 0]
        mass = token_mass(solved.attention[:, 0], classes.probability[0])
        walked_mass = token_mass(walked.attention[:, 0], classes.probability[0])
        exponent = local_exponent(times[late], drive[late])
        at = times[late]
        residual = solved.residual[:, 0]
        decay = local_exponent(at, residual[late])
        blank = np.full(late.sum(), np.nan)
        nothing = np.zeros(late.sum())
        series = [
            Series(
                "B",
                at,
                walked_drive[late],
                nothing,
                drive[late],
                "time",
                "B, growth",
                panel="growth",
                log="xy",
            ),
            Series(
                "scanning law",
                at[at <= first],
                drive[late][at <= first],
                nothing[at <= first],
                early[late][at <= first],
                "time",
                "B, growth",
                panel="scanning",
                log="xy",
            ),
            Series(
                "exponent",
                at,
                exponent,
                nothing,
                np.where(
                    at < first / 3,
                    2.0,
                    np.where(
                        at > second,
                        [
                            late_exponent(
                                max(t, second), self.classes, self.tokens, self.rate_decoder
                            )
                            for t in at
                        ],
                        np.nan,
                    ),
                ),
                "time",
                "d ln B / d ln t",
                log="x",
            ),
            Series(
                "residual",
                at,
                residual[late],
                nothing,
                np.where(at > second, self.classes / (self.rate_decoder * at), np.nan),
                "time",
                "1 - alpha",
                log="xy",
            ),
            Series(
                "ln chi",
                at,
                chi[late].mean(-1),
                nothing,
                blank,
                "time",
                "ln chi",
                panel="relative growth",
                log="xy",
            ),
            Series(
                "2 B (upper)",
                at,
                2 * drive[late],
                nothing,
                2 * drive[late],
                "time",
                "ln chi",
                panel="relative growth",
                log="xy",
            ),
            Series(
                "2 f^2 B (lower)",
                at,
                2 * lowest * drive[late],
                nothing,
                2 * lowest * drive[late],
                "time",
                "ln chi",
                panel="relative growth",
                log="xy",
            ),
            Series(
                "entropy",
                at,
                entropy(walked_mass)[late],
                nothing,
                entropy(mass)[late],
                "time",
                "entropy of c, nats",
                log="x",
            ),
        ]
        summed = np.abs(solved.attention.sum(-1)).max() / max(np.abs(solved.attention).max(), 1e-12)
        exact = float(common[-1] / drive[-1])
        start_share = float(1 - unit[0] ** 2)
        end_unit = mass[-1] / np.linalg.norm(mass[-1])
        checks = [
            Check(
                "fates",
                "Logged times at which some distinct token does not rise or the common one does not fall",
                float((~solved.rising[1:]).sum() + (~walked.rising[1:]).sum()),
                0.0,
                why="a theorem about signs",
            ),
            Check(
                "upper",
                "ln chi / 2B, its largest value over times and tokens",
                float(band.max()),
                1.0,
                tolerance=0.01,
                sense="<",
                why="1 %: the solver and the history in Y",
            ),
            Check(
                "lower",
                "ln chi / 2B, its smallest value over times and tokens",
                float(band.min()),
                lowest,
                tolerance=0.01 * lowest,
                sense=">",
                why="1 %: the solver and the history in Y",
            ),
            Check(
                "scan",
                "Exponent of B while scanning (t below a third of K ln M / eta_Y)",
                float(exponent[(at < first / 3) & (at >= min(2.0, first / 4))].mean()),
                2.0,
                tolerance=0.2,
                why="0.2: the decoder is not exactly linear before t0'",
            ),
            Check(
                "snap",
                f"Exponent of B at the end of snapping (t = {times[-1]:g})",
                float(exponent[-2:].mean()),
                late_exponent(float(times[-1]), self.classes, self.tokens, self.rate_decoder),
                tolerance=0.06,
                why="0.06: corrections to the law are of relative order 1 / ln t",
            ),
            Check(
                "residual",
                "Exponent of the residual 1 - alpha at the end",
                float(decay[-2:].mean()),
                -1.0,
                tolerance=0.05,
                why="0.05: logarithmic corrections",
            ),
            Check(
                "conserved",
                "sum of z over tokens, against the largest z",
                float(summed),
                0.0,
                tolerance=1e-5,
                why="the solver's accuracy",
            ),
            Check(
                "common",
                "-z_c / B at the end: the theorem has 1, the equation of motion a mean of 1 - f_c^2",
                exact,
                1.0,
                tolerance=0.01,
                why="1 %: the theorem states equality",
            ),
            Check(
                "common, exact",
                "-z_c / B at the end lies where 1 - f_c^2 went: distance to that range",
                max(0.0, start_share - exact, exact - float(1 - end_unit[0] ** 2)),
                0.0,
                tolerance=1e-4,
                why="the solver's accuracy",
            ),
            Check(
                "descent",
                "Gradient descent follows the flow: largest relative difference in B after t = 10 steps",
                float(
                    (np.abs(walked_drive - drive) / np.maximum(drive, 1e-12))[
                        times >= 10 * self.step
                    ].max()
                ),
                0.0,
                tolerance=0.15,
                why="B ~ t^2 early: descent is one step late, 10 to 15 % at its tenth step",
            ),
        ]
        return series, checks

    def _sweep(self) -> tuple[list[Series], list[Check]]:
        """When growth slows to less than linear, for several K and eta_Y."""
        rates, series, ratios = np.array(self.sweep_rates), [], []
        for count in self.sweep_classes:
            classes = self.population(count)
            tokens = classes.probability.shape[1]
            slowest = decoder_time(count, tokens, float(rates.min()))[1]
            step = self.step * min(1.0, 2 / float(rates.max()))
            times = np.unique(np.rint(np.geomspace(4 * step, 4 * slowest, 90) / step)) * step
            course = follow(
                classes, rates, np.full(len(rates), self.rate_attention / 10), times, step=step
            )
            exponent = local_exponent(times, course.drive[..., 0])
            found = np.array([crossing(times, exponent[:, r]) for r in range(len(rates))])
            theory = np.array([decoder_time(count, tokens, float(rate))[0] for rate in rates])
            ratios += (found / theory).tolist()
            series.append(
                Series(
                    f"K = {count}",
                    rates,
                    found,
                    np.zeros(len(rates)),
                    theory,
                    "eta_Y",
                    "time when growth slows (line: K ln M / eta_Y)",
                    panel="phase transition",
                    log="xy",
                )
            )
        ratio = np.array(ratios)
        checks = [
            Check(
                "transition, low",
                "Time when B grows slower than linearly over K ln M / eta_Y: smallest of the sweep",
                float(ratio.min()),
                1.0,
                sense=">",
                why="the theorem: scanning lasts until then",
            ),
            Check(
                "transition, high",
                "The same, largest of the sweep",
                float(ratio.max()),
                2.0,
                tolerance=0.2,
                sense="<",
                why="snapping has begun at 2 (1 + o(1)) K ln M / eta_Y; 10 % for the o(1)",
            ),
        ]
        return series, checks

    def _sampled(self) -> tuple[list[Series], list[Check]]:
        """Entropy of attention against eta_Y / eta_Z, and the fates of tokens."""
        classes = self.official()
        ratio = np.repeat(self.ratios, self.seeds)
        rate = np.full(len(ratio), self.sampled_attention)
        trained = train_sampled(
            classes,
            ratio * rate,
            rate,
            length=self.length,
            batch=self.batch,
            steps=self.steps,
            momentum=self.momentum,
            seed=self.seed,
        )
        z = trained.attention[:, classes.last]
        spread = entropy(token_mass(z, classes.probability)).mean(-1).reshape(-1, self.seeds)
        mean, half = interval(spread, 1)
        x = np.array(self.ratios)
        series = [
            Series(
                "sampled",
                x,
                mean,
                half,
                np.full(len(x), np.nan),
                "eta_Y / eta_Z",
                "entropy of c, nats",
                panel="final entropy",
                log="x",
            )
        ]
        order = np.argsort(x)
        checks = []
        if len(x) > 1:
            steps = np.diff(spread[order], axis=0)
            gain, bar = interval(steps, 1)
            least = int((gain - bar).argmin())
            checks.append(
                Check(
                    "entropy",
                    "Entropy rises with eta_Y / eta_Z: the smallest rise between neighbours, nats",
                    float(gain[least]),
                    0.0,
                    error=float(bar[least]),
                    sense=">",
                    why="the theorem orders them",
                )
            )
        # rows that several classes share: a token's z is relative to what its class draws
        own = [z[:, n][:, classes.distinct[n]] for n in range(len(classes.last))]
        common = z[..., classes.common].mean((1, 2))
        lead = np.mean([part.mean(1) for part in own], 0) - common
        middle, bar = interval(lead.reshape(-1, self.seeds).mean(0))
        checks.append(
            Check(
                "sampled fates",
                "Mean z of distinct tokens minus that of common ones, after training on sequences",
                float(middle),
                0.0,
                error=float(bar),
                sense=">",
                why="the theorem gives the sign",
            )
        )
        grid = np.sort(classes.probability[0][classes.distinct[0]])
        by_weight = np.mean(
            [
                part[:, np.argsort(classes.probability[n][classes.distinct[n]])]
                for n, part in enumerate(own)
            ],
            0,
        )
        mean, half = interval(by_weight.reshape(len(x), self.seeds, -1).mean(0))
        series.append(
            Series(
                "distinct",
                grid,
                mean,
                half,
                np.full(len(grid), np.nan),
                "P(l | n)",
                "z after training on sequences",
                panel="fates of tokens",
            )
        )
        at = classes.probability[0][classes.common][:1]
        level, bar = interval(common.reshape(len(x), self.seeds).mean(0))
        series.append(
            Series(
                "common",
                at,
                level[None],
                bar[None],
                np.full(1, np.nan),
                "P(l | n)",
                "z after training on sequences",
                panel="fates of tokens",
            )
        )
        return series, checks
