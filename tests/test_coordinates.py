"""Coordinates print, parse, expand and refuse exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regard.coordinates import Dimension, Head, Neuron, dimensions, heads, neurons, parse

whole = st.integers(0, 999)
stacks = st.sampled_from(["", "encoder", "decoder", "cross", "vision"])


@given(st.sampled_from([Head, Neuron, Dimension]), whole, whole, stacks)
def test_every_name_parses_back_to_its_place(kind, layer, unit, stack):
    place = kind(layer, unit, stack)
    assert kind.parse(str(place)) == place == parse(str(place))
    assert place.key == (stack, layer)


def test_names_are_the_standard_ones():
    assert str(Head(5, 3)) == "L5H3"
    assert str(Head(5, 3, "encoder")) == "encoder.L5H3"
    assert str(Neuron(4, 17)) == "mlp.4.n17"
    assert str(Dimension(5, 42)) == "resid.5.d42"
    assert str(Dimension(5, 42, "vision")) == "vision.resid.5.d42"
    assert (Head(5, 3).head, Neuron(4, 17).index, Dimension(5, 42).index) == (3, 17, 42)


def test_places_are_values():
    assert len({Head(1, 2), Head(1, 2), Head.parse("L1H2")}) == 1
    assert Neuron(1, 2) != Dimension(1, 2)
    assert sorted([Head(2, 0), Head(1, 5)]) == [Head(1, 5), Head(2, 0)]
    with pytest.raises(AttributeError):
        Head(1, 2).layer = 3  # type: ignore[misc]


def test_flexible_forms_of_heads():
    grid = (6, 4)
    assert heads("L5H3") == (Head(5, 3),)
    assert heads("L5H*", grid=grid) == tuple(Head(5, h) for h in range(4))
    assert heads("L5", grid=grid) == heads("L5H*", grid=grid)
    assert heads("L3-5H0") == (Head(3, 0), Head(4, 0), Head(5, 0))
    assert heads("L*H1-2", grid=(2, 4)) == (Head(0, 1), Head(0, 2), Head(1, 1), Head(1, 2))
    assert heads((5, 3), [(4, 0), "L0H1, L1H1"], Head(2, 2)) == (
        Head(5, 3), Head(4, 0), Head(0, 1), Head(1, 1), Head(2, 2),
    )  # fmt: skip
    numpy_pair = (np.int64(5), np.int64(3))
    assert heads(numpy_pair, ("encoder", 0, 1)) == (
        Head(5, 3),
        Head(0, 1, "encoder"),
    )
    assert heads("l5h3") == (Head(5, 3),)
    assert heads("L5H3 L5H3", (5, 3)) == (Head(5, 3),)
    assert heads() == heads([]) == ()


def test_ragged_grids_and_stacks():
    grid = {("", 0): 2, ("", 3): 1, ("encoder", 0): 3}
    assert heads("L*H*", grid=grid) == (Head(0, 0), Head(0, 1), Head(3, 0))
    assert heads("encoder.L*", grid=grid) == tuple(Head(0, h, "encoder") for h in range(3))
    with pytest.raises(ValueError, match=r"L1H0 is outside the model: layers with heads are 0, 3"):
        heads("L1H0", grid=grid)
    with pytest.raises(ValueError, match=r"no stack 'vision'; it has no prefix .*, 'encoder'"):
        heads("vision.L0H0", grid=grid)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("L30H0", r"L30H0 is outside the model: layers with heads are 0\.\.29"),
        ("L30", r"L30H0 is outside the model"),
        ("L2H9", r"L2H9 is outside the model: layer 2 has heads 0\.\.8"),
        ((2, 9), r"L2H9 is outside the model"),
        ("L5-3H0", r"run backwards \(5-3\); write 3-5"),
        ("5.3", r"'5\.3' names no head; write L5H3"),
        ("mlp.4.n17", r"names no head"),
        (7, r"7 names no head"),
        ((-1, 0), r"count from 0 upwards, got layer -1"),
        (True, r"names no head"),
    ],
)
def test_what_is_wrong_is_named(spec, message):
    with pytest.raises(ValueError, match=message):
        heads(spec, grid=(30, 9))


def test_wildcards_need_sizes():
    with pytest.raises(ValueError, match=r"give the model's sizes \(grid=\)"):
        heads("L5H*")
    with pytest.raises(ValueError, match="names 2 heads, expected one"):
        Head.parse("L5H0-1")


def test_neurons_and_dimensions_expand_like_heads():
    assert neurons("mlp.4.n1-2", (0, 5)) == (Neuron(4, 1), Neuron(4, 2), Neuron(0, 5))
    assert dimensions("resid.*.d42", grid=(2, 64)) == (Dimension(0, 42), Dimension(1, 42))
    with pytest.raises(ValueError, match=r"layer 1 has dimensions 0\.\.63"):
        dimensions("resid.1.d64", grid=(2, 64))
    with pytest.raises(ValueError, match="names no place in a model; write L5H3"):
        parse("attn.5")


def test_results_can_be_passed_on_with_their_scores() -> None:
    from regard.coordinates import Head, heads

    listed = [(Head(1, 2), 0.9), (Head(0, 3), 0.4)]
    assert heads(listed, grid=(2, 4)) == (Head(1, 2), Head(0, 3))


def test_two_places_in_a_tuple_are_two_places() -> None:
    pair = (Head(1, 2), Head(0, 3))
    assert heads(pair, grid=(2, 4)) == pair
    assert heads([pair], grid=(2, 4)) == pair
    assert neurons((Neuron(0, 3), Neuron(0, 17))) == (Neuron(0, 3), Neuron(0, 17))
