"""Product-key memory against the same memory with every value scored."""

from __future__ import annotations

import pytest
import torch

from regard._errors import InputError
from regard.nn import ProductKeyMemory


def make(**options: object) -> ProductKeyMemory:
    memory = ProductKeyMemory(16, 2, **{"keys": 12, "half": 5, "value_width": 7, **options})  # type: ignore[arg-type]
    for keys in (memory.first_keys, memory.second_keys, memory.values):
        torch.nn.init.normal_(keys)
    return memory.double()


@pytest.mark.parametrize("picked", [1, 4, 16, None])
def test_it_reads_the_softmax_over_what_it_picked(picked: int | None) -> None:
    memory = make(picked=picked)
    hidden = torch.randn(2, 9, 16, dtype=torch.float64)
    query = memory.query_proj(hidden)
    whole = torch.cat(
        [memory.first_keys.repeat_interleave(12, 0), memory.second_keys.repeat(12, 1)], 1
    )
    scores = query @ whole.T
    if picked is None or picked > 4:  # the candidates: 4 best firsts with 4 best seconds
        first = (query[..., :5] @ memory.first_keys.T).topk(4, -1).indices
        second = (query[..., 5:] @ memory.second_keys.T).topk(4, -1).indices
        index = (12 * first[..., :, None] + second[..., None, :]).flatten(-2)
    else:
        index = scores.topk(picked, -1).indices
    hidden_out = torch.full_like(scores, -torch.inf).scatter(-1, index, scores.gather(-1, index))
    read = memory.value_proj(hidden_out.softmax(-1) @ memory.values)
    expected = torch.sigmoid(memory.gate(hidden)) * read
    torch.testing.assert_close(memory(hidden), expected)


def test_it_begins_nearly_shut() -> None:
    memory = ProductKeyMemory(16, 2, start=0.05)
    assert torch.allclose(memory.gate(torch.zeros(1, 1, 16)).sigmoid(), torch.tensor(0.05))


def test_only_what_is_read_learns() -> None:
    memory = make()
    hidden = torch.randn(1, 2, 16, dtype=torch.float64)
    memory(hidden).sum().backward()
    touched = memory.values.grad.abs().sum(-1).nonzero()[:, 0]  # type: ignore[union-attr]
    assert set(touched.tolist()) == set(memory.search(hidden).pairs.flatten().tolist())


def test_numbers_out_of_range_are_named() -> None:
    for name, value in (("keys", 0), ("half_k", 65), ("picked", 17), ("start", 1.0)):
        with pytest.raises(InputError, match=name):
            ProductKeyMemory(16, 2, **{name: value})
