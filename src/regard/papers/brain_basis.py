"""A brain basis of dynamical intelligence (arXiv 2105.07284): mechanisms that a perspective names, as models with a number each.

The paper has no equations and no experiments. The laboratory `brain-basis` makes five of its mechanisms runnable with equations
of this library's own; the claims below are the paper's statements in words, and every number is ours:

* states that hold themselves and give way form sequences (latching attention);
* oscillations select channels and carry a level by phase (phase gate, phase code);
* sparse, skewed, small-world networks with a rich club;
* learning gated by rare events.

Nothing here is a result of the paper, and nothing shows intelligence, energy efficiency or brain data.
"""

from __future__ import annotations

import math
from dataclasses import replace

from regard.labs.brain_basis import BrainBasis
from regard.labs.brain_basis.states import REGIMES, latching_part
from regard.labs.results import Check
from regard.papers import Claim, Paper, Run
from regard.papers import _brain_basis_runs as runs

WORDS = "stated in words; equations and bounds are this library's"
KAPPAS = (0.0, 0.125, 0.25, 0.375, 0.5)

PAPER = Paper(
    "brain-basis",
    claims=[
        Claim(
            "retrieval",
            "Without fatigue a state holds for ever: most different keys that latching attention visits",
            setting=WORDS,
            expect="1, as softmax retrieval",
        ),
        Claim(
            "regime 0.5",
            "Some fatigue makes long states that give way (3-11 keys, 49-114 steps each): furthest outside of these ranges",
            setting=WORDS,
            expect="within 20 % of the ranges, every seed",
        ),
        Claim(
            "regime 1",
            "More fatigue makes short states and long sequences (12-19 keys, 20-21 steps each): furthest outside of these ranges",
            setting=WORDS,
            expect="within 20 % of the ranges, every seed",
        ),
        Claim(
            "mixtures",
            "Too much fatigue leaves mixtures: largest share of time with one key on, at g = 2",
            setting=WORDS,
            expect="at most 1.2 %",
        ),
        Claim(
            "warm",
            "Sequences of states need sharp attention: largest share of time with a key on at beta = 3",
            setting=WORDS,
            expect="0",
        ),
        Claim(
            "noise-free",
            "Fatigue drives the sequence, not noise: share of seeds that move on without noise",
            setting=WORDS,
            expect="above one half",
        ),
        Claim(
            "related",
            "Related states follow each other without asymmetric weights: transitions within a group at an overlap of 0.2",
            setting=WORDS,
            expect="above 0.6, where chance is 0.16, beyond the 95 % interval over seeds",
        ),
        Claim(
            "unrelated",
            "... and without an overlap they follow by chance: transitions within a group",
            setting=WORDS,
            expect="0.16 within 0.15",
        ),
        Claim(
            "free",
            "... and at 0.2 the sequence still reaches other groups: different keys visited (a group has 4)",
            setting=WORDS,
            expect="above 4, beyond the 95 % interval over seeds",
        ),
        Claim(
            "trapped",
            "Strong overlap traps the sequence in its group: most different keys visited at 0.5",
            setting=WORDS,
            expect="at most 4",
        ),
        Claim(
            "leak",
            "What is out of phase is not heard: antiphase over in-phase weight, largest relative difference to exp(-2 kappa)",
            setting=WORDS,
            paper="0 (closed form)",
            expect="below 1e-12",
        ),
        Claim(
            "channel",
            "Phase selects between two senders: share of trials with the right message, kappa of 2 and more",
            setting=WORDS,
            expect="above 0.95, beyond its 95 % interval",
        ),
        Claim(
            "one cycle",
            "A channel opens and closes within one slow cycle: cycles until 95 % hear the other sender",
            setting=WORDS,
            expect="at most 1",
        ),
        Claim(
            "no gate",
            "Without the gate content alone decides: share of trials with the right message at kappa = 0",
            setting=WORDS,
            expect="0.5 within 0.05 or the interval",
        ),
        Claim(
            "advance",
            "Phase carries the level of the input: largest change of first-spike phase from a drive to the next higher one, rad",
            setting=WORDS,
            expect="below 0: always earlier",
        ),
        Claim(
            "rates",
            "A stronger drive also fires faster (7.3, 7.7, 15, 22.7, 30 Hz at drives 1.2 to 2): largest relative difference",
            setting="another simulation of the same equations",
            expect="below 20 %",
        ),
        Claim(
            "phases",
            "Its first spike comes at a phase of its own (3.51, 2.80, 2.34, 1.91, 1.43 rad): largest relative difference",
            setting="another simulation of the same equations",
            expect="below 20 %",
        ),
        Claim(
            "silent",
            "A drive just above threshold (1.05) is silenced by the rhythm: spikes a second",
            setting=WORDS,
            expect="0",
        ),
        Claim(
            "phase decodes",
            "... also where the rate is flat: drives 1.2 and 1.4 told apart from one cycle's phase, share right",
            setting=WORDS,
            expect="above 0.9",
        ),
        Claim(
            "count is blind",
            "... and spike counts cannot: the same from the number of spikes",
            setting=WORDS,
            expect="0.5 within 0.1",
        ),
        Claim(
            "closed form",
            "The neuron without rhythm fires at 1 / (t_ref + tau ln(I / (I - 1))): largest relative difference",
            setting="closed form",
            paper="0",
            expect="within 2 %",
        ),
        Claim(
            "sparse",
            "Sparse wiring: share of the possible edges",
            setting="biological networks are sparse, skewed and small-world, with a rich club",
            paper="activity below 1-2 %",
            expect="0.0197 within 20 %",
        ),
        Claim(
            "small world",
            "... can be small-world: index against degree-preserving shuffles",
            setting="biological networks are sparse, skewed and small-world, with a rich club",
            expect="above 3",
        ),
        Claim(
            "club",
            "... with a rich club: its density at the top decile over that of the shuffles",
            setting="biological networks are sparse, skewed and small-world, with a rich club",
            expect="above 1.3",
        ),
        Claim(
            "chance",
            "... which a uniform random network of equal density has not: its small-world index and rich-club ratio",
            setting="a control",
            expect="below 3 and below 1.3",
        ),
        Claim(
            "skewed",
            "Weights are skewed: Gini coefficient of lognormal weights",
            setting=WORDS,
            paper="0.52 (closed form)",
            expect="within 0.03",
        ),
        Claim(
            "gated error",
            "Rare events are enough to learn from: error of updates at surprising steps over that of every step",
            setting=WORDS,
            expect="at most 1.25, beyond the 95 % interval over seeds",
        ),
        Claim(
            "gated updates",
            "... with few updates: share of the steps",
            setting=WORDS,
            expect="at most 22 %, beyond the 95 % interval over seeds",
        ),
        Claim(
            "gated by chance",
            "... and the moments matter: error over that of as many random updates",
            setting=WORDS,
            expect="at most 0.5, beyond the 95 % interval over seeds",
        ),
        Claim(
            "identity",
            "A phase gate of kappa = 0 leaves a pretrained model as it is: largest change of a logit",
            setting="our addition",
            expect="exactly 0",
            holds=lambda change: change == 0,
        ),
        Claim(
            "smooth",
            "... and a weak one changes its attention smoothly: entropy over kappa, furthest from a parabola over its change",
            setting="our addition",
            expect="below 5 %",
        ),
        Claim(
            "place",
            "One event writes a place code: a head scan leads to a new place field on the next pass",
            setting="observed in rats",
            beyond="it needs a model of place cells and of behaviour; only the gating of updates by rare events is modelled here",
        ),
        Claim(
            "brains",
            "Such dynamics underlie intelligence, and save energy",
            setting="a perspective on brains",
            beyond="it is about brains and about artificial networks yet to be built; no model here can show it",
        ),
    ],
    needs=("matplotlib", "scipy"),
)


def experiment(run: Run) -> None:
    run.seed(0)
    lab = BrainBasis(
        steps=run.pick(quick=300, full=4000),
        seeds=run.pick(quick=2, full=20),
        trials=run.pick(quick=40, full=1000),
        cycles=run.pick(quick=4, full=60),
        nodes=run.pick(quick=100, full=500),
        networks=run.pick(quick=2, full=8),
        shuffles=run.pick(quick=1, full=3),
        updates=run.pick(quick=600, full=6000),
    )
    result = lab.run()
    few = replace(lab, seeds=min(lab.seeds, 5))  # the ranges are those of five seeds
    walks = few.regimes()
    checks = result.checks | {check.name: check for check in latching_part(few)[1]}
    where = {
        "latching": f"20 keys of 64 entries, beta 12, tau 30, {lab.steps:,} steps, {few.seeds} seeds",
        "sequences": f"5 groups of 4 keys, tau 40, g 0.6, {lab.steps:,} steps, {lab.seeds} seeds",
        "gate": f"two senders, random content of 16 entries, {lab.trials:,} trials",
        "spikes": f"leaky integrate-and-fire, 7.5 Hz inhibition, {lab.cycles} cycles, drives {lab.drives}",
        "network": f"{lab.nodes} nodes, {lab.networks} networks, {lab.shuffles} shuffles each",
        "learning": f"20 inputs, a new map every 500 steps, {lab.updates:,} steps, {lab.seeds} seeds",
    }
    kept, visited = (result.series[name] for name in ("within the group", "keys visited"))
    more = {
        "trapped": "means over seeds by overlap: share within the group "
        + ", ".join(f"{c:g}: {share:.2f}" for c, share in zip(kept.x, kept.measured, strict=True))
        + "; keys visited "
        + ", ".join(f"{c:g}: {n:.1f}" for c, n in zip(visited.x, visited.measured, strict=True)),
    }
    more |= {f"regime {g:g}": runs.told(walks[f"g = {g:g}"], REGIMES[g]) for g in REGIMES}
    for kind, names in {
        "latching": ("retrieval", "regime 0.5", "regime 1", "mixtures", "warm", "noise-free"),
        "sequences": ("related", "unrelated", "free", "trapped"),
        "gate": ("leak", "channel", "one cycle", "no gate"),
        "spikes": ("advance", "rates", "phases", "phase decodes", "count is blind", "closed form"),
        "network": ("sparse", "small world", "club", "skewed"),
        "learning": ("gated error", "gated updates", "gated by chance"),
    }.items():
        for name in names:
            record(run, name, checks[name], where[kind], more.get(name, ""))
    rate = result.series["rate"]
    quiet = float(rate.measured[rate.x == 1.05][0])
    run.record("silent", here=quiet, holds=quiet == 0, setting=where["spikes"])
    index, club = (checks[f"{name} of chance"] for name in ("small world", "club"))
    both = (index.holds, club.holds)
    run.record(
        "chance",
        here={"small-world index": index.measured, "rich-club ratio": club.measured},
        holds=False if False in both else None if None in both else True,
        setting=where["network"],
        note=f"means over networks, 95 % +- {index.error:.2g} and +- {club.error:.2g}",
    )
    record_gate(run)
    run.figure("latching", runs.draw_walks(walks, run.pick(quick=300, full=1200)), format="png")
    run.figure("sequences", result.plot(["within the group", "keys visited"]))
    run.figure("gate", result.plot(["leak", "turning to the other sender", "sender heard"]))
    run.figure("spikes", runs.draw_spikes(lab, result))
    run.figure("network", runs.draw_network(lab, result), format="png")
    run.figure("learning", result.plot(["learning", "updates"]))


def record(run: Run, name: str, check: Check, setting: str, more: str) -> None:
    """A check of the laboratory, with its interval where it has one."""
    if not math.isfinite(check.measured):
        note = "nothing was seen in so short a run"
        run.record(name, here=None, holds=None, setting=setting, note=note)
        return
    known = bool(check.error) and math.isfinite(check.error)
    bound = f"{check.sense} {check.predicted:.3g}" + (
        f" within {check.tolerance:.2g}" if check.tolerance else ""
    )
    notes = [f"checked against {bound}", check.why, more, "interval: 95 %" if known else ""]
    if check.holds is None:
        notes.append("the interval is too wide to tell")
    run.record(
        name,
        here=check.measured,
        interval=(check.measured - check.error, check.measured + check.error) if known else None,
        holds=check.holds,
        setting=setting,
        note="; ".join(note for note in notes if note),
    )


def record_gate(run: Run) -> None:
    """The phase gate in a pretrained model."""
    kappas, count, length = run.pick(quick=(KAPPAS[::2], 1, 48), full=(KAPPAS, 4, 256))
    found = runs.gate_model(run.model(), kappas, count, length)
    setting = f"SmolLM2-135M-Instruct (4-bit weights), {found['tokens']} tokens of English, period {runs.PERIOD} tokens"
    run.record("identity", here=found["identity"], setting=setting, note="scores plus zero")
    rough = runs.roughness(kappas, found["entropy"])
    values = ", ".join(
        f"{kappa:g}: {e:.3f}" for kappa, e in zip(kappas, found["entropy"], strict=True)
    )
    run.record(
        "smooth",
        here=rough,
        holds=rough < 0.05,
        setting=setting,
        note=f"mean entropy, nats, by kappa: {values}",
    )
    run.figure("entropy", runs.draw_gate(kappas, found["entropy"]))
