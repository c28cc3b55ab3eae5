"""A forward pass as a walk: where the state of each token is after every layer, and which part made it move.

    h_{l+1} = h_l + a_l + m_l           a_l what attention adds, m_l what the MLP adds,  l = 0 .. L - 1

    path = sum_l |h_{l+1} - h_l|,   displacement = |h_L - h_0|,   tortuosity = path / displacement
    nearest token at l: argmax_w U_w . N(h_l)                     U output embeddings, N the final norm

The view is that of arXiv 2308.10874, which describes walks in words; the measures are ours. A first token's state is often a
sink, thousands of times longer than the others': leave it out of averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from regard._errors import InputError, ModelError
from regard.attach import Session
from regard.engine import Method, State
from regard.pretrained import tokenizer_of

if TYPE_CHECKING:
    import polars
    from matplotlib.axes import Axes

NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "final_norm")
"""Names under which decoders hold the norm before their output layer."""


@dataclass(frozen=True, slots=True)
class Walk:
    """States and steps of every token."""

    states: Float[Tensor, "sites batch tokens width"]
    attention: Float[Tensor, "layers batch tokens width"]
    mlp: Float[Tensor, "layers batch tokens width"]

    def gap(self) -> float:
        """The largest `|h_L - h_0 - sum_l (a_l + m_l)| / |h_L|` of any token: rounding, when the parts are all there are."""
        apart = self.states[-1] - self.states[0] - self.attention.sum(0) - self.mlp.sum(0)
        return float((apart.norm(dim=-1) / self.states[-1].norm(dim=-1)).max())

    def steps(self) -> Float[Tensor, "steps batch tokens width"]:
        """Attention and MLP in turn."""
        return torch.stack([self.attention, self.mlp], 1).flatten(0, 1)


@dataclass(frozen=True, slots=True)
class WalkMeasures:
    """Numbers of a walk, for each token.

    Attributes:
        attention, mlp: step lengths, by layer.
        path, displacement, tortuosity: see the module.
        turning: cosine between one layer's step and the next.
        attention_heading, mlp_heading: cosine of a step with the whole displacement.
    """

    attention: Float[Tensor, "layers batch tokens"]
    mlp: Float[Tensor, "layers batch tokens"]
    path: Float[Tensor, "batch tokens"]
    displacement: Float[Tensor, "batch tokens"]
    tortuosity: Float[Tensor, "batch tokens"]
    turning: Float[Tensor, "turns batch tokens"]
    attention_heading: Float[Tensor, "layers batch tokens"]
    mlp_heading: Float[Tensor, "layers batch tokens"]

    def attention_share(self, skip: int = 0) -> Float[Tensor, " layers"]:
        """What part of a layer's two step lengths is attention's: the mean over tokens after the first `skip`."""
        return (self.attention / (self.attention + self.mlp))[..., skip:].flatten(1).mean(1)


@dataclass
class WalkRecorder(Method):
    """Keeps the residual stream of one forward pass; O(layers x tokens x width) memory.

    >>> from regard.nn import LanguageModel, LanguageModelConfig
    >>> model = LanguageModel(LanguageModelConfig(hidden_size=16, num_hidden_layers=3)).eval()
    >>> walk = record_walk(model, torch.arange(5)[None])
    >>> walk.states.shape, walk.gap() < 1e-5
    (torch.Size([4, 1, 5, 16]), True)
    """

    states: list[Tensor] = field(default_factory=list)
    parts: dict[str, list[Tensor]] = field(default_factory=lambda: {"attention": [], "mlp": []})
    reads_only = True

    def residual(self, state: State) -> None:
        if state.stack:  # an encoder or a vision tower beside the decoder
            return
        hidden = state.hidden.detach().float().clone()
        if state.part in ("embed", "block"):
            self.states.append(hidden)
        else:
            self.parts.setdefault(state.part, []).append(hidden)

    def walk(self) -> Walk:
        """What was recorded.

        Raises:
            InputError: nothing was, or a model whose blocks do not add exactly one attention and one MLP.
        """
        counts = {name: len(part) for name, part in self.parts.items()}
        layers = len(self.states) - 1
        if layers < 1 or counts != {"attention": layers, "mlp": layers}:
            raise InputError(
                "a walk needs one forward pass of a decoder whose blocks add attention and MLP, "
                f"got {max(layers, 0)} blocks and {counts}"
            )
        return Walk(torch.stack(self.states), *(torch.stack(part) for part in self.parts.values()))


@torch.no_grad()
def record_walk(model: nn.Module, ids: Int[Tensor, "batch tokens"]) -> Walk:
    """The walk of a forward pass over texts of one length."""
    recorder = WalkRecorder()
    with Session(model, recorder):
        model(ids)
    return recorder.walk()


def measure_walk(walk: Walk) -> WalkMeasures:
    """Lengths and angles; O(layers x tokens x width)."""
    steps, whole = walk.states.diff(dim=0), walk.states[-1] - walk.states[0]
    path, displacement = steps.norm(dim=-1).sum(0), whole.norm(dim=-1)
    return WalkMeasures(
        walk.attention.norm(dim=-1),
        walk.mlp.norm(dim=-1),
        path,
        displacement,
        path / displacement,
        cosine_similarity(steps[1:], steps[:-1], dim=-1),
        cosine_similarity(walk.attention, whole[None], dim=-1),
        cosine_similarity(walk.mlp, whole[None], dim=-1),
    )


@torch.no_grad()
def nearest_tokens(
    walk: Walk, norm: nn.Module, output: nn.Module
) -> Int[Tensor, "sites batch tokens"]:
    """The token whose output embedding has the largest product with the normed state, at every site.

    Cost: the output layer once for each site.
    """
    kind = next(output.parameters()).dtype
    return torch.stack([output(norm(state.to(kind))).argmax(-1) for state in walk.states])


def arrival(nearest: Int[Tensor, "sites batch tokens"]) -> Int[Tensor, "batch tokens"]:
    """The first site at which the final nearest token is nearest.

    >>> arrival(torch.tensor([[[3]], [[7]], [[2]], [[7]]])).tolist()
    [[1]]
    """
    return (nearest == nearest[-1]).to(torch.uint8).argmax(0)


def final_norm(model: Any) -> nn.Module:
    """The norm between the last block and the output layer.

    Raises:
        ModelError: none was found under the names that decoders use.
    """
    for holder in (getattr(model, getattr(model, "base_model_prefix", "") or "model", None), model):
        for name in NORMS:
            if isinstance(found := getattr(holder, name, None), nn.Module):
                return found
    raise ModelError(
        f"{type(model).__name__} has no final norm under the names {', '.join(NORMS)}; "
        "give yours to nearest_tokens(walk, norm, output)"
    )


def principal_axes(
    states: Float[Tensor, "*points width"], axes: int = 2
) -> Float[Tensor, "*points axes"]:
    """Points in the coordinates of their first principal axes, about their mean.

    >>> line = torch.arange(4.0)[:, None] * torch.tensor([3.0, 4.0])
    >>> principal_axes(line, 1).diff(dim=0).abs().flatten()
    tensor([5., 5., 5.])
    """
    points = states.flatten(0, -2).double()
    points = points - points.mean(0)
    directions = torch.linalg.svd(points, full_matrices=False).Vh[:axes]
    return (points @ directions.T).to(states.dtype).unflatten(0, states.shape[:-1])


@dataclass(frozen=True, slots=True)
class TextWalk:
    """The walk of a text through a model.

    Attributes:
        tokens: as texts.
        walk, measures: states, steps and their numbers, for a batch of one.
        nearest: texts of the nearest token, by site and token.
        arrival: the first site at which a token's final nearest token is nearest.
    """

    tokens: list[str]
    walk: Walk
    measures: WalkMeasures
    nearest: list[list[str]]
    arrival: Int[Tensor, " tokens"]

    def sentence(self) -> str:
        """The walk in one sentence, first token aside.

        Raises:
            InputError: a text of one token.
        """
        if len(self.tokens) < 2:
            raise InputError.of("text", given=self.tokens, expected="two tokens or more")
        ratio = float(self.measures.tortuosity[0, 1:].median())
        share = float(self.measures.attention_share(1).mean())
        late = float(self.arrival[1:].float().median())
        return (
            f"A token's path is {ratio:.1f} times as long as its displacement, {100 * share:.0f} % of its steps are attention's, "
            f"and what it will predict is first nearest after block {late:.0f} of {len(self.nearest) - 1} (medians)."
        )

    def to_frame(self) -> polars.DataFrame:
        """A row for each token and site (needs the `frames` extra)."""
        import polars

        one = self.measures
        rows = [
            {
                "token": place,
                "text": text,
                "site": site,
                "nearest": self.nearest[site][place],
                "norm": float(self.walk.states[site, 0, place].norm()),
                "attention": float(one.attention[site - 1, 0, place]) if site else 0.0,
                "mlp": float(one.mlp[site - 1, 0, place]) if site else 0.0,
            }
            for place, text in enumerate(self.tokens)
            for site in range(len(self.nearest))
        ]
        return polars.DataFrame(rows)

    def plot(self, tokens: Sequence[int] | None = None, ax: Axes | None = None) -> Axes:
        """Normed states in two principal axes, a line for each token from its embedding (o) to its last state (x).

        Args:
            tokens: which, by place; the last six when left out.
        """
        import matplotlib.pyplot as plt

        count = len(self.tokens)
        chosen = list(range(max(min(1, count - 1), count - 6), count)) if tokens is None else tokens
        if not chosen or not all(0 <= place < count for place in chosen):
            raise InputError.of("tokens", given=tokens, expected=f"places from 0 to {count - 1}")
        states = self.walk.states[:, 0, list(chosen)]
        flat = principal_axes(states / states.square().mean(-1, keepdim=True).sqrt())
        if ax is None:
            _, ax = plt.subplots(figsize=(6.4, 4.6), layout="constrained")
        for index, place in enumerate(chosen):
            x, y = flat[:, index].T.tolist()
            colour, end = f"C{index % 10}", repr(self.nearest[-1][place])
            ax.plot(x, y, "-", lw=0.9, color=colour, label=f"{self.tokens[place]!r} to {end}")
            ax.scatter(x, y, c=range(len(x)), cmap="Greys", s=12, vmin=-8, zorder=3)
            ax.plot(x[:1], y[:1], "o", color=colour, ms=6)
            ax.plot(x[-1:], y[-1:], "X", color=colour, ms=8, zorder=4)
        ax.set(xlabel="first principal axis", ylabel="second principal axis")
        ax.legend(frameon=False, fontsize=8, title="token to its forecast", title_fontsize=8)
        return ax


def embedding_walk(model: Any, text: str, tokenizer: Any = None) -> TextWalk:
    """The walk of a text through your model: where every token is after each block, and to which word it is nearest.

    Args:
        model: a decoder with an output layer.
        text: short; all states are kept, `O(layers x tokens x width)`.
        tokenizer: when it is not `model.tokenizer`.

    Raises:
        InputError: a text without tokens, a model whose blocks do not add attention and MLP.
        ModelError: no tokenizer, or no final norm.

    >>> import regard
    >>> found = embedding_walk(regard.load("smollm2"), "The capital of France is")  # doctest: +SKIP
    >>> found.nearest[-1][-1]  # doctest: +SKIP
    ' Paris'
    """
    known = tokenizer_of(model, tokenizer)
    ids = known(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if not ids.numel():
        raise InputError.of("text", given=text, expected="at least one token")
    walk = record_walk(model, ids)
    nearest = nearest_tokens(walk, final_norm(model), model.get_output_embeddings())
    shown = [[known.decode([token]) for token in row] for row in nearest[:, 0].tolist()]
    words = [known.decode([token]) for token in ids[0].tolist()]
    return TextWalk(words, walk, measure_walk(walk), shown, arrival(nearest)[0])
