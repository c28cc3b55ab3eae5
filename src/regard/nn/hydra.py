"""Hydra: a state-space path, sparse attention and experts side by side on one input, each behind a learned gain.

    y = g_1 Mamba(x) + g_2 SparseGlobalAttention(x) + g_3 ChunkMoE(x),      g = 0.8, 0.2, 0.5 before training

`hydra_mixers` lays them out as the paper does: the state-space path in every layer, attention in every fourth, experts in every
second. Layers have no other feed-forward part (`intermediate_size=0`).

Source: "Hydra", arXiv 2508.15099, a plan whose released models are toys. Deviations: norms and residual stream are those of
`regard.nn.LanguageModel`, one RMSNorm in front of all paths; the published code normalises the sum once more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard._errors import InputError
from regard.nn.chunk_moe import ChunkMoE
from regard.nn.mamba import Mamba
from regard.nn.mixer import Mixer, State
from regard.nn.neural_memory import part_of
from regard.nn.sparse_global_attention import SparseGlobalAttention

PATHS: dict[str, tuple[Callable[..., Mixer], float]] = {
    "mamba": (Mamba, 0.8),
    "attention": (SparseGlobalAttention, 0.2),
    "experts": (ChunkMoE, 0.5),
}
"""What each path is, and its gain before training."""


class Hydra(Mixer):
    """Up to three paths side by side.

    Args:
        width: of the tokens.
        heads: of the attention; must divide `width`.
        paths: which of `PATHS` there are.
        mamba: options of `Mamba`.
        attention: options of `SparseGlobalAttention`.
        experts: options of `ChunkMoE`.

    Cost: that of its paths. So is the state.

    Raises:
        InputError: an unknown path, none at all, or options out of range.

    >>> mixer = Hydra(width=32, heads=4)
    >>> mixer(torch.randn(2, 40, 32)).shape
    torch.Size([2, 40, 32])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        paths: Sequence[str] = tuple(PATHS),
        mamba: dict[str, Any] | None = None,
        attention: dict[str, Any] | None = None,
        experts: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name in paths:
            if name not in PATHS:
                raise InputError.unknown("path", given=name, known=list(PATHS))
        if not paths or len(set(paths)) < len(paths):
            raise InputError.of("paths", given=list(paths), expected="one or more, each once")
        options = {"mamba": mamba, "attention": attention, "experts": experts}
        self.paths = nn.ModuleDict(
            {name: PATHS[name][0](width, heads, **(options[name] or {})) for name in paths}
        )
        self.gains = nn.Parameter(torch.tensor([PATHS[name][1] for name in paths]))
        self.positional = any(path.positional for path in self._paths().values())

    def _paths(self) -> dict[str, Mixer]:
        return dict(self.paths.items())  # type: ignore[arg-type]

    def forward(
        self,
        hidden: Float[Tensor, "batch tokens width"],
        *,
        valid: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        output, self.losses = torch.zeros_like(hidden), {}
        for gain, (name, path) in zip(self.gains, self._paths().items(), strict=True):
            with part_of(state, name) as part:
                output = output + gain * path(hidden, valid=valid, state=part)
            self.losses.update(path.losses)
        return output


def hydra_mixers(
    layers: int,
    *,
    attention_every: int = 4,
    experts_every: int = 2,
    **options: Any,
) -> list[list[Any]]:
    """The mixers of a model: attention in the last of `attention_every` layers, experts in the first of `experts_every`.

    Args:
        layers: of the model.
        attention_every: 0 for no attention.
        experts_every: 0 for no experts.
        options: of the paths, by the name of the path.

    >>> [mixer[1]["paths"] for mixer in hydra_mixers(4)]
    [['mamba', 'experts'], ['mamba'], ['mamba', 'experts'], ['mamba', 'attention']]
    """
    mixers = []
    for layer in range(layers):
        paths = ["mamba"]
        if attention_every and (layer + 1) % attention_every == 0:
            paths.append("attention")
        if experts_every and layer % experts_every == 0:
            paths.append("experts")
        given = {name: options[name] for name in paths if name in options}
        mixers.append(["hydra", {"paths": paths, **given}])
    return mixers
