"""Reach against closed forms and boolean matrix powers."""

from __future__ import annotations

from math import comb

import pytest
import torch

from regard._errors import InputError
from regard.sparse import (
    Dilated,
    LongNet,
    Pattern,
    Power,
    Sliding,
    SlidingTokens,
    Strided,
    TopKBlocks,
    reach,
)
from regard.sparse.reach import FAR


@pytest.mark.parametrize("power", [3, 5, 7, 9])
def test_pure_powers_reach_a_sum_of_binomials_and_popcount_hops(power: int) -> None:
    count = 2**power
    found = reach(Power(window=1, sinks=0, block=4), 4 * count, power)
    assert found.unit == 4
    assert found.counts() == [
        sum(comb(power, i) for i in range(layer + 1)) for layer in range(1, power + 1)
    ]
    hops = found.hops[-1].flip(0).tolist()
    assert hops == [d.bit_count() for d in range(count)]
    assert found.holes() == []


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(128, [10, 35, 75, 110, 126, 128]), (512, [12, 54, 152, 292, 418, 488, 510, 512])],
)
def test_window_and_sinks_of_the_paper(blocks: int, expected: list[int]) -> None:
    assert reach(Power(block=1), blocks, len(expected)).counts() == expected


def test_a_window_grows_linearly() -> None:
    found = reach(Sliding(window=9, sinks=1, block=2), 1024, 5)
    assert found.counts() == [10, 18, 26, 34, 42]
    assert reach(Sliding(window=9, sinks=0, block=2), 1024, 5).counts() == [
        9 + 8 * layer for layer in range(5)
    ]
    tokens = reach(SlidingTokens(window=4, sinks=0, block=8), 50, 3)
    assert tokens.unit == 1 and tokens.counts() == [4, 7, 10]


def test_holes_of_dilated_patterns() -> None:
    found = reach(Dilated(window=5, sinks=0, block=1), 64, 60)
    assert found.holes() == list(range(0, 64, 2))  # odd distances from token 63
    aligned = LongNet(segments=(4, 16, 64), dilations=(1, 4, 16), shift=0, block=1)
    ends = set(range(3, 60, 4))  # the last token of every segment but the query's own
    assert ends <= set(reach(aligned, 64, 60).holes())
    assert reach(Strided(window=4, stride=4, sinks=0, block=1), 64, 2).holes() == []


@pytest.mark.parametrize(
    "pattern",
    [
        Power(window=2, block=3),
        Dilated(window=2, dilation=3, block=3),
        SlidingTokens(window=5, sinks=2, block=4),
        Strided(block=2, window=2, stride=5),
        LongNet(segments=(2, 8), dilations=(1, 2), block=2),
    ],
    ids=lambda p: type(p).__name__,
)
def test_equals_boolean_matrix_powers(pattern: Pattern) -> None:
    tokens, layers = 42, 4
    found = reach(pattern, tokens, layers, heads=2)
    one = torch.zeros(tokens, tokens)
    for head in range(2):
        window = pattern.of_head(head, 2).mask(tokens, tokens).window(torch.arange(tokens))
        inside = window.visible(tokens, torch.device("cpu"))
        assert inside is not None
        one[:, window.lo : window.hi] += inside[0, 0]
    one, power = (one > 0).float(), torch.eye(tokens)
    earlier = torch.ones(tokens, tokens).tril(-1).bool()
    for layer in range(1, layers + 1):
        power = ((one + torch.eye(tokens)) @ power > 0).float()
        known = found.hops.repeat_interleave(found.unit, 0).repeat_interleave(found.unit, 1)
        known = known[:tokens, :tokens] <= layer
        assert torch.equal(known & earlier, (power > 0) & earlier)
    assert set(found.hops.unique().tolist()) <= {0, *range(1, layers + 1), FAR}


def test_figure_and_refusals() -> None:
    figure = reach(Power(block=4), 64, 3).plot()
    left, right = figure.axes[:2]
    assert left.get_title() == "fewest layers"
    assert right.lines[0].get_ydata().tolist() == reach(Power(block=4), 64, 3).counts()
    with pytest.raises(InputError, match="chooses its blocks by the queries"):
        reach(TopKBlocks(), 64, 2)
    with pytest.raises(InputError, match=r"1 token or more and 1\.\.126 layers, got 64 and 0"):
        reach(Power(), 64, 0)
