"""Flow attention as a mixer, and the form in which every token sees every other.

    q, k, v = W_q h + b_q, W_k h + b_k, W_v h + b_v;   o = flow(q, k, v);   output = W_o o + b_o     (`regard.ops.flow_attention`)

Source: Flowformer, Wu et al. 2022 (arXiv 2202.06258). The projections have biases as there; its dropout on the output is left
to the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from regard._errors import at_least_one
from regard.nn.mixer import Mixer, State
from regard.nn.projections import Projections
from regard.ops.flow_attention import FlowState, causal_flow_attention, flow_attention


class FlowAttention(Projections, Mixer):
    """Multi-head causal flow attention; positions come from the model.

    Args:
        width: of the tokens.
        heads: must divide `width`.
        clip: bounds of the conserved outgoing flow, from which sources compete; None for none.
        chunk: tokens that are mixed by a masked product; any size gives the same numbers.

    Cost: 4 width^2 + width (chunk + 2 width / heads) multiplications a token. The state is one `dim x dim` matrix, four
    vectors and a number for each head, and a count.

    Raises:
        InputError: heads that do not divide, or a chunk below 1.

    >>> import torch
    >>> FlowAttention(width=32, heads=4)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(
        self, width: int, heads: int, *, clip: Sequence[float] | None = (-1.0, 1.0), chunk: int = 64
    ) -> None:
        super().__init__(width, heads, bias=True)
        at_least_one(chunk=chunk)
        self.chunk = chunk
        self.clip = None if clip is None else (float(clip[0]), float(clip[1]))

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        mixed, after = causal_flow_attention(
            *self.query_key_of(hidden),
            self.value_of(hidden),
            valid=valid,
            state=FlowState(**state) if state else None,
            clip=self.clip,
            chunk=self.chunk,
        )
        if state is not None:
            state.update(after._asdict())
        return self.output_of(mixed, hidden)


class BidirectionalFlowAttention(Projections):
    """Multi-head flow attention between all tokens, for encoders and classifiers. It is no mixer of a language model.

    Args:
        width: of the tokens.
        heads: must divide `width`.
        clip: bounds of the conserved outgoing flow; None, the default, for none.

    Cost: 4 width^2 + 2 width^2 / heads multiplications a token.

    Raises:
        InputError: heads that do not divide.

    >>> import torch
    >>> BidirectionalFlowAttention(width=32, heads=4)(torch.randn(2, 10, 32)).shape
    torch.Size([2, 10, 32])
    """

    def __init__(self, width: int, heads: int, *, clip: Sequence[float] | None = None) -> None:
        super().__init__(width, heads, bias=True)
        self.clip = None if clip is None else (float(clip[0]), float(clip[1]))

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """The mixed tokens; padding (`valid` false) neither gives nor receives."""
        mixed = flow_attention(
            *self.query_key_of(hidden),
            self.value_of(hidden),
            valid=valid,
            query_valid=valid,
            clip=self.clip,
        )
        return self.output_of(mixed, hidden)
