"""The blocks of the small masked-diffusion model: pre-norm, bidirectional attention with rotary positions, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from regard._errors import InputError
from regard.attach.modules import HookedAttention
from regard.nn.feed_forward import SwiGLU
from regard.nn.rotary import rotate


@dataclass(frozen=True)
class MaskedDiffusionConfig:
    """Shape of the model; `mask_token_id` and `eos_token_id` (also the padding) are part of the vocabulary."""

    vocabulary: int = 64
    mask_token_id: int = 62
    eos_token_id: int = 61
    layers: int = 6
    width: int = 128
    heads: int = 4
    hidden: int = 344
    positions: int = 128
    theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise InputError.of(
                "width", given=self.width, expected=f"a multiple of {2 * self.heads}"
            )
        for name in ("mask_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocabulary:
                raise InputError.of(
                    name, given=getattr(self, name), expected=f"below {self.vocabulary}"
                )


class Attention(HookedAttention):
    """Multi-head attention over every token, before and after."""

    is_causal = False

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__()
        self.heads, self.theta = config.heads, config.theta
        self.qkv_proj = nn.Linear(config.width, 3 * config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def project(self, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, `[batch, heads, rows, dim]` each."""
        batch, rows, _ = states.shape
        parts = self.qkv_proj(states).view(batch, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key = (rotate(part, positions, self.theta) for part in parts[:2])
        return query, key, parts[2]


class Block(nn.Module):
    """One layer in the three parts that a diffusion cache runs apart: `project`, `attend`, `finish`."""

    def __init__(self, config: MaskedDiffusionConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=1e-6)
        self.mlp = SwiGLU(config.width, config.hidden)

    def project(
        self, hidden: Float[Tensor, "batch rows width"], positions: Int[Tensor, "batch rows"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of some rows, `[batch, heads, rows, dim]`."""
        return self.attention.project(self.attention_norm(hidden), positions)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of some rows over all keys, `[batch, heads, rows, dim]`."""
        return self.attention.attend(query, key, value)

    def finish(
        self, hidden: Float[Tensor, "batch rows width"], attended: Tensor
    ) -> Float[Tensor, "batch rows width"]:
        """What the block returns for those rows: output projection, residual sums and feed-forward."""
        hidden = hidden + self.attention.o_proj(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.mlp_norm(hidden))

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        return self.finish(hidden, self.attend(*self.project(hidden, positions)))
