"""Hop profiles and relative maps against loops; names and content dependence against planted heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.attach import attach
from regard.instruments.vision import (
    GridAttention,
    content_dependence,
    hop_profile,
    name_head,
    offset_moments,
    relative_map,
    row_entropy,
    tiled_map,
)
from regard.papers._digits_vit import new_vit
from regard.papers._planted_vit import TRUTH, lights, planted_vit


def random_maps(rows: int, columns: int, special: int, *lead: int):
    tokens = special + rows * columns
    return torch.rand(*lead, tokens, tokens, dtype=torch.float64).softmax(-1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 2))
def test_hops_equal_loops(rows, columns, special):
    attention = random_maps(rows, columns, special)
    hops = hop_profile(attention, (rows, columns), special=special)
    far = max(rows, columns)
    share = torch.zeros(far, dtype=torch.float64)
    single: list[list[float]] = [[] for _ in range(far)]
    patches = rows * columns
    for i in range(patches):
        rings: list[list[float]] = [[] for _ in range(far)]
        for j in range(patches):
            hop = max(abs(i // columns - j // columns), abs(i % columns - j % columns))
            rings[hop].append(float(attention[special + i, special + j]))
        for k, ring in enumerate(rings):
            share[k] += sum(ring) / patches
            if ring:
                single[k].append(sum(ring) / len(ring))
    torch.testing.assert_close(hops.share, share)
    expected = torch.tensor([sum(s) / len(s) for s in single], dtype=torch.float64)
    torch.testing.assert_close(hops.neighbour, expected)
    total = float(hops.share.sum() + hops.special)
    assert total == pytest.approx(1, abs=1e-9)
    mean = sum(k * float(s) for k, s in enumerate(share)) / float(share.sum())
    assert float(hops.mean_hop) == pytest.approx(mean)
    assert float(hops.among_patches.sum()) == pytest.approx(1)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1))
def test_relative_and_tiled_maps_equal_loops(rows, columns, special):
    maps = random_maps(rows, columns, special, 2)
    found = relative_map(maps, (rows, columns), special=special)
    for down in range(1 - rows, rows):
        for across in range(1 - columns, columns):
            values = [
                maps[1, special + r * columns + c, special + (r + down) * columns + c + across]
                for r in range(rows)
                for c in range(columns)
                if 0 <= r + down < rows and 0 <= c + across < columns
            ]
            got = found[1, down + rows - 1, across + columns - 1]
            assert float(got) == pytest.approx(float(torch.stack(values).mean()))
    tiles = tiled_map(maps[0], (rows, columns), special=special)
    r, c = rows - 1, columns // 2
    tile = tiles[r * rows : (r + 1) * rows, c * columns : (c + 1) * columns]
    torch.testing.assert_close(
        tile.flatten(), maps[0, special + r * columns + c, special:].contiguous()
    )


def test_moments_equal_the_definition():
    maps = random_maps(3, 4, 1)
    first, second = offset_moments(maps, (3, 4))
    weights = maps[1:, 1:]
    row, column = torch.arange(12) // 4, torch.arange(12) % 4
    down = (row[None] - row[:, None]).double()
    across = (column[None] - column[:, None]).double()
    total = weights.sum()
    assert float(first[0]) == pytest.approx(float((weights * down).sum() / total))
    assert float(second[1]) == pytest.approx(float((weights * across**2).sum() / total))


def test_content_dependence():
    # The running form of the definition: |A - mean|^2 over |A - uniform|^2, mean over images.
    maps = random_maps(2, 2, 1, 7, 3)
    uniform = torch.full_like(maps, 1 / 5)
    above = (maps - maps.mean(0)).square().sum((-2, -1)).mean(0)
    below = (maps - uniform).square().sum((-2, -1)).mean(0)
    torch.testing.assert_close(content_dependence(maps), above / below)
    assert float(content_dependence(torch.full((3, 5, 5), 0.2))) == 0


def one_hot(targets: list[int]):
    return torch.nn.functional.one_hot(torch.tensor(targets), len(targets)).double()


def moving(down: int, across: int, size: int = 5):
    """Every patch looks one step further, and one step back where that would leave the grid."""

    def step(place: int, by: int) -> int:
        return place + by if 0 <= place + by < size else place - by

    cells = [(r, c) for r in range(size) for c in range(size)]
    return one_hot([0, *(1 + step(r, down) * size + step(c, across) for r, c in cells)])


def mirrored(down: bool, size: int = 5):
    """Every patch looks at its mirror image in the row or in the column."""
    cells = [(r, c) for r in range(size) for c in range(size)]
    places = [((size - 1 - r) * size + c) if down else r * size + size - 1 - c for r, c in cells]
    return one_hot([0, *(1 + place for place in places)])


@pytest.mark.parametrize(
    ("attention", "name"),
    [
        (one_hot([0] * 26), "cls"),
        (one_hot(list(range(26))), "self"),
        (moving(1, 0), "down"),
        (moving(-1, 0), "up"),
        (moving(0, -1), "left"),
        (moving(0, 1), "right"),
        (mirrored(down=False), "row"),
        (mirrored(down=True), "column"),
        (torch.full((26, 26), 1 / 26, dtype=torch.float64), "uniform"),
        ((moving(1, 0) + moving(-1, 0) + moving(0, 1) + moving(0, -1)) / 4, "local"),
        ((mirrored(down=True) + mirrored(down=False)) / 2, "mixed"),
    ],
)
def test_names(attention, name):
    entropy = float(row_entropy(attention))
    assert name_head(attention, (5, 5), content=0.0, entropy=entropy) == name
    minds = "content" if name not in ("cls", "self", "uniform") else name
    assert name_head(attention, (5, 5), content=0.6, entropy=entropy) == minds


def test_planted_heads_are_named():
    found = GridAttention((8, 8))
    with torch.no_grad(), attach(planted_vit(), found) as session:
        session.model(pixel_values=lights(40))
    key = ("", 0)
    assert tuple(found.names(key)) == TRUTH
    hops, content = found.hops(key), found.content(key)
    assert float(hops.share[0, 1]) > 0.999
    assert float(hops.share[1, 0]) > 0.999
    assert float(hops.special[2]) > 0.999
    assert (content[:4] < 1e-3).all()
    assert content[4] > 0.5


@pytest.mark.parametrize("batch", [2, 6])
def test_gathering_equals_dense_maps(batch):
    model = new_vit(1, width=32, layers=2, heads=4).eval()
    with torch.no_grad():
        for layer in model.vit.layers:
            for name, weight in layer.attention.named_parameters():
                if name.endswith("weight"):
                    weight.mul_(8)  # so that maps differ between images
    pixels, found = torch.randn(6, 1, 32, 32), GridAttention((8, 8))
    with torch.no_grad(), attach(model, found):
        for part in pixels.split(batch):
            model(pixel_values=part)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        dense = torch.stack(model(pixel_values=pixels, output_attentions=True).attentions, 2)
    for layer in range(2):
        maps = dense[:, :, layer]
        key = ("", layer)
        torch.testing.assert_close(found.mean_map(key), maps.mean(0), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(
            found.content(key), content_dependence(maps.double()).float(), atol=1e-5, rtol=1e-4
        )
        expected = relative_map(maps, (8, 8))
        torch.testing.assert_close(found.relative(key), expected, atol=1e-6, rtol=1e-4)
        shares = torch.cat(found.state["share"][key])
        torch.testing.assert_close(shares, hop_profile(maps, (8, 8)).share, atol=1e-6, rtol=1e-4)


def test_merging_is_observing_all_images():
    model, pixels = new_vit(1, width=32, layers=1, heads=2).eval(), torch.randn(5, 1, 32, 32)
    first, second, both = (GridAttention((8, 8)) for _ in range(3))
    with torch.no_grad():
        for found, part in ((first, pixels[:2]), (second, pixels[2:]), (both, pixels)):
            with attach(model, found):
                model(pixel_values=part)
    first.merge(second)
    key = ("", 0)
    torch.testing.assert_close(first.mean_map(key), both.mean_map(key))
    torch.testing.assert_close(first.content(key), both.content(key), atol=1e-6, rtol=1e-4)
    assert first.relative(key).shape == (5, 2, 15, 15)
    assert first.names(key) == both.names(key)


def test_a_wrong_grid_is_refused():
    with pytest.raises(InputError, match="the patches of a map with 10 tokens"):
        hop_profile(torch.eye(10), (2, 3))
