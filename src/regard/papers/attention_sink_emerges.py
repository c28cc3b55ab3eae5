"""When Attention Sink Emerges in Language Models (arXiv 2410.10781): a sink by a number, and what training makes it.

The paper defines an attention sink by a number and asks what produces it. Checked here on a pretrained model:

* the sink rate on four kinds of text (prose, code, random tokens, one repeated token), `Sinks`;
* the norms and the angle behind it, `ValueDrain`, `ResidualPeaks`, `QueryKeyAngle`;
* its closed forms for a repeated token, on random-weight models without and with rotary positions.

And on models trained here, some arms of the laboratory `sink-emergence`: the default run, a token fixed at position 1 or 2,
attention without normalisation (sigmoid), and a learnt key with value 0 that takes the sink over. They have 160,000 parameters
and read a million bytes; the paper's have 60 million and read five billion tokens. The laboratory has the other arms too
(learning rate, weight decay, amount of data, masks, positions, kernels, other biases), which are not recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard import texts
from regard.attach import Session
from regard.engine import Block, Method
from regard.instruments.geometry import QueryKeyAngle
from regard.instruments.sinks import Sinks
from regard.instruments.stream import ResidualPeaks
from regard.instruments.values import ValueDrain
from regard.papers import Claim, Paper, Run
from regard.papers import _sink_emergence_runs as runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("prose", "code", "random", "repeat")
LENGTH, EPS = 64, 0.3
HERE = "SmolLM2-135M-Instruct (4-bit weights), no BOS, {n} sequences of 64 tokens, eps 0.3"

PAPER = Paper(
    "attention-sink-emerges",
    claims=[
        Claim(
            "prose",
            "Most heads sink on natural text: sink rate of the first token, Sink_1",
            setting="T = 64, eps = 0.3, open models of 1.5B to 8B parameters",
            paper="77.0 % (GPT2-XL) to 99.0 % (Llama3-8B)",
            unit=" %",
            expect="above 50 %",
            holds=lambda rate: rate > 50,
        ),
        Claim(
            "code",
            "The sink does not depend on the kind of text: Sink_1 on Python code",
            setting="the paper compares data sets; code is our addition",
            unit=" %",
            expect="above 50 %",
            holds=lambda rate: rate > 50,
        ),
        Claim(
            "random",
            "The first token is a sink whatever it is: Sink_1 on uniformly random tokens",
            setting="T = 64, eps = 0.3",
            paper="70.3 % (GPT2-XL) to 91.2 % (Llama3-8B)",
            unit=" %",
            expect="at least 50 %",
            holds=lambda rate: rate >= 50,
        ),
        Claim(
            "repeat",
            "One token repeated has no sink in models with rotary positions: Sink_1",
            setting="T = 64, eps = 0.3, Llama and Mistral",
            paper="0.0 %",
            unit=" %",
            expect="exactly 0",
            holds=lambda rate: rate == 0,
        ),
        Claim(
            "value",
            "The sink adds little: norm of the first value over the others', median over layers",
            setting="figure on norms, no number",
            paper="small",
            expect="below 0.5",
            holds=lambda ratio: ratio < 0.5,
        ),
        Claim(
            "key",
            "The first key is small too: norm of the first key over the others', median over layers",
            setting="figure on norms, no number",
            paper="small",
            expect="below 1",
            holds=lambda ratio: ratio < 1,
        ),
        Claim(
            "hidden",
            "The first hidden state is huge: its norm over the median of the others', largest over layers",
            setting="figure on norms, no number",
            paper="large",
            unit=" x",
            expect="at least 10 x",
            holds=lambda ratio: ratio >= 10,
        ),
        Claim(
            "angle",
            "Queries point at the first key: share of the sink heads with cos(q, k_1) above the mean of cos(q, k_j)",
            setting="figure on angles: it is the angle, not the norm, that makes the sink",
            paper="all shown",
            unit=" %",
            expect="every sink head (100 %)",
            holds=lambda share: share == 100,
        ),
        Claim(
            "nope",
            "A repeated token without position encoding attends evenly: max |A[t, i] - 1/t|",
            setting="closed form",
            paper="0",
            expect="below 1e-5",
            holds=lambda gap: gap < 1e-5,
        ),
        Claim(
            "rope",
            "A repeated token with rotary positions obeys A[t, i] <= e^2ξ / (e^2ξ + t - 1): largest A over its bound, t > 1",
            setting="closed form, ξ = |q| |k| / sqrt(d)",
            paper="at most 1",
            expect="at most 1, in every row",
            holds=lambda ratio: ratio <= 1,
        ),
        *runs.claims(),
        Claim(
            "learned",
            "Learned absolute positions keep the sink on a repeated token",
            setting="GPT2-XL",
            paper="62.3 %",
            beyond="no pretrained model with learned absolute positions is among the embedded ones",
        ),
        Claim(
            "size",
            "Sigmoid attention without normalisation has no sink at 1B parameters",
            setting="1B parameters, 100B tokens",
            paper="2.5 % against 45.1 % (softmax)",
            beyond="it needs pre-training at a size that this machine cannot do",
        ),
    ],
    needs=("matplotlib",),
)


def experiment(run: Run) -> None:
    model = run.model()
    count = run.pick(quick=4, full=100)
    data = sequences(model, count, run.seed(0))
    found = {
        kind: run.partial(kind, lambda ids=ids: measure(model, ids))
        for kind, ids in run.progress(list(data.items()), "kinds of text")
    }
    here = HERE.format(n=count)
    for kind in KINDS:
        rates = torch.tensor(found[kind]["rates"])
        seen = f"{len(data[kind])} sequences, {len(set(data[kind][:, 0].tolist()))} different first tokens"
        run.record(
            kind,
            here=round(float(rates.mean()), 2),
            interval=bootstrap(rates),
            setting=here,
            note=f"interval: 95 % bootstrap over sequences; {seen}",
        )
    prose = found["prose"]
    for claim, name in (("value", "value drain"), ("key", "key norm ratio")):
        layers = torch.tensor(prose[name])  # [sequences chunks, layers]
        median = layers.median(1).values
        run.record(
            claim,
            here=round(float(layers.mean(0).median()), 3),
            interval=bootstrap(median),
            setting=f"{here}, prose",
            note="layer values are means over heads and sequences; interval: bootstrap over batches of sequences",
        )
    ratio = torch.tensor(prose["hidden ratio"])  # [sequences, sites]
    site = int(ratio.mean(0).argmax())
    run.record(
        "hidden",
        here=round(float(ratio[:, site].mean()), 1),
        interval=bootstrap(ratio[:, site]),
        setting=f"{here}, prose",
        note=f"after block {site - 1}, where the first token's norm is {torch.tensor(prose['first norm'])[:, site].mean():,.0f}",
    )
    sinks = torch.tensor(prose["importance"]) > EPS
    gap = torch.tensor(prose["angle"])
    share = 100 * float((gap[sinks] > 0).float().mean())
    run.record(
        "angle",
        here=round(share, 2),
        setting=f"{here}, prose, after RoPE",
        note=f"{int(sinks.sum())} of {sinks.numel()} heads have a mean importance above eps; the smallest difference of cosines "
        f"among them is {float(gap[sinks].min()):.2f}; of the others {float((gap[~sinks] > 0).float().mean()):.0%} are above 0",
    )
    closed_forms(run)
    run.figure("sink-rates", draw_rates(found))
    run.figure("norms", draw_norms(prose))
    run.figure("angles", draw_angles(prose))
    runs.record_training(run)


def sequences(model: nn.Module, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """`[count, 64]` token ids of each kind of text; no kind starts with a special token."""
    tokenizer: Any = model.tokenizer
    vocabulary = tokenizer.vocab_size
    ordinary = max(tokenizer.all_special_ids, default=-1) + 1
    ids = torch.randint(ordinary, vocabulary, (count, LENGTH), generator=generator)
    one = torch.randint(ordinary, vocabulary, (count, 1), generator=generator)
    room = 1200 * count
    return {
        "prose": passages(tokenizer, texts.prose(min(room, 110_000)), "\n\n", count),
        "code": passages(tokenizer, texts.code(3 * room), "\n\n\n", count),
        "random": ids,
        "repeat": one.expand(-1, LENGTH).contiguous(),
    }


def passages(tokenizer: Any, text: str, gap: str, count: int) -> Tensor:
    """The first 64 tokens of `count` passages that do not overlap and begin where a paragraph begins."""
    rows, held = [], ""
    for part in text.split(gap):
        held = held + gap + part if held else part
        ids = tokenizer(held, add_special_tokens=False)["input_ids"]
        if len(ids) >= LENGTH:
            rows.append(ids[:LENGTH])
            held = ""
        if len(rows) == count:
            break
    return torch.tensor(rows)


def measure(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """Everything this paper reads, on `[sequences, 64]` ids."""
    sinks, angle, peaks = Sinks(EPS), QueryKeyAngle(), ResidualPeaks()
    ratios: dict[str, list[Tensor]] = {"value drain": [], "key norm ratio": []}
    for chunk in ids.split(max(1, min(10, len(ids) // 2))):
        drain = ValueDrain()
        with torch.inference_mode(), Session(model, sinks, angle, peaks, drain):
            model(input_ids=chunk)
        for name, rows in ratios.items():
            rows.append(drain.compute()[name].matrix().mean(1))
    result, skyline = sinks.compute(), peaks.compute()[""]
    importance = torch.cat(
        [torch.stack(batch) for batch in zip(*result.importance.values.values(), strict=True)], 1
    )  # [layers, sequences, heads, tokens]
    return {
        "rates": 100 * (importance[..., 0] > EPS).float().mean((0, 2)),
        "by position": 100 * (importance[..., :16] > EPS).float().mean((0, 1, 2)),
        "importance": importance[..., 0].mean(1),
        "angle": angle.compute()["angle to first key"].matrix(),
        "hidden ratio": skyline.records[..., 4] / skyline.records[..., 5],
        "first norm": skyline.records[..., 4],
        "other norm": skyline.records[..., 5],
        **{name: torch.stack(rows) for name, rows in ratios.items()},
    }


def bootstrap(values: Tensor, draws: int = 5000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean."""
    picked = torch.randint(
        len(values), (draws, len(values)), generator=torch.Generator().manual_seed(1)
    )
    means = values.double()[picked].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


class Rows(Method):
    """All attention rows of a short input, and the largest |q| |k| of each layer."""

    reads_only = True

    def __init__(self) -> None:
        self.weights_of: dict[int, Tensor] = {}
        self.reach: dict[int, Tensor] = {}

    def weights(self, block: Block) -> None:
        self.weights_of[block.site.layer] = block.weights.clone()

    def after(self, call: Any) -> None:
        query, key = call.query.norm(dim=-1).amax(-1), call.key.norm(dim=-1).amax(-1)
        key = key.repeat_interleave(call.group, 1)
        self.reach[call.site.layer] = query * key * call.scaling


class NoPositions(nn.Module):
    """Takes the place of the rotary embedding and rotates by nothing."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden: Tensor, *args: Any, **rest: Any) -> tuple[Tensor, Tensor]:
        cos, sin = self.rotary(hidden, *args, **rest)
        return torch.ones_like(cos), torch.zeros_like(sin)


def random_llama(seed: int, *, positions: bool) -> nn.Module:
    """A Llama of random weights in float64, with sharp attention so that the closed forms are not met by accident."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).double().eval()
    if not positions:
        model.model.rotary_emb = NoPositions(model.model.rotary_emb)  # type: ignore[assignment]
    return model


def closed_forms(run: Run) -> None:
    """Both closed forms for a repeated token, over seeds."""
    even = 1 / torch.arange(1, LENGTH + 1, dtype=torch.float64)
    gaps, ratios, spread, reached, ordinary = [], [], [], [], []
    seeds = range(run.pick(quick=1, full=5))
    for seed in seeds:
        generator = run.seed(seed)
        token = torch.randint(128, (1, 1), generator=generator)
        repeated = token.expand(1, LENGTH).contiguous()
        several = torch.randint(128, (1, LENGTH), generator=generator)
        for positions in (False, True):
            model, rows, contrast = random_llama(seed, positions=positions), Rows(), Rows()
            with torch.inference_mode(), Session(model, rows):
                hidden = model(input_ids=repeated, output_hidden_states=True).hidden_states
            spread.append(max(float((h - h[:, :1]).abs().max()) for h in hidden))
            if not positions:
                lower = torch.ones(LENGTH, LENGTH, dtype=torch.float64).tril()
                for weights in rows.weights_of.values():
                    gaps.append(float((weights - lower * even[:, None]).abs().max()))
                with torch.inference_mode(), Session(model, contrast):
                    model(input_ids=several)
                first = contrast.weights_of[0]
                ordinary.append(float((first - lower * even[:, None]).abs().max()))
                continue
            for layer, weights in rows.weights_of.items():
                xi = rows.reach[layer][..., None]
                t = torch.arange(1, LENGTH + 1, dtype=torch.float64)
                bound = 1 / (1 + (t - 1) * torch.exp(-2 * xi))
                ratios.append(float((weights.amax(-1) / bound)[..., 1:].max()))
                reached.append(float(weights[..., -1, :].amax() * LENGTH))
    setting = f"random-weight Llama, 4 layers x 4 heads, float64, T = 64, {len(seeds)} seed(s)"
    run.record(
        "nope",
        here=max(gaps),
        setting=setting,
        note=f"largest over layers, heads and seeds; on ordinary tokens the same model differs by up to {max(ordinary):.2f}",
    )
    run.record(
        "rope",
        here=max(ratios),
        setting=setting,
        note=f"the last row still reaches {max(reached):.1f} times 1/t; hidden states of all positions agree "
        f"to {max(spread):.0e}",
    )


def draw_rates(found: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    names = {
        "prose": "English prose",
        "code": "Python code",
        "random": "random tokens",
        "repeat": "one token",
    }
    for index, kind in enumerate(KINDS):
        rates = found[kind]["by position"][:8]
        x = [k + 1 + 0.2 * (index - 1.5) for k in range(len(rates))]
        ax.bar(x, rates, 0.2, label=names[kind])
    ax.set(xlabel="key position k", ylabel="Sink_k, % of heads", title="Who is the sink?")
    ax.legend(frameon=False)
    return figure


def draw_norms(prose: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    first, other = (torch.tensor(prose[name]).mean(0) for name in ("first norm", "other norm"))
    left.plot(first.tolist(), label="first token")
    left.plot(other.tolist(), label="other tokens (median)")
    left.set(yscale="log", xlabel="site (0 = embedding)", ylabel="norm", title="hidden states")
    left.legend(frameon=False)
    for name, label in (("value drain", "values"), ("key norm ratio", "keys, after RoPE")):
        right.plot(torch.tensor(prose[name]).mean(0).tolist(), label=label)
    right.axhline(1, color="0.7", linewidth=0.8)
    right.set(
        xlabel="layer",
        ylabel="first / others",
        title="norm of the first key and value",
        ylim=(0, None),
    )
    right.legend(frameon=False)
    return figure


def draw_angles(prose: dict[str, Any]) -> Figure:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(4.6, 3.4), layout="constrained")
    importance, gap = torch.tensor(prose["importance"]), torch.tensor(prose["angle"])
    ax.axhline(0, color="0.7", linewidth=0.8)
    ax.axvline(EPS, color="0.7", linewidth=0.8, linestyle="--")
    ax.plot(importance.flatten().tolist(), gap.flatten().tolist(), ".", markersize=4, alpha=0.7)
    ax.set(
        xlabel="importance of the first key",
        ylabel="cos(q, k_1) − mean cos(q, k_j)",
        title="one dot a head",
    )
    return figure
