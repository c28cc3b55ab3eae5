"""The parts of the experiment against independent computations."""

from __future__ import annotations

import math

import numpy as np
import torch

from regard.labs.scan_and_snap import entropy, make_classes, token_mass, train_sampled
from regard.papers import _scan_and_snap_runs as runs


def test_counts_of_a_window_are_those_of_a_loop():
    text = torch.randint(7, (50,))
    at = torch.tensor([10, 20, 49])
    found = runs._count(text, at, 10, 7)
    for row, place in zip(found, at.tolist(), strict=True):
        assert row.tolist() == [text[place - 10 : place].tolist().count(word) for word in range(7)]


def test_the_text_keeps_its_most_frequent_words_in_order():
    ids, total = runs.windows(20, 20_000)
    counts = np.bincount(ids, minlength=20)
    assert len(counts) == 20 and (np.diff(counts) <= 0).all()
    assert 0.2 * total < len(ids) < total


def test_the_sweep_is_training_with_these_rates():
    found = runs.sweep([1], [0.5, 2.0], [1.0, 4.0], 2, 5)["1"]
    classes = make_classes(1, 2, runs.COMMON, runs.DISTINCT)
    eta = np.repeat([0.5, 2.0], 4)
    ratio = np.tile(np.repeat([1.0, 4.0], 2), 2)
    trained = train_sampled(
        classes, eta * ratio, eta, length=128, batch=128, steps=5, momentum=0.9, seed=1
    )
    expected = entropy(token_mass(trained.attention[:, classes.last], classes.probability)).mean(1)
    np.testing.assert_allclose(np.ravel(found), expected)


def test_the_small_run_starts_where_the_authors_does():
    found = runs.small_run(2, steps=6)
    assert abs(found["losses"][0] - math.log(34)) < 1e-9 and abs(found["losses"][0] - 3.53) < 5e-3
    assert found["losses"][5] < 0.6 * found["losses"][0]
    assert len(found["common"]) == len(found["distinct"]) == 10


def test_correlations_of_the_text_are_within_their_range_and_repeat():
    arguments = {
        "words": 30,
        "characters": 20_000,
        "length": 16,
        "batch": 16,
        "steps": 5,
        "rates": (5.0, 1.0),
        "seed": 1,
    }
    one, two = (runs.text_fates(**arguments) for _ in range(2))
    assert one == two
    assert all(-1 <= one[key] <= 1 for key in ("spearman", "partial", "with frequency"))
    assert len(one["z"]) == len(one["spread"]) == 30
    assert max(one["spread"]) <= math.log(30) and abs(one["losses"][0] - math.log(30)) < 1
