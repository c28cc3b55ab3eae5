"""Active-Dormant Attention Heads (arXiv 2410.13835): how extreme tokens form in a small model, and what a pretrained one shows.

The paper explains three extreme-token phenomena, attention sinks, value-state drains and residual-state peaks, by heads that are
active on some inputs and parked on the first token on others. Checked here on SmolLM2:

* the drain of the first token's value and the peak of its residual state, who writes the peak and who erases it;
* domain switching: which heads park on prose and not on code or the reverse, and whether silencing such a head costs more in
  the domain where it is active. Heads are chosen on one half of the windows, their cost is measured on the other half.

And in the laboratory `regard.labs.bigram_backcopy`: the flow of one query against its closed forms; transformers of one and of
three layers trained on Bigram-Backcopy, with ReLU attention and with SGD beside softmax and Adam.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from regard import texts
from regard.attach import Session
from regard.coordinates import Head
from regard.engine import Method
from regard.instruments.domains import DomainSensitivity, cut, domain_sensitivity
from regard.instruments.stream import ResidualPeaks
from regard.instruments.values import ValueDrain
from regard.instruments.writers import Writers
from regard.interventions import ZeroHeads
from regard.papers import Claim, Paper, Run
from regard.papers import _bigram_backcopy_runs as laboratory
from regard.papers._bigram_backcopy_claims import CLAIMS, record_laboratory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = 0.15
"""A head switches when its mean mass on the first token differs by more than this between two domains."""

FIRST = 1
"""The token that takes the first place of every window in the control: SmolLM2's <|im_start|>."""

PAPER = Paper(
    "active-dormant",
    claims=[
        Claim(
            "drain",
            "The first token's value is drained: its norm over the others', median of the heads while the peak lasts",
            setting="Bigram-Backcopy and Llama-2-7B",
            paper="near 0",
            expect="below 0.5",
            holds=lambda ratio: ratio < 0.5,
        ),
        Claim(
            "peak",
            "The first token's residual state is huge: its norm over the median of the others', mean while the peak lasts",
            setting="3-layer model and Llama-2-7B",
            paper="far above 1",
            unit=" x",
            expect="at least 30 x",
            holds=lambda ratio: ratio >= 30,
        ),
        Claim(
            "erased",
            "The last layers erase the peak: ratio after the last block over the largest ratio",
            setting="3-layer model: back to the others' level after the last block",
            paper="near 0",
            expect="below 0.2",
            holds=lambda share: share < 0.2,
        ),
        Claim(
            "written",
            "One early MLP writes the peak: the largest write of a single sub-layer, as a share of the peak",
            setting="first block of the 3-layer model",
            expect="above 0.5, by an MLP of the first half",
        ),
        Claim(
            "switch",
            f"Heads switch with the domain: heads whose mass on the first token differs by more than {LEAST}",
            setting="Llama-2-7B, layer 16 head 25, prose against code",
            paper="shown for one head",
            unit=" heads",
            expect="at least 5 heads, and as many in fewer than 1 % of permutations of the windows",
        ),
        Claim(
            "causal",
            "Silencing a switching head costs more in the domain where it is active: heads of the six largest for which it does",
            setting="Llama-2-7B, layer 16 head 25: code loss rises much more than prose loss",
            paper="shown for one head",
            unit=" of 6",
            expect="at least 4 of the 6 heads, on windows that were not used to choose them",
        ),
        Claim(
            "llama",
            "Layer 16 head 25 is dormant on Wikipedia and active on GitHub code",
            setting="Llama-2-7B",
            beyond="a model of 7B parameters is not at hand",
        ),
        Claim(
            "growth",
            "Sink logits grow like the logarithm of the step and the value drains during pre-training",
            setting="OLMo-7B checkpoints",
            beyond="checkpoints of a pre-training run are not at hand",
        ),
        *CLAIMS,
    ],
    needs=("matplotlib",),
)


def experiment(run: Run) -> None:
    small = laboratory.Scale(8, 10, 4, steps=10, relu_steps=10, deep_steps=10, logs=4, seeds=(0, 1))
    record_laboratory(run, run.pick(quick=small, full=laboratory.Scale()))
    measure_model(run)


def measure_model(run: Run) -> None:
    """Everything that is measured on the pretrained model."""
    model = run.model()
    windows, length = run.pick(quick=(2, 48), full=(16, 128))
    top = run.pick(quick=2, full=6)
    chosen, held = halves(model, windows, length)
    here = f"SmolLM2-135M-Instruct (4-bit weights), no BOS, {windows} + {windows} windows of {length} tokens, code and prose"
    extremes(run, model, torch.cat(list(chosen.values())), here)

    run.seed(0)
    permutations = run.pick(quick=200, full=5000)
    sensitivity = compare_domains(model, chosen, permutations)
    switching, chance = count_switching(sensitivity, permutations)
    same = {name: ids.index_fill(1, torch.tensor([0]), FIRST) for name, ids in chosen.items()}
    fixed = run.partial("fixed", lambda: count_switching(compare_domains(model, same, 99), 99)[0])
    differences = sorted(sensitivity.difference.items(), key=lambda pair: -abs(pair[1]))[:top]
    shown = ", ".join(f"{head} {gap:+.2f}" for head, gap in differences)
    run.record(
        "switch",
        here=switching,
        holds=switching >= 5 and chance < 0.01,
        setting=here,
        note=f"permutation p = {chance:.4f} for the number of heads; largest differences (code minus prose): {shown}; "
        f"{len(sensitivity.sensitive())} heads have p < 0.01 against the largest difference of any head; "
        f"with one and the same first token in every window {fixed} heads differ by more than {LEAST}",
    )

    heads = [head for head, _ in differences]
    losses = {
        name: run.partial(
            f"losses/{name}", lambda ids=ids: [loss(model, ids, head) for head in [None, *heads]]
        )
        for name, ids in run.progress(list(held.items()), "silencing heads")
    }
    costs = {name: torch.tensor(rows)[1:] - torch.tensor(rows)[0] for name, rows in losses.items()}
    contrasts = []
    for index, (_, gap) in enumerate(differences):
        busy, parked = ("prose", "code") if gap > 0 else ("code", "prose")
        low, high = interval(costs[busy][index], costs[parked][index])
        contrasts.append(
            (float(costs[busy][index].mean() - costs[parked][index].mean()), low, high)
        )
    more = sum(mean > 0 for mean, _, _ in contrasts)
    sure = sum(low > 0 for _, low, _ in contrasts)
    against = sum(high < 0 for _, _, high in contrasts)
    listed = ", ".join(
        f"{head} {mean:+.4f} [{low:+.4f}, {high:+.4f}]"
        for head, (mean, low, high) in zip(heads, contrasts, strict=True)
    )
    run.record(
        "causal",
        here=more,
        holds=more >= min(4, len(heads)),
        setting=f"{here}; cost on {windows} + {windows} other windows",
        note=f"cost in the active minus cost in the dormant domain, nats per token [95 % bootstrap]: {listed}; the interval lies "
        f"above 0 for {sure} and below 0 for {against} of {len(heads)} heads",
    )
    run.figure("domains", draw_domains(sensitivity))
    run.figure("costs", draw_costs(heads, costs))


def halves(
    model: nn.Module, windows: int, length: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Windows of each domain to choose heads on, and others to measure them on."""
    sources = {
        "code": texts.code(12 * windows * length),
        "prose": texts.prose(12 * windows * length),
    }
    ids = {name: cut(model, text, length) for name, text in sources.items()}
    first = {name: rows[:windows] for name, rows in ids.items()}
    return first, {name: rows[windows : 2 * windows] for name, rows in ids.items()}


def compare_domains(
    model: nn.Module, ids: dict[str, Tensor], permutations: int
) -> DomainSensitivity:
    """Dormancy of every head on the windows of both domains."""
    count, length = ids["code"].shape
    return domain_sensitivity(
        model,
        ids["code"],
        ids["prose"],
        names=("code", "prose"),
        windows=count,
        window=length,
        permutations=permutations,
    )


def extremes(run: Run, model: nn.Module, ids: Tensor, here: str) -> None:
    """Drain and peak, who writes the peak and what is left of it at the end."""
    peaks, writers, drains = ResidualPeaks(), Writers(), []
    for chunk in ids.split(max(1, len(ids) // 8)):
        drain = ValueDrain()
        with torch.inference_mode(), Session(model, peaks, writers, drain):
            model(input_ids=chunk)
        drains.append(drain.compute()["value drain"].matrix())
    skyline, writing = peaks.compute()[""], writers.compute()[""]
    norm, ratio = skyline.first_norm, skyline.records[..., 4] / skyline.records[..., 5]
    lasting = norm >= norm.max() / 2
    sites = lasting.nonzero()[:, 0].tolist()
    layers = [site for site in sites if site < len(norm) - 1]  # block l reads site l
    where = f"after blocks {sites[0] - 1} to {sites[-1] - 1}, where its norm is {norm[lasting].median():,.0f}"

    table = torch.stack(drains)[:, layers]  # [batches, layers, heads]
    run.record(
        "drain",
        here=round(float(table.mean(0).median()), 3),
        interval=interval(table.flatten(1).median(1).values),
        setting=here,
        note=f"blocks {layers[0]} to {layers[-1]}; interval: bootstrap over batches of windows",
    )
    lasting_ratio = ratio[:, lasting].mean(1)
    run.record(
        "peak",
        here=round(float(lasting_ratio.mean()), 1),
        interval=interval(lasting_ratio),
        setting=here,
        note=f"{where}; interval: bootstrap over windows",
    )
    share = ratio[:, -1] / ratio.amax(1)
    run.record(
        "erased",
        here=round(float(share.mean()), 3),
        interval=interval(share),
        setting=here,
        note=f"the first token ends at {ratio[:, -1].mean():.1f} x the others' norm, {norm[-1] / norm.max():.0%} of its own "
        f"largest norm; the largest erasers are {named(writing.erasers(3, sublayers=True))}",
    )
    writer = writing.writers(1, sublayers=True)[0]
    run.record(
        "written",
        here=round(writer.share, 3),
        holds=writer.share > 0.5
        and str(writer.site).endswith("mlp")
        and writer.layer < len(norm) // 2,
        setting=here,
        note=f"{writer.site} writes dimension {writing.dimension} of the first token; its neurons {named(writing.writers(2))}; "
        f"half of it goes by {named(writing.erasers(1))}",
    )
    run.figure("peak", draw_peak(skyline, writing, torch.stack(drains).mean((0, 2))))


def named(writes: list[Any]) -> str:
    """`mlp.11.n1229 (+72 %), ...`"""
    return ", ".join(f"{write.site} ({write.share:+.0%})" for write in writes)


def count_switching(sensitivity: DomainSensitivity, permutations: int) -> tuple[int, float]:
    """How many heads differ by more than `LEAST`, and how often a permutation of the windows gives as many."""
    code, prose = (torch.cat(list(s.values()), 1).double() for s in sensitivity.scores.values())
    every, count = torch.cat([code, prose]), len(code)

    def number(order: Tensor) -> int:
        rows = every[order]
        return int(((rows[:count].mean(0) - rows[count:].mean(0)).abs() > LEAST).sum())

    generator = torch.Generator().manual_seed(0)
    seen = number(torch.arange(len(every)))
    as_many = sum(
        number(torch.randperm(len(every), generator=generator)) >= seen for _ in range(permutations)
    )
    return seen, (1 + as_many) / (1 + permutations)


def loss(model: nn.Module, ids: Tensor, head: Head | None) -> list[float]:
    """The loss of each window in nats per token, with one head silenced."""
    methods: list[Method] = [] if head is None else [ZeroHeads([head])]
    losses = []
    for rows in ids.split(8):
        with torch.inference_mode(), Session(model, *methods):
            logits = model(input_ids=rows).logits[:, :-1]
        each = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        losses += each.view(len(rows), -1).double().mean(1).tolist()
    return losses


def interval(values: Tensor, minus: Tensor | None = None, draws: int = 5000) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean, or of the difference of the means of two independent samples."""
    generator = torch.Generator().manual_seed(1)

    def means(sample: Tensor) -> Tensor:
        picked = torch.randint(len(sample), (draws, len(sample)), generator=generator)
        return sample.double()[picked].mean(1)

    drawn = means(values) if minus is None else means(values) - means(minus)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype)).tolist()
    return low, high


def draw_peak(skyline: Any, writing: Any, drain: Tensor) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    axes[0].plot(skyline.first_norm.tolist(), label="first token")
    axes[0].plot(skyline.median_norm.tolist(), label="other tokens (median)")
    axes[0].set(yscale="log", xlabel="site (0 = embedding)", ylabel="residual norm", title="peak")
    axes[0].legend(frameon=False)
    writing.plot(axes[1])
    axes[1].set_title("who writes and who erases it")
    axes[2].plot(drain.tolist())
    axes[2].axhline(1, color="0.7", linewidth=0.8)
    axes[2].set(xlabel="layer", ylabel="|v_first| / mean |v|", title="value drain", ylim=(0, None))
    return figure


def draw_domains(sensitivity: DomainSensitivity) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(4.4, 4.2), layout="constrained")
    sensitivity.plot(ax)
    return figure


def draw_costs(heads: list[Head], costs: dict[str, Tensor]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    for shift, (name, table) in zip((-0.2, 0.2), costs.items(), strict=True):
        mean = table.mean(1)
        ends = torch.tensor([interval(row) for row in table])
        error = torch.stack([mean - ends[:, 0], ends[:, 1] - mean]).clamp_min(0)
        x = [i + shift for i in range(len(heads))]
        ax.bar(x, mean.tolist(), 0.4, yerr=error.numpy(), capsize=2, label=name)
    ax.axhline(0, color="0.4", linewidth=0.8)
    ax.set_xticks(range(len(heads)), [str(head) for head in heads])
    ax.set(ylabel="loss change, nats / token", title="one head silenced")
    ax.legend(frameon=False)
    return figure
