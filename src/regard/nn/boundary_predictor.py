"""A small network that sees the keys of a layer and says between which tokens a text breaks.

For every gap i, between tokens i and i + 1, it looks at the w tokens on either side (keys of all KV heads side by side,
C = KV heads x head dim, after RoPE; zeros beyond the ends):

    E = LayerNorm(MultiHeadAttention(window))                 over the 2w tokens, no residual
    l, r = mean(E[:w]), mean(E[w:])
    z_i = MLP([l, r, |l - r|, l * r, cos(l, r)])              the logit of a boundary

Source: Xiong et al. 2025 (arXiv 2510.24606). Its targets are the gaps where `ops.boundary_ratio` of the model's own attention is
at least 2; the loss is focal.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cosine_similarity,
    pad,
    scaled_dot_product_attention,
)

from regard._errors import InputError

GAPS = 1024
"""Gaps encoded at a time: bounds the memory of the windows at 2w x 1024 x C numbers, whatever the length."""


class BoundaryPredictor(nn.Module):
    """Boundary logits from keys.

    Args:
        channels: C, KV heads x head dim.
        window: tokens w on either side of a gap.
        heads: attention heads inside the window.
        hidden: width of the MLP.

    Raises:
        InputError: `channels` is not a multiple of `heads`.

    Keys are projected once for each token and only then laid out in windows, which is the same as attention over each
    window. Cost: about 2 x (2w + 4) C^2 + 8 C x hidden multiplications a token; memory does not grow with the length.
    """

    def __init__(self, channels: int, window: int = 4, heads: int = 4, hidden: int = 256) -> None:
        super().__init__()
        if channels % heads:
            raise InputError.of("channels", given=channels, expected=f"a multiple of {heads} heads")
        self.window, self.heads = window, heads
        self.project = nn.Linear(channels, 3 * channels)
        self.mix = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.mlp = nn.Sequential(
            nn.Linear(4 * channels + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    @property
    def channels(self) -> int:
        return self.mix.in_features

    def forward(
        self, keys: Float[Tensor, "batch length channels"]
    ) -> Float[Tensor, "batch length"]:
        """The logit of each gap, between tokens i and i + 1 (the last is the gap after the text)."""
        if keys.shape[-1] != self.channels:
            raise InputError.of(
                "keys",
                given=tuple(keys.shape),
                expected=f"[batch, length, {self.channels}]: KV heads x head dim of the model it was trained for",
            )
        width = 2 * self.window
        padded = pad(keys, (0, 0, self.window - 1, self.window))
        projected = self.project(padded).unfold(1, width, 1)  # [batch, length, 3 channels, 2w]
        return torch.cat([self._gaps(part) for part in projected.split(GAPS, 1)], 1)

    def _gaps(
        self, windows: Float[Tensor, "batch gaps features width"]
    ) -> Float[Tensor, "batch gaps"]:
        parts = windows.unflatten(2, (3, self.heads, -1)).permute(2, 0, 1, 3, 5, 4)
        query, key, value = parts.flatten(1, 2)  # each [batch x gaps, heads, 2w, head dim]
        mixed = scaled_dot_product_attention(query, key, value)
        encoded = self.norm(self.mix(mixed.transpose(1, 2).flatten(2)))
        left = encoded[:, : self.window].mean(1)
        right = encoded[:, self.window :].mean(1)
        alike = cosine_similarity(left, right, dim=-1, eps=1e-6)[:, None]
        features = torch.cat([left, right, (left - right).abs(), left * right, alike], -1)
        return self.mlp(features).view(windows.shape[:2])


def boundary_targets(ratio: Float[Tensor, "*shape"], beta: float = 2.0) -> Bool[Tensor, "*shape"]:
    """Which gaps are boundaries: R >= beta.

    The paper writes sigmoid(alpha (log R - log beta)) >= 1/2 with R raised to at least 1, which is the same for every alpha.
    """
    return ratio >= beta


def inner_gaps(length: int, window: int = 4) -> Bool[Tensor, " length"]:
    """The gaps that are trained on: not within 2w of either end."""
    gap = torch.arange(length)
    return (gap >= 2 * window - 1) & (gap < length - 2 * window)


def focal_loss(
    logits: Float[Tensor, "*shape"],
    targets: Shaped[Tensor, "*shape"],
    counted: Bool[Tensor, "*shape"],
    *,
    gamma: float = 2.0,
    positive: float = 1.3,
) -> Float[Tensor, ""]:
    """Focal binary cross-entropy, mean over the counted gaps: (1 - p_t)^gamma * BCE, boundaries weighted by `positive`."""
    wanted = targets.to(logits.dtype)
    weight = torch.tensor(positive, dtype=logits.dtype, device=logits.device)
    plain = binary_cross_entropy_with_logits(logits, wanted, pos_weight=weight, reduction="none")
    share = torch.sigmoid(logits)
    right = share * wanted + (1 - share) * (1 - wanted)
    return ((1 - right) ** gamma * plain * counted).sum() / counted.sum().clamp_min(1)
