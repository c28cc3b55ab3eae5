"""PowerAttention (arXiv 2503.03588): key blocks at power-of-two distances, and how far information travels through them.

Checked here:

* the counts of blocks that can influence the last one, layer by layer, against the closed forms;
* the block-sparse computation against a masked dense one;
* a passkey task trained from scratch under four patterns of equal budget: accuracy by distance, and linear probes by layer;
* SmolLM2 under these patterns without any training: loss on ordinary text, and needles.

Beyond our scale: continued pretraining of a 7B model, and the GPU kernels' speed.
"""

from __future__ import annotations

from math import comb
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from regard.attach import attach
from regard.engine import waves
from regard.papers import Claim, Paper, Run
from regard.papers._passkey_flow import KEYS, Setting, train
from regard.sparse import Dilated, LongNet, Pattern, Power, Sliding, Strided, reach
from regard.texts import needle_prompts, prose

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHANCE = 1 / KEYS
BUDGET = 6  # key blocks of the last query block in the passkey task: distances 0, 1, 2, 4, 8 and 16

PAPER = Paper(
    "powerattention",
    claims=[
        Claim(
            "reach",
            "Blocks that can influence the last one grow exponentially with depth: counts that differ from the closed forms",
            setting="sum of binomials for the pure pattern; 128 and 512 blocks, all layers up to full coverage",
            paper="exponential; a sliding window grows linearly",
            expect="0 of all counts",
            holds=lambda wrong: wrong == 0,
        ),
        Claim(
            "sparsity",
            "Share of the attention matrix that is not computed at 32,768 tokens, blocks of 256",
            setting="window of 5 blocks, 1 sink block",
            paper="94 %",
            unit=" %",
            expect="at least 92 %",
            holds=lambda share: share >= 92,
        ),
        Claim(
            "exact",
            "The block-sparse computation equals masked dense attention: largest difference in float64",
            setting="not in the paper: a check of the implementation",
            expect="below 1e-6",
            holds=lambda worst: worst < 1e-6,
        ),
        Claim(
            "passkey",
            "Trained under the power pattern, a passkey is found at every distance: mean accuracy over all block distances",
            setting="Qwen2-7B, continued pretraining, passkeys up to 128K tokens",
            paper="100 %",
            unit=" %",
            expect="at least 95 %, and at least 85 % at the worst distance",
        ),
        Claim(
            "sliding",
            "A sliding window of the same budget does not find it beyond its reach: accuracy there",
            setting="Qwen2-7B, passkeys beyond about 9 x 28 blocks",
            paper="not found",
            unit=" %",
            expect="at most 5 points above chance (6.25 %)",
        ),
        Claim(
            "dilated",
            "A dilated window of the same budget does not find it at odd distances: accuracy there",
            setting="the paper names the holes of dilated patterns",
            paper="not found",
            unit=" %",
            expect="at most 5 points above chance (6.25 %)",
        ),
        Claim(
            "better",
            "Power against the best static pattern of the same budget: mean accuracy over distances, difference in points",
            setting="RULER and passkey tasks, Qwen2-7B",
            paper="+5 to +40 %",
            unit=" points",
            expect="at least 5 points",
            holds=lambda points: points >= 5,
        ),
        Claim(
            "probe",
            "A probe of the last token jumps from chance when the reach gets to the passkey: accuracy where it cannot be known",
            setting="linear classifier by layer, Qwen2-7B",
            paper="chance before the theoretical reach",
            unit=" %",
            expect="at most 5 points above chance before; at least 90 % after the last layer",
        ),
        Claim(
            "untrained",
            "Without training the pattern hurts no more than a sliding window of the same budget: loss difference, nats a token",
            setting="not in the paper, which always trains",
            unit=" nats",
            expect="at most 0.1 nats worse",
            holds=lambda nats: nats <= 0.1,
        ),
        Claim(
            "hybrid",
            "Full attention in 2 of 7 layers brings back what the pattern loses on needles: share of the lost log-probability",
            setting="the paper's RULER runs use this hybrid",
            unit=" %",
            expect="more than half",
            holds=lambda share: share > 50,
        ),
        Claim(
            "speed",
            "At 128K the kernel is 21.6 x faster than full attention and 5.3 x faster than MInference, 3.0 x end to end",
            setting="GPU kernels",
            paper="21.6 x",
            beyond="it is a statement about GPU kernels; our ratios on a processor are in the benchmarks",
        ),
    ],
    needs=("matplotlib",),
)


def experiment(run: Run) -> None:
    wrong, total = closed_forms()
    run.record("reach", here=wrong, note=f"{total} counts compared, all integers")
    lists = Power(block=256).lists(32768, 32768)
    pairs = sum(map(len, lists))
    run.record(
        "sparsity",
        here=round(100 * (1 - pairs / 128**2), 1),
        note=f"{pairs} of 128 x 128 block pairs; the last query block sees {len(lists[-1])} of 128."
        f" Of the causal half, {100 * (1 - pairs / (128 * 129 / 2)):.1f} % is not computed",
    )
    run.seed(0)
    run.record("exact", here=deviation(), note="300 tokens, blocks of 16, grouped heads")

    setting = run.pick(
        quick=Setting(tokens=32, layers=2, width=32, batch=8, steps=3, samples=64),
        full=Setting(steps=220),
    )
    found = passkeys(run, setting)
    record_passkeys(run, setting, found)
    run.figure("passkey", draw_accuracy(found))
    run.figure("probe", draw_probes(setting, found))
    run.figure("reach", reach(Power(window=1, sinks=0, block=1), 64, 6).plot())
    pretrained(run)


def closed_forms() -> tuple[int, int]:
    """Counts of `reach` that differ from the closed forms, and how many were compared."""
    cases: list[tuple[Pattern, int, list[int]]] = []
    for power in (7, 9):
        blocks = 2**power
        pure = [sum(comb(power, i) for i in range(layer + 1)) for layer in range(1, power + 1)]
        cases.append((Power(window=1, sinks=0, block=1), blocks, pure))
        cases.append((Sliding(window=9, sinks=0, block=1), blocks, [9 + 8 * i for i in range(8)]))
    cases.append((Power(block=1), 128, [10, 35, 75, 110, 126, 128]))
    cases.append((Power(block=1), 512, [12, 54, 152, 292, 418, 488, 510, 512]))
    wrong = total = 0
    for pattern, blocks, expected in cases:
        got = reach(pattern, blocks, len(expected)).counts()
        wrong += sum(min(e, blocks) != g for e, g in zip(expected, got, strict=True))
        total += len(expected)
    return wrong, total


def deviation(tokens: int = 300, block: int = 16) -> float:
    """The largest difference of the power pattern from masked dense attention, outputs and gradients."""
    query = torch.randn(1, 6, tokens, 16, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, 1, 2, tokens, 16, dtype=torch.float64, requires_grad=True).unbind()
    distance = (torch.arange(tokens) // block)[:, None] - torch.arange(tokens) // block
    near = (distance & (distance - 1) == 0) | (distance < 5) | (torch.arange(tokens) < block)
    mask = near & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    dense = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    mask = Power(block=block).one(tokens, tokens)
    plan = mask.plan(tokens)  # the tiles, whatever would be faster at this length
    sparse = waves.attend(query, key, value, plan, query.shape[-1] ** -0.5)
    weight = torch.randn_like(dense)
    worst = float((dense - sparse).detach().abs().max())
    for one, other in zip(
        torch.autograd.grad(dense, (query, key, value), weight),
        torch.autograd.grad(sparse, (query, key, value), weight),
        strict=True,
    ):
        worst = max(worst, float((one - other).abs().max()))
    return worst


def patterns(block: int) -> dict[str, list[Pattern]]:
    """Four patterns of equal budget, without sinks (a sink block would be a shortcut to the first tokens)."""
    return {
        "full": [],
        "power": [Power(window=1, sinks=0, block=block)],
        "sliding": [Sliding(window=BUDGET, sinks=0, block=block)],
        "dilated": [Dilated(window=BUDGET, dilation=2, sinks=0, block=block)],
    }


def passkeys(run: Run, setting: Setting) -> dict[str, list[dict[str, Any]]]:
    """Every pattern's runs, one a seed."""
    seeds = run.pick(quick=[0], full=[0])
    cases = [(seed, name) for seed in seeds for name in patterns(setting.block)]
    found: dict[str, list[dict[str, Any]]] = {name: [] for _, name in cases}
    for seed, name in run.progress(cases, "training"):
        run.seed(seed)
        chosen = patterns(setting.block)[name]
        kept = run.partial(f"{name}/{seed}", lambda p=chosen, s=seed: train(setting, p, s))
        found[name].append(kept)
    return found


def mean(found: list[dict[str, Any]], field: str = "accuracy") -> Tensor:
    """The mean over seeds."""
    return torch.tensor([one[field] for one in found]).mean(0)


def hops_to(setting: Setting, pattern: Pattern) -> Tensor:
    """Layers that the last block needs for each block distance; its own block takes one, since the key is another token."""
    hops = reach(pattern, setting.tokens, setting.layers + 1).hops[-1].flip(0).long()
    return hops.clamp_min(1)


def record_passkeys(run: Run, setting: Setting, found: dict[str, list[dict[str, Any]]]) -> None:
    here = (
        f"{setting.layers} layers, {setting.tokens} tokens in blocks of {setting.block}, {BUDGET} blocks a query,"
        f" {setting.steps} steps, {len(found['power'])} seed(s)"
    )
    accuracy = {name: 100 * mean(runs) for name, runs in found.items()}
    kinds = patterns(setting.block)
    power, worst = accuracy["power"], int(accuracy["power"].argmin())
    run.record(
        "passkey",
        here=round(float(power.mean()), 1),
        holds=bool(power.mean() >= 95 and power.min() >= 85),
        setting=here,
        note=f"worst {float(power[worst]):.0f} % at distance {worst} ({worst.bit_count()} hops of {setting.layers} layers);"
        f" full attention after the same {setting.steps} steps {float(accuracy['full'].mean()):.1f} %,"
        f" chance {100 * CHANCE:.2f} %",
    )
    for name in ("sliding", "dilated"):
        hops = hops_to(setting, kinds[name][0])
        inside, outside = hops <= setting.layers, hops > setting.layers
        far = float(accuracy[name][outside].mean()) if bool(outside.any()) else None
        run.record(
            name,
            here=None if far is None else round(far, 1),
            holds=None if far is None else far <= 100 * CHANCE + 5,
            setting=here,
            note=f"{int(outside.sum())} of {setting.blocks} distances are out of reach; within reach"
            f" {float(accuracy[name][inside].mean()):.1f} %",
        )
    rivals = {name: float(accuracy[name].mean()) for name in ("sliding", "dilated")}
    best = max(rivals, key=lambda name: rivals[name])
    run.record(
        "better",
        here=round(float(power.mean()) - rivals[best], 1),
        setting=here,
        note=", ".join(f"{name} {value:.1f} %" for name, value in rivals.items()),
    )
    probes, hops = 100 * mean(found["power"], "probes"), hops_to(setting, kinds["power"][0])
    layer = torch.arange(len(probes))[:, None]
    before = float(probes[layer < hops].mean())
    run.record(
        "probe",
        here=round(before, 1),
        holds=bool(before <= 100 * CHANCE + 5 and probes[-1].mean() >= 90),
        setting=here,
        note=f"ridge regression; where it can be known {float(probes[layer >= hops].mean()):.1f} %, after the last layer"
        f" {float(probes[-1].mean()):.1f} %; sliding window after the last layer"
        f" {100 * float(mean(found['sliding'], 'probes')[-1].mean()):.1f} %",
    )


def pretrained(run: Run) -> None:
    """SmolLM2 under each pattern: loss on prose, log-probability of needles."""
    model, tokens, block = run.model(), run.pick(quick=64, full=512), run.pick(quick=4, full=16)
    sparse = lambda layer: layer % 7 >= 2  # noqa: E731  (2 of 7 layers stay full)
    kinds: dict[str, list[Pattern]] = {
        "dense": [],
        "power": [Power(window=2, sinks=1, block=block)],
        "sliding": [Sliding(window=BUDGET, sinks=1, block=block)],
        "dilated": [Dilated(window=BUDGET, sinks=1, block=block)],
        "strided": [Strided(window=3, stride=8, sinks=1, block=block)],
        "LongNet": [LongNet(segments=(4, 16, 64), dilations=(1, 4, 16), block=block)],
        "power, 2 of 7 full": [Power(window=2, sinks=1, block=block, layers=sparse)],
        "sliding, 2 of 7 full": [Sliding(window=BUDGET, sinks=1, block=block, layers=sparse)],
    }
    count = run.pick(quick=1, full=2)
    ids = torch.tensor(model.tokenizer(prose(8 * tokens * count))["input_ids"])
    windows = ids[: tokens * count].view(count, tokens)
    losses = {
        name: run.partial(f"loss/{name}", lambda p=chosen: loss(model, windows, p))
        for name, chosen in run.progress(list(kinds.items()), "text")
    }
    own = {name: round(value - losses["dense"], 3) for name, value in losses.items()}
    where = f"SmolLM2-135M-Instruct (4-bit weights), blocks of {block}, 7 of {tokens // block} blocks for the last query"
    run.record(
        "untrained",
        here=round(losses["power"] - losses["sliding"], 3),
        setting=f"{where}; {count} windows of {tokens} tokens of prose",
        note=f"dense {losses['dense']:.3f} nats a token; more than that: "
        + ", ".join(f"{name} {value:+.3f}" for name, value in own.items() if name != "dense"),
    )
    asked = ("dense", "power", "sliding", "power, 2 of 7 full", "sliding, 2 of 7 full")
    prompts = needle_prompts(
        model.tokenizer,
        lengths=[run.pick(quick=150, full=400)],
        depths=run.pick(quick=[0.3], full=[0.2, 0.5]),
        needles=run.pick(quick=1, full=3),
    )
    needles = {
        name: run.partial(f"needles/{name}", lambda p=kinds[name]: answers(model, prompts, p))
        for name in run.progress(asked, "needles")
    }
    lost = needles["dense"] - needles["power"]
    run.record(
        "hybrid",
        here=round(100 * (needles["power, 2 of 7 full"] - needles["power"]) / lost, 1),
        setting=f"{where}; {len(prompts)} needle prompts",
        note="mean log-probability of an answer token: "
        + ", ".join(f"{name} {value:.2f}" for name, value in needles.items()),
    )


@torch.inference_mode()
def loss(model: Any, windows: Tensor, chosen: list[Pattern]) -> float:
    """Nats a token."""
    with attach(model, *chosen):
        found = [float(model(input_ids=w[None], labels=w[None]).loss) for w in windows]
    return sum(found) / len(found)


@torch.inference_mode()
def answers(model: Any, prompts: list[Any], chosen: list[Pattern]) -> float:
    """Mean log-probability of the tokens of the right answer, given after the prompt."""
    scores = []
    with attach(model, *chosen):
        for prompt in prompts:
            ids = torch.cat([prompt.ids, prompt.answer_ids])
            size = len(prompt.answer_ids)
            logits = model(input_ids=ids[None], logits_to_keep=size + 1).logits[0, :-1].float()
            scores.append(logits.log_softmax(-1).gather(1, ids[-size:, None]).mean())
    return float(torch.stack(scores).mean())


def draw_accuracy(found: dict[str, list[dict[str, Any]]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 3.2), layout="constrained")
    for name, runs in found.items():
        ax.plot((100 * mean(runs)).tolist(), marker=".", lw=1, label=name)
    ax.axhline(100 * CHANCE, color="0.6", lw=0.8, ls="--")
    ax.set(xlabel="distance of the passkey, blocks", ylabel="accuracy, %", ylim=(0, 104))
    ax.legend(fontsize=8)
    return figure


def draw_probes(setting: Setting, found: dict[str, list[dict[str, Any]]]) -> Figure:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True, layout="constrained")
    for ax, name in zip(axes, ("power", "sliding"), strict=True):
        probes, hops = (
            mean(found[name], "probes"),
            hops_to(setting, patterns(setting.block)[name][0]),
        )
        ax.imshow(100 * probes, aspect="auto", vmin=0, vmax=100, origin="lower")
        ax.step(
            range(len(hops)), hops.clamp_max(setting.layers + 1) - 0.5, where="mid", color="w", lw=1
        )
        ax.set(title=name, xlabel="distance of the passkey, blocks")
    axes[0].set(ylabel="after layer")
    figure.colorbar(axes[0].images[0], ax=axes, label="probe accuracy, %")
    return figure
