"""Tiny models and inputs for the tests of attaching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

transformers.logging.set_verbosity_error()


@pytest.fixture
def llama() -> Any:
    """Grouped heads, plain causal attention, `sdpa`."""
    import tiny_models

    return tiny_models.randomise(tiny_models.build("llama"), 0)


@pytest.fixture
def gemma2() -> Any:
    """Soft-capping and a sliding window, `eager`."""
    import tiny_models

    return tiny_models.randomise(tiny_models.build("gemma2"), 0)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(10, 90, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def left_padded(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}
