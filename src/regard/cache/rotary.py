"""The rotation that a model's position embedding gives to queries and keys, by the model's own code, and its inverse.

transformers' decoders define, beside their attention class, a rotary embedding made from the configuration and a function that
applies its cosines and sines. Both are called here with positions of our choice, so partial rotations, interleaved pairs and
scaled frequencies come out as the model has them.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard._errors import InputError

_KNOWN: WeakKeyDictionary[nn.Module, Rotary] = WeakKeyDictionary()


class Rotary:
    """`turn` rotates vectors `[batch, heads, rows, dim]` to positions `[batch, rows]`, `unturn` takes it back."""

    def __init__(self, embed: nn.Module | None, apply: Any, layer_type: str | None) -> None:
        self._embed, self._apply, self._layer_type = embed, apply, layer_type

    @classmethod
    def of(cls, attention: nn.Module, layer: int) -> Rotary:
        """The rotation in an attention module of a transformers model; the identity for models without rotary positions.

        Raises:
            InputError: the model rotates in a way of its own (latent attention, several position axes).
        """
        if attention not in _KNOWN:
            _KNOWN[attention] = cls._find(attention, layer)
        return _KNOWN[attention]

    @classmethod
    def _find(cls, attention: nn.Module, layer: int) -> Rotary:
        names = vars(sys.modules[type(attention).__module__])
        config: Any = getattr(attention, "config", None)
        kinds = [
            value
            for name, value in names.items()
            if name.endswith("RotaryEmbedding") and isinstance(value, type)
        ]
        if not kinds:
            return cls(None, None, None)
        name, apply = type(attention).__name__, names.get("apply_rotary_pos_emb")
        if config is None or apply is None or hasattr(config, "qk_rope_head_dim") or len(kinds) > 1:
            raise InputError(
                f"the position embedding of {name} cannot be undone from outside; use another scorer, such as SnapKV or H2O"
            )
        embed = kinds[0](config)
        layered = "layer_type" in inspect.signature(embed.forward).parameters
        return cls(embed, apply, config.layer_types[layer] if layered else None)

    @property
    def rotates(self) -> bool:
        """False for a model without rotary positions."""
        return self._embed is not None

    @property
    def factor(self) -> float:
        """By how much `turn` lengthens vectors (1 but for some scaled embeddings)."""
        if self._embed is None:
            return 1.0
        zero = torch.zeros(1, 1, dtype=torch.long)
        return self._angles(zero, torch.empty(0))[2]

    def _angles(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor, float]:
        """Cosines and sines `[batch, rows, rotated]` in float32, and the factor by which they lengthen vectors."""
        assert self._embed is not None
        embed = self._embed.to(like.device)
        more = {} if self._layer_type is None else {"layer_type": self._layer_type}
        dummy = torch.empty(0, device=like.device)
        cosine, sine = embed(dummy, positions, **more)
        zero, _ = embed(dummy, torch.zeros(1, 1, dtype=torch.long, device=like.device), **more)
        return cosine, sine, float(zero.flatten()[0])

    def turn(
        self, vectors: Float[Tensor, "batch heads rows dim"], positions: Int[Tensor, "batch rows"]
    ) -> Float[Tensor, "batch heads rows dim"]:
        """Vectors as the model has them at these positions, in float32."""
        if self._embed is None:
            return vectors.float()
        cosine, sine, _ = self._angles(positions, vectors)
        return self._rotate(vectors.float(), cosine, sine)

    def unturn(
        self, vectors: Float[Tensor, "batch heads rows dim"], positions: Int[Tensor, "batch rows"]
    ) -> Float[Tensor, "batch heads rows dim"]:
        """The inverse of `turn`."""
        if self._embed is None:
            return vectors.float()
        cosine, sine, factor = self._angles(positions, vectors)
        return self._rotate(vectors.float(), cosine / factor**2, -sine / factor**2)

    def average(
        self, first: Int[Tensor, " batch"], count: int, dim: int
    ) -> Float[Tensor, "batch dim dim"]:
        """The matrix M with `M @ q` = mean of `turn(q, p)` over the `count` positions from `first` on."""
        batch = len(first)
        unit = torch.eye(dim, device=first.device).expand(batch, 1, -1, -1)
        if self._embed is None:
            return unit[:, 0]
        positions = first[:, None] + torch.arange(count, device=first.device)
        cosine, sine, _ = self._angles(positions, unit)
        # rotating is linear in cosine and sine, so the mean rotation is the rotation by their means
        means = (angle.mean(1, keepdim=True).expand(-1, dim, -1) for angle in (cosine, sine))
        return self._rotate(unit, *means)[:, 0].transpose(-1, -2)

    def _rotate(self, vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        width = cosine.shape[-1]
        turned, _ = self._apply(vectors[..., :width], vectors[..., :width], cosine, sine)
        return (
            torch.cat([turned, vectors[..., width:]], -1) if width < vectors.shape[-1] else turned
        )
