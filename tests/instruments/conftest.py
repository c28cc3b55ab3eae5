from __future__ import annotations

import pytest

from regard.engine import blockwise


@pytest.fixture(params=[5, 4096])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Several blocks with a ragged last one, then one block."""
    size = request.param
    monkeypatch.setattr(
        blockwise, "block_size", lambda call, rows=None: min(size, rows or call.queries)
    )
    return size
