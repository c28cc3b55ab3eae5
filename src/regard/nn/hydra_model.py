"""The Hydra language model: layers of any mixers, with two memories that all layers share.

    h <- layer(h);   h <- h + workspace(h);   h <- h + product_keys(h)          after every layer

The weights of a memory are one set for the whole model. What the workspace holds of a text is kept for each layer, so that
layers need not wait for each other; the paper's text leaves this open.

Source: "Hydra", arXiv 2508.15099.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from regard.nn.language_model import Block, LanguageModel, LanguageModelConfig
from regard.nn.mixer import Mixer
from regard.nn.neural_memory import part_of
from regard.nn.product_key_memory import ProductKeyMemory
from regard.nn.workspace_memory import WorkspaceMemory

MEMORIES: dict[str, Callable[..., Mixer]] = {
    "workspace": WorkspaceMemory,
    "product_keys": ProductKeyMemory,
}


class HydraLanguageModel(LanguageModel):
    """A `LanguageModel` with shared memories beside its layers.

    Args:
        config: as of a `LanguageModel`; `config.workspace` and `config.product_keys`, where they are given, are the options of
            a `WorkspaceMemory` and a `ProductKeyMemory`. `hydra_mixers` makes the paper's list of mixers.

    Cost: that of its layers, and that of each memory for every layer.

    Raises:
        InputError: options out of range.

    >>> import torch
    >>> from regard.nn import hydra_mixers
    >>> config = LanguageModelConfig(
    ...     hidden_size=32, mixers=hydra_mixers(4), intermediate_size=0, product_keys={"keys": 16}, workspace={}
    ... )
    >>> HydraLanguageModel(config)(torch.randint(256, (1, 12))).logits.shape
    torch.Size([1, 12, 256])
    """

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__(config)
        self.memories = nn.ModuleDict()
        for name, kind in MEMORIES.items():
            options: dict[str, Any] | None = getattr(config, name, None)
            if options is not None:
                width, heads = config.hidden_size, config.num_attention_heads
                self.memories[name] = kind(width, heads, **options)
        self.layers = nn.ModuleList(
            _Block(config, layer, dict(self.memories.items()))
            for layer in range(config.num_hidden_layers)
        )


class _Block(Block):
    """A layer and what memories add to it; they are not its own, so that their weights count once."""

    def __init__(
        self, config: LanguageModelConfig, layer: int, memories: dict[str, nn.Module]
    ) -> None:
        super().__init__(config, layer)
        self.memories = memories

    def forward(self, hidden: Tensor, valid: Tensor | None, state: Any) -> Tensor:
        hidden = super().forward(hidden, valid, state)
        for name, memory in self.memories.items():
            with part_of(state, name) as part:
                hidden = hidden + memory(hidden, valid=valid, state=part)
        return hidden
