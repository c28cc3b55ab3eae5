"""Attention taken apart: six mixers, each without one of its principles.

| mixer | what is given up | output, before W_o |
|---|---|---|
| `no_mixing` | mixing of tokens | W_down(silu(W_gate h) * W_up h), inner width 4/3 of the width |
| `taylor` | the exact form | softmax with exp(x) replaced by 1 + x + x^2 / 2 |
| `self_gated` | scores between two tokens | A_ij = exp(s_j) / sum_{t <= i} exp(s_t), s_j = <silu(q_j), k_j> / sqrt(d) |
| `random_qk` | weights that depend on the input | softmax; q and k from what the same layers make of fixed noise |
| `fixed_text_qk` | the same | softmax; q and k from what the same layers make of one fixed text |
| `static_qk` | q and k of the current layer | softmax; q and k from the embeddings of the input tokens |

All have the parameters of softmax attention, 4 width^2 (`no_mixing` up to rounding), and values from the current layer. In the
last three, q and k come from states that a layer does not see: `regard.nn.deconstructed_model` hands them out.

Source: "Deconstructing Attention" (arXiv 2510.11602). Where the source leaves it open: rotary positions in all of them but
`no_mixing` and `self_gated`, which know no order; noise of size 0.02; q and k of the second stream behind the layer's norm, of
static embeddings without one.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard._errors import InputError
from regard.nn.feed_forward import SwiGLU
from regard.nn.mixer import Mixer, State
from regard.nn.projections import Projections, check_heads
from regard.nn.rotary import rotate
from regard.nn.softmax_attention import SoftmaxAttention
from regard.ops.attention_scan import Attended
from regard.ops.position_softmax import position_softmax, self_gate
from regard.ops.taylor_attention import TaylorState, taylor_attention


class NoMixing(SwiGLU, Mixer):
    """A gated feed-forward layer in the place of attention: every token by itself.

    Cost: 3 width x round(4 width / 3) multiplications a token. No state.

    >>> mixer = NoMixing(width=32, heads=4)
    >>> mixer(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    positional = True  # a stack of these has no use for positions, and the published one gets none

    def __init__(self, width: int, heads: int) -> None:
        check_heads(width, heads)
        super().__init__(width, round(4 * width / 3))

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        return super().forward(hidden)


class TaylorAttention(Projections, Mixer):
    """Attention with the exponential's Taylor series of second order (`regard.ops.taylor_attention`).

    Cost: 4 width^2 multiplications a token and 2 d^2 for each number of a head's output. The state holds d^2 numbers for each.

    >>> mixer = TaylorAttention(width=32, heads=4)
    >>> mixer(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    positional = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, even=True)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        seen = int(state["seen"][0]) if state else 0
        positions = torch.arange(seen, seen + hidden.shape[1], device=hidden.device)
        query, key = (rotate(one, positions) for one in self.query_key_of(hidden))
        value = self.value_of(hidden)
        past = TaylorState(*(state[name] for name in TaylorState._fields)) if state else None
        mixed, past = taylor_attention(query, key, value, valid=valid, state=past)
        if state is not None:
            state.update(past._asdict())
            state["seen"] = torch.full((len(hidden),), seen + hidden.shape[1], device=hidden.device)
        return self.output_of(mixed, hidden)


class SelfGatedAttention(Projections, Mixer):
    """A softmax over scores in which a token meets only itself (`regard.ops.position_softmax`).

    Cost: 4 width^2 multiplications a token. The state holds one value and two numbers a head. Order is unknown to it: an output
    depends on which tokens came before, not on where they stood.

    >>> mixer = SelfGatedAttention(width=32, heads=4)
    >>> mixer(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    positional = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, even=True)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        query, key = self.query_key_of(hidden)
        value = self.value_of(hidden)
        past = Attended(**state) if state else None
        mixed, past = position_softmax(self_gate(query, key), value, valid=valid, state=past)
        if state is not None:
            state.update(past._asdict())
        return self.output_of(mixed, hidden)


class GivenQKAttention(SoftmaxAttention):
    """Softmax attention whose queries and keys are made of `source`, which the model sets before each call.

    Cost and state: those of softmax attention. Instruments and interventions attach.

    Attributes:
        source: the states that queries and keys are made of.

    Raises:
        InputError: in a call, when no source was set, or one that is too short.
    """

    source: Tensor | None = None

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)

    def given(self) -> Tensor:
        """The source, or an error that says who sets it."""
        if self.source is None:
            raise InputError(
                f"{type(self).__name__} has no source of queries and keys: build the model as "
                "regard.nn.DeconstructedLanguageModel, or set .source before each call"
            )
        return self.source


class StaticQKAttention(GivenQKAttention):
    """Queries and keys from the embeddings of the input tokens: `source` is `[batch, tokens, width]`, one row for each token."""

    def query_key(
        self, hidden: Tensor, valid: Tensor | None, state: State | None
    ) -> tuple[Tensor, Tensor]:
        source = self.given()
        if source.shape != hidden.shape:
            raise InputError.of(
                "source", given=tuple(source.shape), expected=f"of shape {tuple(hidden.shape)}"
            )
        return self.query_key_of(source)


class FixedQKAttention(GivenQKAttention):
    """Queries and keys from fixed states, one for each position: `source` is `[positions, width]`, position 0 first.

    Attention weights do not depend on the input. Positions count valid tokens.
    """

    def query_key(
        self, hidden: Tensor, valid: Tensor | None, state: State | None
    ) -> tuple[Tensor, Tensor]:
        source = self.given()
        batch, tokens, _ = hidden.shape
        start = (
            state["valid"].sum(-1) if state else torch.zeros_like(hidden[:, 0, 0], dtype=torch.long)
        )
        if valid is None:
            place = start[:, None] + torch.arange(tokens, device=hidden.device)
        else:
            place = (start[:, None] + valid.long().cumsum(-1) - 1).clamp(min=0)
        if int(place.max()) >= len(source):
            raise InputError.of("position", given=int(place.max()), expected=f"below {len(source)}")
        query, key = self.query_key_of(source[None])
        if valid is None and state is None:
            return query[:, :, :tokens].expand(batch, -1, -1, -1), key[:, :, :tokens].expand(
                batch, -1, -1, -1
            )
        return query[0][:, place].transpose(0, 1), key[0][:, place].transpose(0, 1)


class RandomQKAttention(FixedQKAttention):
    """Queries and keys from what the layers make of noise that was drawn once."""


class FixedTextQKAttention(FixedQKAttention):
    """Queries and keys from what the layers make of one fixed text."""
