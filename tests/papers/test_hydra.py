"""What the Hydra experiment measures with: data that says what it should, and sizes that are equal."""

from __future__ import annotations

import pytest
import torch

from regard.nn import hydra_mixers
from regard.papers import _hydra_runs as runs


def test_the_transformer_has_as_many_parameters() -> None:
    hydra = runs.build(hydra_mixers(4), layers=4, width=32, product_keys={"keys": 16})
    other = runs.transformer_like(hydra)
    assert abs(runs.parameters(other) / runs.parameters(hydra) - 1) < 0.005


def test_every_stretch_follows_its_chain() -> None:
    task = runs.domains(32, vocabulary=8, chains=4, stretch=16, seed=3)
    samples, rows = task.draw(400, 1), runs.chain_rows(8, 4, 3)
    chain = runs.which_chain(400, 32, torch.Generator().manual_seed(1), chains=4, stretch=16)
    counts = torch.zeros(4, 8, 8)
    ids = samples.ids
    place = (chain[:, 1:].flatten(), ids[:, :-1].flatten(), ids[:, 1:].flatten())
    counts.index_put_(place, torch.ones(len(place[0])), accumulate=True)
    seen = counts.sum(-1) > 200
    found = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    assert seen.sum() >= 8
    assert (found - rows)[seen].abs().max() < 0.12
    torch.testing.assert_close(rows.sum(-1), torch.ones(4, 8))


def test_a_carried_value_is_shown_once_and_asked_later() -> None:
    samples = runs.carried(48, 8).draw(50, 0)
    for ids, labels in zip(samples.ids, samples.labels, strict=True):
        (place,) = (ids >= 2).nonzero().flatten().tolist()
        asked = (labels >= 0).nonzero().flatten()
        assert place < 12 and len(asked) == 8 and asked.min() > 24
        assert (labels[asked] == ids[place]).all() and (ids[asked - 1] == 1).all()


def test_mutual_information() -> None:
    label = torch.tensor([0, 0, 1, 1, 2, 2])
    assert runs.mutual_information(label, (label + 1) % 3) == pytest.approx(1)
    assert runs.mutual_information(label, torch.zeros(6, dtype=torch.long)) == pytest.approx(0)
    half = runs.mutual_information(label, torch.tensor([0, 1, 0, 1, 0, 1]))
    assert half == pytest.approx(0, abs=1e-12)


def test_facts_stay_the_same_and_only_values_are_asked() -> None:
    task = runs.facts(30, vocabulary=16)
    samples = task.draw(500, 0)
    held = task.draw(500, 1, held_out=True)
    known = {tuple(row[:2]): row[2] for row in samples.ids.tolist()}
    assert len(known) == 30
    assert all(known[tuple(row[:2])] == row[2] for row in held.ids.tolist())
    assert (samples.labels[:, :2] < 0).all() and torch.equal(
        samples.labels[:, 2], samples.ids[:, 2]
    )


def test_the_published_router_looks_ahead() -> None:
    found = runs.look_ahead()
    assert found["published"] > 0.01 and found["causal"] == 0


def test_differences_are_nought() -> None:
    assert max(runs.differences(30).values()) < 1e-9
