"""The parts of the experiment against independent computations."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Categorical, LogNormal, MixtureSameFamily

from regard.papers import Run
from regard.papers import _aaren_runs as runs
from regard.papers import aaren as paper


@pytest.mark.parametrize("name", ["aaren", "softmax", "GRU"])
def test_stacks_are_causal(name: str):
    stack, series = runs.Stack(name, 3, 12, 5, width=16), torch.randn(2, 12, 3)
    found = stack(series)
    other = series.clone()
    other[:, 7:] += 1
    assert found.shape == (2, 12, 5)
    torch.testing.assert_close(stack(other)[:, :7], found[:, :7])
    assert (stack(other) - found)[:, 7:].abs().min() > 0


def test_mixture_is_that_of_torch():
    numbers, waits = torch.randn(2, 7, 12), torch.rand(2, 7) + 0.01
    weight, mean, spread = numbers.chunk(3, -1)
    expected = MixtureSameFamily(Categorical(logits=weight), LogNormal(mean, spread.exp()))
    torch.testing.assert_close(
        runs.log_normal_mixture(numbers, waits), expected.log_prob(waits), atol=1e-5, rtol=1e-5
    )


def test_density_of_a_wait_is_the_intensity_after_its_integral():
    base, jumps, decay = 0.2, (0.2, 0.8, 1.4), 1.2
    events = runs.hawkes(3, 6)
    times = events.waits.double().cumsum(1)
    for row in range(3):
        past: list[tuple[float, float]] = []
        start = 0.0

        def rate(t: torch.Tensor, past: list[tuple[float, float]]) -> torch.Tensor:
            excited = [jump * torch.exp(-decay * (t - at)) for at, jump in past]
            return torch.as_tensor(base + sum(excited)) * torch.ones_like(t)

        for i in range(6):
            end = float(times[row, i])
            grid = torch.linspace(start, end, 4001, dtype=torch.float64)
            expected = rate(grid[-1:], past).log() - torch.trapezoid(rate(grid, past), grid)
            assert float(events.density[row, i]) == pytest.approx(float(expected), abs=1e-4)
            past.append((end, jumps[int(events.marks[row, i])]))
            start = end


def test_events_come_at_the_stationary_rate():
    """Mean rate base / (1 - mean jump / decay), and rescaled waits (the integrals) of mean 1."""
    events = runs.hawkes(400, 400)
    rate = 1 / float(events.waits[:, 200:].mean())
    assert rate == pytest.approx(0.2 / (1 - 0.8 / 1.2), rel=0.03)
    again = runs.hawkes(400, 400)
    assert torch.equal(again.waits, events.waits)


def test_held_out_windows_overlap_none_that_is_trained_on():
    data = runs.seasonal_series(1500)
    rows = (1500 - 120) // 3 + 1
    first_held = rows * 4 // 5
    assert len(data.past) - data.train == rows - first_held
    assert 3 * (data.train - 1) + 120 <= 3 * first_held
    torch.testing.assert_close(data.past.mean(1), torch.zeros(len(data.past), 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(data.past.std(1), torch.ones(len(data.past), 1))


def test_naive_errors_by_hand():
    past = torch.randn(5, 48, 1)
    future = torch.randn(5, 24)
    data = runs.Windows(past, future, train=2)
    found = runs.naive_errors(data)
    last = ((past[2:, -1] - future[2:]) ** 2).mean()
    day = ((past[2:, 24:, 0] - future[2:]) ** 2).mean()
    assert found["last value"] == pytest.approx(float(last))
    assert found["last day"] == pytest.approx(float(day))


def test_cumulative_cost_of_a_straight_line_is_a_parabola():
    contexts = [1, 10, 1000]
    found = runs.cumulative(contexts, [2.0 * n for n in contexts])
    assert found[1:] == pytest.approx([n**2 + 1 for n in contexts[1:]])


def test_a_cache_grows_and_a_state_does_not():
    contexts = [16, 64]
    own = runs.step_cost("aaren", contexts, steps=4, width=16)["kilobytes"]
    cache = runs.step_cost("softmax", contexts, steps=4, width=16)["kilobytes"]
    assert own[0] == own[1] == pytest.approx(3 * 4 * (4 + 2) * 4 / 1000)
    assert cache[1] > 2 * cache[0]


def test_streams_what_it_gives_at_once():
    worst, sizes = runs.streamed(20, width=16)
    assert worst < 1e-10
    assert set(sizes) == {3 * 4 * (4 + 2)}


def test_the_class_is_the_value_of_the_asked_key():
    data = runs.lookups(30, pairs=3, keys=5)
    assert data.train.shape == (20, 4, 10) and data.test.shape == (10, 4, 10)
    for row, label in zip(data.train, data.train_labels, strict=True):
        key, value = row[:, :5], row[:, 5:]
        known = dict(zip(key[:3].argmax(-1).tolist(), value[:3].argmax(-1).tolist(), strict=True))
        assert len(known) == 3 and not value[3].any()
        assert known[int(key[3].argmax())] == int(label)


def test_forms_agree():
    assert max(runs.deviations().values()) < 1e-10
    assert math.isclose(runs.far(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 2.0])), 3.0)


@pytest.mark.slow
def test_quick_scale_records_every_claim(tmp_path):
    run = Run(paper.PAPER, scale="quick", work=tmp_path)
    paper.experiment(run)
    assert set(run.records) == {claim.id for claim in paper.PAPER.claims if not claim.beyond}
    for name in ("exact", "parameters", "streaming"):
        assert run.records[name]["holds"]
    assert run.figures == ["streaming.svg"]
