"""Pooled maps against block sums of eager maps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from instruments.reference import eager_maps, observe_call, tiny, token_batch, uniform
from regard._errors import InputError
from regard.attach import attach
from regard.instruments import PooledMaps

pytestmark = pytest.mark.usefixtures("blocks")


def pooled(maps: Tensor, bins: int) -> Tensor:
    """`[heads, bins, bins]` by loops; rows no query falls into are 0."""
    _, heads, queries, keys = maps.shape
    picture = torch.zeros(heads, bins, bins, dtype=maps.dtype)
    for i in range(bins):
        rows = [t for t in range(queries) if t * bins // queries == i]
        for j in range(bins):
            columns = [s for s in range(keys) if s * bins // keys == j]
            if rows and columns:
                picture[:, i, j] = maps[:, :, rows][..., columns].sum(-1).mean((0, 2))
    return picture


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "bert"])
@pytest.mark.parametrize("bins", [2, 7, 24, 50])
def test_pooled_maps_are_block_sums_of_eager_maps(family: str, bins: int) -> None:
    model = tiny(family, "BertModel" if family == "bert" else None)
    ids, maps = token_batch(), PooledMaps(bins)
    with torch.no_grad(), attach(model, maps):
        model(input_ids=ids)
    for key, full in eager_maps(model, input_ids=ids).items():
        torch.testing.assert_close(
            maps.compute()[key].double(), pooled(full, bins), rtol=0, atol=2e-5
        )


def test_cross_attention_is_drawn_over_its_own_axes() -> None:
    model = tiny("t5", "T5ForConditionalGeneration")
    inputs = {"input_ids": token_batch(), "decoder_input_ids": token_batch(tokens=9, seed=1)}
    maps = PooledMaps(4)
    with torch.no_grad(), attach(model, maps):
        model(**inputs)
    full = eager_maps(model, **inputs)["cross", 1]
    torch.testing.assert_close(
        maps.compute()["cross", 1].double(), pooled(full, 4), rtol=0, atol=2e-5
    )


def test_padding_on_the_right_is_left_out() -> None:
    model, ids = tiny("llama"), token_batch(1, 20)
    mask = torch.ones_like(ids)
    mask[:, 15:] = 0
    maps = PooledMaps(4)
    with torch.no_grad(), attach(model, maps):
        model(input_ids=ids, attention_mask=mask)
    rows = maps.compute()["", 0].sum(-1)
    torch.testing.assert_close(rows, torch.tensor([[1.0, 1, 1, 0]] * 4))


def test_several_texts_are_averaged() -> None:
    maps = PooledMaps(2)
    for tokens in (4, 8):
        observe_call(maps, uniform(1, tokens))
    assert maps.state["rows"]["", 0].tolist() == [6, 6]
    long = sum(4 / (t + 1) for t in range(4, 8))
    short = 2 / 3 + 2 / 4
    expected = (long + short) / 6
    assert float(maps.compute()["", 0][0, 1, 0]) == pytest.approx(expected, rel=1e-6)


def test_the_grid_shows_the_chosen_heads() -> None:
    maps = observe_call(PooledMaps(8), uniform(3, 30))
    figure = maps.plot(heads=["L0H2", "L0H0"])
    assert [ax.get_title() for ax in figure.axes] == ["L0H2", "L0H0"]
    assert figure.axes[0].images[0].get_array().shape == (8, 8)
    assert len(maps.plot().axes) == 3
    with pytest.raises(InputError, match="head must be one that was observed, got 'L0H3'"):
        maps.plot(heads=["L0H3"])


def test_a_short_text_has_no_stripes() -> None:
    figure = observe_call(PooledMaps(64), uniform(1, 10)).plot(heads=["L0H0"])
    picture = figure.axes[0].images[0].get_array()
    expected = (torch.ones(10, 10).tril() / torch.arange(1, 11)[:, None]).sqrt()
    torch.testing.assert_close(torch.as_tensor(picture.data), expected)


def test_the_table_has_one_row_a_cell() -> None:
    table = observe_call(PooledMaps(2), uniform(3, 4)).to_frame()
    assert table.columns == ["stack", "layer", "head", "query_bin", "key_bin", "value"]
    assert table.height == 12 and table["value"].sum() == pytest.approx(6)
    with pytest.raises(InputError, match="has not observed any text"):
        PooledMaps(2).to_frame()
    with pytest.raises(InputError, match="bins must be at least 2"):
        PooledMaps(1)
