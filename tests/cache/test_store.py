"""Rows against lists of tensors: whatever is appended, dropped, chosen or taken back, each row holds what it should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regard.cache.quantised import Quantised
from regard.cache.store import Ragged, Rows

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["append", "step", "keep", "even", "select", "back", "front", "copy"]),
        st.integers(0, 10**6),
    ),
    max_size=12,
)


def check(rows: Rows, model: list[Tensor]) -> None:
    """`model[row]` is `[length, 3]`: what each row of the column "value" must hold."""
    assert rows.sizes == [len(row) for row in model]
    column = rows.column("value")
    assert column.shape == (rows.batch, rows.heads, max(rows.sizes), 3)
    for place, row in zip(column.flatten(0, 1), model, strict=True):
        assert torch.equal(place[rows.held - len(row) :], row)
        assert not place[: rows.held - len(row)].any()
    assert torch.equal(rows.packed("value"), torch.cat(model))
    assert torch.equal(rows.filled.sum(-1), rows.lengths)


@given(OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_rows_hold_what_they_should(operations: list[tuple[str, int]]) -> None:
    heads = 2
    rows = Ragged().rows(2, heads)
    model = [torch.zeros(0, 3) for _ in range(4)]

    def append(tokens: int, seed: int) -> None:
        new = torch.randn(
            rows.batch, heads, tokens, 3, generator=torch.Generator().manual_seed(seed)
        )
        rows.append(key=new * 2, value=new)
        flat = new.flatten(0, 1)
        model[:] = [torch.cat([row, more]) for row, more in zip(model, flat, strict=True)]

    append(3, 0)
    for what, seed in operations:
        generator = torch.Generator().manual_seed(seed)
        if what in ("append", "step"):
            append(1 if what == "step" else 1 + seed % 70, seed)
        elif what in ("keep", "even"):
            kept = torch.rand(rows.batch, heads, rows.held, generator=generator) < 0.6
            if what == "even":
                kept = kept[:1, :1].expand(rows.batch, heads, -1).clone()
            kept[..., -1] = True  # a row never gets empty before the next token comes
            sizes = [len(row) for row in model]
            flat = kept.flatten(0, 1)
            model[:] = [row[flat[i, rows.held - sizes[i] :]] for i, row in enumerate(model)]
            rows.keep(kept)
            assert rows.nbytes == sum(len(row) for row in model) * 2 * 3 * 4
        elif what == "select":
            order = torch.randint(0, rows.batch, (1 + seed % 3,), generator=generator)
            model[:] = [model[b * heads + h] for b in order.tolist() for h in range(heads)]
            rows.select(order)
        elif what == "back" and min(rows.sizes) > 1:
            rows.drop_back(1)
            model[:] = [row[:-1] for row in model]
        elif what == "front" and rows.equal and rows.held > 2:
            rows.drop_front(2)
            model[:] = [row[2:] for row in model]
        elif what == "copy":
            twin = rows.copy()
            append(1, seed)  # does not touch the copy
            rows, model[:] = twin, [row[:-1] for row in model]
        check(rows, model)


@pytest.mark.parametrize("store", [Ragged(), Quantised("fp8", residual=3)], ids=repr)
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_decoding_is_attention_over_each_row(store: object, even: bool, dtype: torch.dtype) -> None:
    batch, heads, group, dim = 2, 3, 2, 8
    rows = store.rows(batch, heads)  # type: ignore[attr-defined]
    rows.append(
        key=torch.randn(batch, heads, 20, dim).to(dtype),
        value=torch.randn(batch, heads, 20, dim).to(dtype),
    )
    kept = torch.rand(batch, heads, 20) < 0.5
    kept[..., -1] = True
    rows.keep(torch.arange(20).expand_as(kept) > 9 if even else kept)
    rows.append(
        key=torch.randn(batch, heads, 1, dim).to(dtype),
        value=torch.randn(batch, heads, 1, dim).to(dtype),
    )
    assert rows.equal == even
    query = torch.randn(batch, heads * group, 1, dim).to(dtype)
    found = rows.attend(query, 0.3)
    key, value = (
        rows.column(name).double().repeat_interleave(group, 1) for name in ("key", "value")
    )
    scores = query.double() @ key.mT * 0.3
    hidden = ~rows.filled.repeat_interleave(group, 1)[:, :, None]
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_growth_is_amortised() -> None:
    rows = Ragged().rows(1, 2)
    rows.append(key=torch.randn(1, 2, 100, 4), value=torch.randn(1, 2, 100, 4))
    buffers, moves = rows.columns["key"].data_ptr(), 0
    for _ in range(2000):
        rows.append(key=torch.randn(1, 2, 1, 4), value=torch.randn(1, 2, 1, 4))
        moves += rows.columns["key"].data_ptr() != buffers
        buffers = rows.columns["key"].data_ptr()
    assert rows.held == 2100 and moves < 60
    assert rows.nbytes <= 2 * 2 * 4 * 4 * 2100 * (1 + 1 / 16) + 2 * 2 * 4 * 4 * 32


def test_equal_rows_are_a_view() -> None:
    rows = Ragged().rows(1, 2)
    rows.append(key=torch.randn(1, 2, 9, 4), value=torch.randn(1, 2, 9, 4))
    assert rows.column("key").untyped_storage().data_ptr() == rows.columns["key"].data_ptr()


def test_quantised_keys_are_near_and_small() -> None:
    plain, coded = Ragged().rows(1, 2, spare=False), Quantised("fp8", residual=16).rows(1, 2)
    for rows in (plain, coded):
        torch.manual_seed(0)
        rows.append(key=torch.randn(1, 2, 500, 64), value=torch.randn(1, 2, 500, 64))
        rows.rest()
    assert 0.24 < coded.nbytes / plain.nbytes < 0.26
    error = (coded.column("key") - plain.column("key")).abs()
    assert float((error / plain.column("key").abs().clamp(min=0.02)).max()) < 2**-3
    coded.append(key=torch.ones(1, 2, 1, 64) / 3, value=torch.ones(1, 2, 1, 64) / 3)
    coded.rest()
    assert bool((coded.column("key")[:, :, -1] == 1 / 3).all())  # the newest stay as they are
