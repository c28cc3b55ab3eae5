"""The language against its rule, the flow against autograd and its closed forms, models and instruments against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regard._errors import InputError
from regard.labs import bigram_backcopy as lab
from regard.labs.bigram_backcopy import training
from regard.labs.bigram_backcopy.models import Trace, relu_attention


def small(symbols=8):
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(symbols, symbols, generator=generator) + 0.05
    return lab.Backcopy(rows / rows.sum(1, keepdim=True), rows.sum(0) / rows.sum(), 3)


def query(symbols=6, seed=0):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(symbols, 3.0))
    return p, rng.normal(size=symbols) * 2, rng.normal(size=symbols)


def test_triggers_copy_back_and_the_rest_follows_the_bigram():
    language = small()
    ids = language.draw(4000, 20, torch.Generator().manual_seed(1))
    trigger = language.is_trigger
    assert (ids[:, 0] == 8).all() and not (ids[:, 1:] == 8).any()
    assert not trigger[ids[:, 1]].any()
    asked = trigger[ids[:, 1:-1]]
    assert asked.any() and (ids[:, 2:] == ids[:, :-2])[asked].all()
    now, following = ids[:, 1:-1][~asked], ids[:, 2:][~asked]
    counts = torch.bincount(now * 8 + following, minlength=64).view(8, 8).float()
    seen = counts[~trigger[:-1]]
    torch.testing.assert_close(
        seen / seen.sum(1, keepdim=True), language.transition[~trigger[:-1]], atol=0.02, rtol=0
    )


def test_no_model_beats_the_surprise_and_the_rule_itself_reaches_it():
    language = small()
    ids = language.draw(3000, 16, torch.Generator().manual_seed(2))
    rows = torch.cat(
        [language.transition, torch.where(language.is_trigger[:-1], 0, language.marginal)[None]]
    )
    guess = (rows / rows.sum(1, keepdim=True))[ids[:, 1:-1]]
    copied = torch.nn.functional.one_hot(ids[:, :-2], 9)[..., :8].float()
    guess = torch.where(language.is_trigger[ids[:, 1:-1], None], copied, guess)
    nats = -guess.gather(-1, ids[:, 2:, None])[..., 0].log()
    assert float(nats.mean()) == pytest.approx(
        float(language.surprise(ids)[:, 1:].mean()), abs=0.02
    )


def test_the_velocity_is_minus_the_gradient():
    p, xi, beta = query()
    velocity = lab.extreme_velocity(0.7, beta, p, xi, 5)
    a = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(beta, requires_grad=True)
    t = torch.tensor(p)
    logits = t.log() + (a.exp() * b + torch.tensor(xi)) / (a.exp() + 5)
    loss = (t * (t.log() - logits.log_softmax(0))).sum()
    assert float(loss.detach()) == pytest.approx(lab.extreme_loss(0.7, beta, p, xi, 5), rel=1e-12)
    loss.backward()
    assert velocity[0] == pytest.approx(-float(a.grad), rel=1e-10)
    np.testing.assert_allclose(velocity[1], -b.grad.numpy(), rtol=1e-10)


def test_the_sink_logit_grows_as_half_a_logarithm():
    p, xi, _ = query(16)
    times = np.array([1e3, 1e4])
    gap = np.abs(lab.sink_logit_ode(p, xi, 5, times, step=0.1) - lab.sink_logit(p, xi, times))
    # what is left out is of order e^-alpha, so of order t^-1/2
    assert gap[1] < 0.5 * gap[0] < 0.5


def test_the_drain_stands_still_at_its_limit_and_approaches_it_at_its_rate():
    p, xi, beta = query()
    for alpha in (0.0, 2.0):
        limit = lab.drain_limit(alpha, beta, xi)
        assert lab.extreme_loss(alpha, limit, p, xi, 5) == pytest.approx(0, abs=1e-12)
        assert limit.sum() == pytest.approx(beta.sum())
    rate = lab.drain_rate(2.0, p, 5)
    limit, now, far = lab.drain_limit(2.0, beta, xi), beta.copy(), []
    for time in np.arange(0, 40 / rate, 0.5):
        if time > 20 / rate:
            far.append((time, np.linalg.norm(now - limit)))
        now = now + 0.5 * lab.extreme_velocity(2.0, now, p, xi, 5)[1]
        if far and far[-1][1] < 1e-9:
            break
    slope = np.polyfit([t for t, _ in far], np.log([f for _, f in far]), 1)[0]
    assert -slope == pytest.approx(rate, rel=0.05)


def test_relu_attention_divides_by_the_query_index():
    scores = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0))
    found = relu_attention(scores)
    for i in range(5):
        for j in range(5):
            wanted = max(float(scores[1, i, j]), 0) / (i + 1) if j <= i else 0
            assert float(found[1, i, j]) == pytest.approx(wanted)


@pytest.mark.parametrize("attention", ["softmax", "relu"])
def test_models_are_causal_and_seeds_do_not_meet(attention):
    size = lab.Size(2, 8, 6)
    ids = torch.randint(9, (2, 3, 6), generator=torch.Generator().manual_seed(0))
    pair, single = lab.Models([0, 1], size, 9, attention), lab.Models([1], size, 9, attention)
    torch.testing.assert_close(pair(ids)[1:], single(ids[1:]))
    changed = ids.clone()
    changed[..., 4:] = 8
    torch.testing.assert_close(pair(changed)[..., :4, :], pair(ids)[..., :4, :])
    pair(ids).sum().backward()
    assert all(p.grad is not None for p in pair.parameters())


def test_the_gap_leaves_out_the_start_and_hidden_keys():
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    gap = training.sink_gap(scores)
    for i in range(1, 4):
        mean = sum(float(scores[i, j]) for j in range(1, i + 1)) / i
        assert float(gap[i]) == pytest.approx(float(scores[i, 0]) - mean, abs=1e-6)


def test_the_instruments_read_what_the_models_did():
    language, models = small(), lab.Models([0], lab.Size(2, 8, 12), 9)
    ids = language.draw(16, 12, torch.Generator().manual_seed(0))[None]
    traces: list[Trace] = []
    with torch.no_grad():
        models(ids, traces=traces)
        found = training.instruments(models, ids, traces)
    value, hidden = traces[1].value[0].norm(dim=-1), traces[1].hidden[0].norm(dim=-1)
    ratio = float((value[:, 0] / value[:, 1:].mean(1)).mean())
    assert found["drain"][0, 1] == pytest.approx(ratio, rel=1e-5)
    peak = float((hidden[:, 0] / hidden[:, 1:].median(1).values).mean())
    assert found["peak"][0, 2] == pytest.approx(peak, rel=1e-5)
    entropy = float(torch.special.entr(traces[1].weights).sum(-1).mean())
    assert found["entropy"][0, 1] == pytest.approx(entropy, rel=1e-4)


def test_training_lowers_both_losses_and_repeats():
    language = small()
    recipe = lab.Recipe(lab.Size(1, 16, 12), steps=60, rate=1e-2, batch=16, logs=3)
    course, models = lab.train(recipe, language, [0, 1])
    again, _ = lab.train(recipe, language, [0, 1])
    for name in ("ordinary excess", "trigger excess"):
        np.testing.assert_array_equal(course.measures[name], again.measures[name])
        assert (course.measures[name][-1] < course.measures[name][0]).all()
    assert set(lab.intervene(models, language, count=16)) == {"zero", "park", "ideal", "drained"}


def test_impossible_settings_are_refused():
    with pytest.raises(InputError, match="triggers"):
        lab.Backcopy(torch.eye(3), torch.ones(3) / 3, 3)
    with pytest.raises(InputError, match="attention"):
        lab.Models([0], lab.Size(), 9, "linear")
    with pytest.raises(InputError, match="optimiser"):
        lab.train(lab.Recipe(lab.Size(1, 8, 8), optimiser="adam"), small(), [0])
    with pytest.raises(InputError, match="sum 1"):
        lab.sink_logit_ode(np.ones(3), np.ones(3), 5, np.array([1.0]))


def test_the_laboratory_reports_every_measure_and_writes_its_film(tmp_path):
    result = lab.BigramBackcopy(
        layers=2, symbols=8, width=8, length=10, batch=4, steps=10, logs=2
    ).run()
    assert {
        "drain (layer 1)",
        "peak (site 2)",
        "entropy (layer 0)",
        "delta logit (layer 0)",
    } <= set(result.series)
    assert set(result.checks) == {"sink", "copy", "drain", "active"}
    assert result.checks["sink"].holds is not True  # ten steps teach nothing
    names = {path.name for path in result.write(tmp_path)}
    assert {"film.png", "film.gif", "series.csv"} <= names
