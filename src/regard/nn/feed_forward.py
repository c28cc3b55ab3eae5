"""The feed-forward layer of today's transformers: `W_down (silu(W_gate h) * W_up h)`, no biases.

Source: Shazeer 2020, "GLU variants improve Transformer", arXiv 2002.05202.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu


class SwiGLU(nn.Module):
    """A gated feed-forward layer, for every token by itself.

    Cost: 3 width x hidden multiplications a token.

    >>> import torch
    >>> SwiGLU(width=8, hidden=24)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        return self.down_proj(silu(self.gate_proj(hidden)) * self.up_proj(hidden))
