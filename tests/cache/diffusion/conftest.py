from __future__ import annotations

import pytest
import torch

from regard.models.language import MaskedDiffusionConfig, MaskedDiffusionLM


@pytest.fixture
def model() -> MaskedDiffusionLM:
    """A random model with weights large enough for its attention to have a shape."""
    torch.manual_seed(3)
    config = MaskedDiffusionConfig(layers=3, width=32, heads=4, hidden=48)
    built = MaskedDiffusionLM(config).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.6 if "embedding" in name else 0.25)
    return built


@pytest.fixture
def canvas(model: MaskedDiffusionLM) -> torch.Tensor:
    return model.canvas(["k3a9xw", "0b1c2d4e5f", "zz|top"], length=28)
