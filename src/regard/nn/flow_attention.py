"""Flow attention as a mixer, and the form in which every token sees every other.

    q, k, v = W_q h + b_q, W_k h + b_k, W_v h + b_v;   o = flow(q, k, v);   output = W_o o + b_o     (`regard.ops.flow_attention`)

Source: Flowformer, Wu et al. 2022 (arXiv 2202.06258). The projections have biases as there; its dropout on the output is left
to the model.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._errors import InputError
from regard.nn.mixer import Mixer, State
from regard.nn.softmax_attention import check_heads, merge_heads, split_heads
from regard.ops.flow_attention import FlowState, causal_flow_attention, flow_attention


class FlowAttention(Mixer):
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
        super().__init__()
        check_heads(width, heads)
        if chunk < 1:
            raise InputError.of("chunk", given=chunk, expected="1 or more")
        self.heads, self.chunk = heads, chunk
        self.clip = None if clip is None else (float(clip[0]), float(clip[1]))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (split_heads(proj(hidden), self.heads) for proj in projections)
        mixed, after = causal_flow_attention(
            query,
            key,
            value,
            valid=valid,
            state=FlowState(**state) if state else None,
            clip=self.clip,
            chunk=self.chunk,
        )
        if state is not None:
            state.update(after._asdict())
        return self.o_proj(merge_heads(mixed).to(hidden.dtype))


class BidirectionalFlowAttention(nn.Module):
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
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.clip = None if clip is None else (float(clip[0]), float(clip[1]))
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """The mixed tokens; padding (`valid` false) neither gives nor receives."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (split_heads(proj(hidden), self.heads) for proj in projections)
        mixed = flow_attention(query, key, value, valid=valid, query_valid=valid, clip=self.clip)
        return self.o_proj(merge_heads(mixed).to(hidden.dtype))
