"""Shapes are checked in every test: jaxtyping's hook puts beartype behind each annotation."""

from __future__ import annotations

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

from jaxtyping import install_import_hook

# Must run before anything imports regard. REGARD_UNCHECKED=1 leaves it out, for profiling a test.
if os.environ.get("REGARD_UNCHECKED", "") in {"", "0"}:
    install_import_hook("regard", "beartype.beartype")

import hypothesis
import pytest
import torch

# The same cases in every run, so that a change's own tests decide about it; `HYPOTHESIS_PROFILE=search` draws new ones.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.register_profile("search", print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

sys.path.insert(0, os.path.dirname(__file__))
pytest_plugins = ["fixtures_browser", "fixtures_models"]

torch.set_num_threads(1)  # pytest-xdist already uses one process per core


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
