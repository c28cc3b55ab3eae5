"""Rules against loops and operators, closed forms against brute force, capacity against sampling, readers against definitions."""

from __future__ import annotations

import itertools
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from regard._errors import InputError
from regard.labs import pavlovian as lab
from regard.labs.pavlovian import learned
from regard.labs.pavlovian.capacity import random_codes
from regard.labs.pavlovian.conditioning import predictions
from regard.ops import delta_rule
from regard.ops.linear_attention import causal_product

RULES = [
    lab.Hebbian(0.1),
    lab.Decaying(0.1, 0.97),
    lab.RescorlaWagner(0.1),
    lab.Oja(0.1),
]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


# the rules


def test_hebb_read_by_queries_is_masked_linear_attention():
    key, query, value = normal(9, 4), normal(9, 4, seed=1), normal(9, 3, seed=2)
    after = lab.memories(lab.Hebbian(1.0), key, value)[1:]
    read = torch.einsum("tvd,td->tv", after, query)
    torch.testing.assert_close(read, (query @ key.mT).tril() @ value)
    operator, _ = causal_product(query[None, None], key[None, None], value[None, None], chunk=4)
    torch.testing.assert_close(read, operator[0, 0])


def test_a_decaying_trace_weights_each_trial_by_its_age():
    key, query, value = normal(9, 4), normal(9, 4, seed=1), normal(9, 3, seed=2)
    after = lab.memories(lab.Decaying(1.0, 0.8), key, value)[1:]
    age = torch.arange(9.0)[:, None] - torch.arange(9.0)
    weights = (query @ key.mT) * (0.8 ** age.clamp_min(0)).double().tril()
    torch.testing.assert_close(torch.einsum("tvd,td->tv", after, query), weights @ value)


def test_rescorla_wagner_is_the_delta_rule_of_ops():
    key, query, value = 0.5 * normal(9, 4), normal(9, 4, seed=1), normal(9, 3, seed=2)
    after = lab.memories(lab.RescorlaWagner(0.3), key, value)
    one = lambda part: part[None, None]  # noqa: E731
    strength = torch.full((1, 1, 9), 0.3, dtype=torch.float64)
    read, memory = delta_rule(one(query), one(key), one(value), strength, chunk=4)
    torch.testing.assert_close(after[-1], memory[0, 0])
    torch.testing.assert_close(torch.einsum("tvd,td->tv", after[1:], query), read[0, 0])


def test_rescorla_wagner_is_descent_on_the_squared_error():
    key, value, start = normal(4), normal(3, seed=1), normal(3, 4, seed=2)
    memory = start.clone().requires_grad_()
    (0.5 * (value - memory @ key).square().sum()).backward()
    after = lab.memories(lab.RescorlaWagner(0.2), key[None], value[None], start)[-1]
    torch.testing.assert_close(after, start - 0.2 * memory.grad)


def test_oja_keeps_every_row_bounded_where_hebb_grows():
    keys, values = random_codes(3000, 5, generator=generator()).abs(), normal(3000, 2)
    bounded = lab.memories(lab.Oja(0.05), keys, values)
    grown = lab.memories(lab.Hebbian(0.05), keys, values.abs())
    assert float(bounded.norm(dim=-1).max()) < 3
    tail = lab.memories(lab.Oja(0.05), keys[:1].expand(500, -1), torch.ones(500, 1).double())[-1]
    torch.testing.assert_close(tail[0], keys[0])  # a constant outcome makes the row its cue
    assert float(grown.abs().max()) > 3


def test_bcm_strengthens_what_is_above_its_running_mean_and_stops_on_a_constant():
    eye = torch.ones(1, 1).double()
    values = torch.ones(400, 1).double()
    course = lab.memories(lab.BCM(0.1), eye.expand(400, -1), values)[:, 0, 0]
    steps = course.diff()
    assert float(steps[0]) == pytest.approx(0.1) and float(steps[-1].abs()) < 1e-9
    threshold, memory = 0.0, 0.0
    for value in (1.0, 0.5, 0.25):
        memory += 0.1 * value * (value - threshold)
        threshold += 0.1 * (value**2 - threshold)
    three = torch.tensor([[1.0], [0.5], [0.25]]).double()
    assert float(lab.memories(lab.BCM(0.1), eye.expand(3, -1), three)[-1]) == pytest.approx(memory)


def test_rules_take_batches():
    keys, values = normal(2, 5, 4), normal(2, 5, 3, seed=1)
    for rule in (*RULES, lab.BCM(0.1)):
        whole = lab.memories(rule, keys, values)
        for i in range(2):
            torch.testing.assert_close(whole[i], lab.memories(rule, keys[i], values[i]))


# conditioning


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(("first", "second"), [(15, 20), (1, 1), (7, 3)])
def test_every_protocol_meets_its_closed_form(rule, first, second):
    off = lab.phenomena(rule, first, second).off(predictions(rule, first, second))
    assert off.pop("inhibited") < 1e-3
    assert max(off.values()) < 1e-12, off


def test_known_numbers_of_rescorla_wagner():
    found = lab.phenomena(lab.RescorlaWagner(0.1), 15, 20)
    assert found.blocked == pytest.approx(0.101759, abs=1e-6)
    assert found.shadowed == pytest.approx(0.8, abs=1e-9)
    assert lab.overshadowed_response(0.1, 0.5, 1.0, 1000) == pytest.approx(0.2)
    assert found.inhibited == pytest.approx(-1, abs=1e-6)


def test_only_error_correction_blocks_overshadows_extinguishes_and_inhibits():
    for rule in (*RULES, lab.BCM(0.1)):
        found = lab.phenomena(rule)
        corrects = isinstance(rule, lab.RescorlaWagner)
        assert (found.blocked < 0.7 * found.control) == corrects
        assert (found.shadowed < 0.99) == corrects
        assert (found.inhibited < -0.5) == corrects
        fades = isinstance(rule, lab.RescorlaWagner | lab.Decaying)
        assert (found.extinguished < 0.9 * found.acquired) == fades
        assert (found.delayed < 0.99) == isinstance(rule, lab.Decaying)


def test_a_rule_without_closed_forms_says_so():
    with pytest.raises(TypeError, match="BCM"):
        predictions(lab.BCM(0.1))


# capacity


@pytest.mark.parametrize(("items", "dimension"), [(16, 64), (64, 64), (96, 32)])
def test_cross_talk_has_its_formula_and_is_that_of_the_memory(items, dimension):
    found = lab.cross_talk(items, dimension, 40, generator=generator())
    expected = lab.cross_talk_error(items, dimension)
    assert float(found.error.mean()) == pytest.approx(expected, rel=0.05)
    random = generator(3)
    one = lab.cross_talk(items, dimension, 1, generator=random)
    random = generator(3)
    values = random_codes(1, items, dimension, generator=random)[0]
    keys = random_codes(1, items, dimension, generator=random)[0]
    memory = lab.memories(lab.Hebbian(1.0), keys, values)[-1]
    errors = [(memory @ k - v).square().sum() for k, v in zip(keys, values, strict=True)]
    assert float(one.error) == pytest.approx(float(sum(errors) / items))


def test_clean_up_holds_up_to_as_many_items_as_dimensions_and_then_falls():
    accuracy = [
        float(lab.cross_talk(n, 64, 5, generator=generator()).accuracy.mean())
        for n in (32, 64, 1024)
    ]
    assert accuracy[0] == 1 and accuracy[1] > 0.99 and accuracy[2] < 0.8


def test_the_first_overload_is_the_first_there_is():
    found = lab.first_overload(9, 6, generator=generator(5))
    keys = random_codes(6, (4 * 3) + 8, 9, generator=generator(5))
    for draw in range(6):
        overlap = (keys[draw] @ keys[draw].mT).abs()
        first = next(
            n
            for n in itertools.count(1)
            if max(float(overlap[i, :n].sum() - overlap[i, i]) for i in range(n)) >= 1
        )
        assert float(found[draw]) == first


def test_overload_grows_like_the_square_root():
    means = [float(lab.first_overload(d, 200, generator=generator()).mean()) for d in (16, 256)]
    assert math.log(means[1] / means[0]) / math.log(16) == pytest.approx(0.5, abs=0.1)
    assert means[1] < lab.worst_case_count(256)


def test_a_chain_compounds_and_is_not_independent_noise():
    errors = lab.chain_errors(32, 128, 4, 30, generator=generator()).mean(0)
    for depth in range(1, 5):
        assert float(errors[depth - 1]) == pytest.approx(lab.chain_error(32, 128, depth), rel=0.08)
    e = 0.0
    for _ in range(4):  # noise as if it did not lie in the span of the stored values
        e = 31 / 128 + 32 / 128 * e
    assert float(errors[-1]) > 2 * e


def test_a_cleaned_chain_survives_like_independent_hops():
    right = lab.cleaned_chain(64, 32, 3, 200, generator=generator()).mean(0)
    failure = 1 - float(right[0])
    assert 0.02 < failure < 0.3
    for depth in (2, 3):
        assert float(right[depth - 1]) == pytest.approx(lab.chain_success(failure, depth), abs=0.02)


def test_heads_with_their_own_codes_share_the_noise_and_projections_do_not():
    own = lab.cross_talk(32, 64, 20, heads=4, generator=generator())
    assert float(own.error.mean()) == pytest.approx(31 / (4 * 64), rel=0.05)
    projected = lab.projected_heads(32, 64, 20, 4, generator=generator())
    assert float(projected.error.mean()) > 31 / 64


def test_a_majority_is_as_good_as_the_binomial_says():
    alone, most = lab.redundant_heads(64, 32, 10, 3, generator=generator())
    p = float(alone.mean())
    assert 0.05 < p < 0.4
    assert float(most.mean()) == pytest.approx(lab.majority_failure(p, 3), abs=0.03)


@given(p=st.floats(0, 1), heads=st.sampled_from([1, 3, 5]))
@settings(max_examples=30, deadline=None)
def test_a_majority_failure_is_a_sum_over_all_outcomes(p, heads):
    brute = 0.0
    for outcome in itertools.product((0, 1), repeat=heads):
        if sum(outcome) > heads / 2:
            brute += math.prod(p if wrong else 1 - p for wrong in outcome)
    assert lab.majority_failure(p, heads) == pytest.approx(brute, abs=1e-12)


# heads


def test_the_participation_ratio_is_one_over_the_cross_talk_of_keys():
    spread = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.1]).double()
    keys = normal(60_000, 5) * spread
    ratio = float(lab.participation_ratio(keys))
    energy = spread.square()
    assert ratio == pytest.approx(float(energy.sum() ** 2 / energy.square().sum()), rel=0.02)
    overlap = (keys[:30_000] * keys[30_000:]).sum(-1).square().mean()
    assert float(overlap / keys.square().sum(-1).mean() ** 2) == pytest.approx(1 / ratio, rel=0.05)


def test_safe_associations_do_not_see_a_common_offset():
    keys = normal(3, 200, 8)
    offset = keys + 50 * normal(1, 1, 8, seed=1)
    torch.testing.assert_close(lab.safe_associations(offset), lab.safe_associations(keys))
    assert float(lab.participation_ratio(offset).max()) < 1.1


# readers


def streams(runs: int = 2, seed: int = 0) -> learned.Streams:
    return lab.draw_streams(runs, 3, trials=6, cues=4, dim=5, generator=generator(seed))


def test_streams_add_the_strengths_of_their_cues():
    drawn = streams()
    code = torch.linalg.pinv(drawn.probes.double().mT)
    present = (code @ drawn.cues.double().mT).mT
    rounded = present.round()
    torch.testing.assert_close(present, rounded, atol=1e-3, rtol=0)
    counts = rounded.sum(-1)
    assert set(counts.unique().tolist()) == {1.0, 2.0} and float(rounded.max()) == 1
    strengths = (rounded @ drawn.answers.double()[..., None]).squeeze(-1)
    torch.testing.assert_close(strengths, drawn.outcomes.double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (lab.HebbianReader, lab.Hebbian(math.exp(-1.0))),
        (lab.DeltaReader, lab.RescorlaWagner(1 / (1 + math.e))),
    ],
)
def test_a_reader_is_its_rule_on_projected_cues(kind, rule):
    reader, drawn = kind(2, 5, generator=generator()), streams()
    found = reader(drawn.cues, drawn.outcomes, drawn.probes)
    for run, row in itertools.product(range(2), range(3)):
        keys = drawn.cues[run, row] @ reader.key[run]
        queries = drawn.probes[run, row] @ reader.query[run]
        expected = lab.responses(rule, keys, drawn.outcomes[run, row], queries)[-1]
        torch.testing.assert_close(found[run, row], expected, rtol=1e-4, atol=1e-5)


def test_the_softmax_reader_averages_outcomes():
    reader, drawn = lab.SoftmaxReader(2, 5, generator=generator()), streams()
    reader.query.data.zero_()
    found = reader(drawn.cues, drawn.outcomes, drawn.probes)
    mean = math.exp(-1) * drawn.outcomes.mean(-1, keepdim=True).expand_as(found)
    torch.testing.assert_close(found, mean)


def test_training_learns_and_runs_do_not_see_each_other():
    sizes = {"steps": 150, "batch": 32, "trials": 8, "cues": 3, "rate": 0.02, "seed": 1}
    reader = lab.DeltaReader(2, 6, generator=generator())
    losses = lab.train_reader(reader, **sizes)
    assert losses.shape == (150, 2)
    assert losses[-20:].mean() < 0.7 * losses[:20].mean()
    assert bool((reader.key[0] != reader.key[1]).any())
    again = lab.DeltaReader(2, 6, generator=generator())
    np.testing.assert_array_equal(losses, lab.train_reader(again, **sizes))


def test_least_squares_is_a_floor_for_readers():
    drawn = lab.draw_streams(1, 400, trials=8, cues=3, dim=6, generator=generator())
    floor = float(learned.least_squares_error(drawn))
    reader = lab.DeltaReader(1, 6, generator=generator())
    lab.train_reader(reader, steps=150, batch=32, trials=8, cues=3, rate=0.02, seed=1)
    assert floor < float(learned.prediction_error(reader, drawn).detach()) < 1


def test_an_ideal_reader_of_each_rule_has_the_closed_forms_in_context():
    # with identity projections and cues of many dimensions, nearly orthogonal, readers are the rules themselves
    for kind, rule in (
        (lab.HebbianReader, lab.Hebbian(math.exp(-1.0))),
        (lab.DeltaReader, lab.RescorlaWagner(1 / (1 + math.e))),
    ):
        reader = kind(1, 512, generator=generator())
        reader.key.data[:] = reader.query.data[:] = torch.eye(512)
        found = lab.conditioned_responses(reader, 60, first=5, second=4)
        expected = predictions(rule, 5, 4)
        for name in ("blocked", "control", "acquired", "extinguished"):
            assert float(found[name]) == pytest.approx(asdict(expected)[name], abs=0.03), name
        alone = rule.rate * 4 if kind is lab.HebbianReader else 1 - (1 - rule.rate) ** 4
        assert float(found["alone"]) == pytest.approx(alone, abs=0.03)


# the laboratory


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="items must be at most 256"):
        lab.Pavlovian(dimension=4, items=(4, 300))
    with pytest.raises(InputError, match="overload_dimensions"):
        lab.Pavlovian(overload_dimensions=(16,))


def test_a_small_run_measures_everything_and_meets_what_is_exact():
    result = lab.Pavlovian(dimension=32, chain_dimension=64, depth=3, heads=(1, 3), draws=10).run()
    for name in ("closed forms", "inhibition", "the delta rule", "linear attention"):
        assert result.checks[name].holds is True, str(result)
    random = {"cross-talk", "chain, n = 32", "redundancy", "projections"}
    assert random | {"worst case"} <= set(result.checks)
    assert all(result.checks[name].holds is not False for name in random), str(result)
    assert all(math.isfinite(row["measured"]) for row in result.rows())
    panels = {one.panel for one in result.series.values()}
    assert {"blocking", "acquisition and extinction", "heads"} <= panels
