"""What a diffusion cache needs of a model: blocks that can be run on some of the rows, in three parts.

A masked-diffusion language model is a bidirectional transformer. A cache recomputes some rows and reuses the rest, so it
runs `project` (queries, keys, values of the rows), then attention of those rows over all keys, then `finish` (output
projection, residual sums, feed-forward). `regard`'s own `MaskedDiffusionLM` has these parts; `regard.cache.diffusion.adapt`
gives them to transformers models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class DiffusionBlock(Protocol):
    """One layer. Rows may be any of the sequence's, in any order: their positions say which."""

    def project(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of `[batch, rows, width]`: query `[batch, heads, rows, dim]`, key and value `[batch, kv_heads, rows, dim]`."""
        ...

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention without a mask, scores scaled by `1 / sqrt(dim)`; `[batch, heads, rows, dim]`."""
        ...

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The block's output for the rows, `[batch, rows, width]`."""
        ...


@runtime_checkable
class Denoiser(Protocol):
    """A masked-diffusion language model.

    Attributes:
        mask_token_id: the token that stands for "not yet decoded".
        eos_token_id: the token after which nothing needs decoding, or None.
        shift: the logits of row `p - shift` predict position p (0 for LLaDA, 1 for Dream).
    """

    @property
    def mask_token_id(self) -> int: ...

    @property
    def eos_token_id(self) -> int | None: ...

    @property
    def shift(self) -> int: ...

    @property
    def blocks(self) -> Sequence[Any]: ...

    def embed(self, tokens: Tensor) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


def pack(
    rows: Bool[Tensor, "batch sequence"],
) -> tuple[Int[Tensor, "batch most"], Bool[Tensor, "batch most"]]:
    """The indices of the true entries of each row, ascending, and which of them are real.

    Rows with fewer entries are filled with their first one: writing the same value twice changes nothing.

    >>> index, real = pack(torch.tensor([[False, True, True], [True, False, False]]))
    >>> index.tolist(), real.tolist()
    ([[1, 2], [0, 0]], [[True, True], [True, False]])
    """
    most = int(rows.sum(1).max())
    index = (~rows).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    real = rows.gather(1, index)
    return torch.where(real, index, index[:, :1]), real


def attention_rows(
    query: Float[Tensor, "batch heads rows dim"], key: Float[Tensor, "batch kv_heads keys dim"]
) -> Float[Tensor, "batch heads rows keys"]:
    """`softmax(query key^T / sqrt(dim))` in float32 for a few rows; grouped heads share their keys.

    Cost: O(rows x keys) for each head.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, kv_heads, -1, dim)
    scores = (grouped @ key.transpose(2, 3)).float() * dim**-0.5
    return scores.softmax(-1).view(batch, heads, rows, keys)
