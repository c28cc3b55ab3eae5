"""The one-layer model against dense attention over one-hot tokens, its data, its training and what is read off it."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, one_hot

from regard._errors import InputError
from regard.labs import filtering_storing as lab
from regard.labs.filtering_storing import AttentionMLP, AttentionOnly, FilteringStoring, LowRank


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def world(runs: int = 2, **changes: int) -> lab.Facts:
    sizes = {"subjects": 6, "templates": 4, "multiplicity": 2, "answers": 6} | changes
    return lab.draw_facts(runs, **sizes, generator=generator())


def scrambled(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    random = generator(seed)
    for part in model.parameters():
        part.data = torch.randn(part.shape, generator=random)
    return model.double()


def dense(model: torch.nn.Module, run: int, tokens: torch.Tensor) -> torch.Tensor:
    """The definition: one-hot embeddings, a causal map of all scores, and logits at every position."""
    x = one_hot(tokens, model.attention.shape[-1]).double()
    scores = x @ model.attention[run] @ x.mT
    hidden = torch.ones_like(scores).tril().log().add(scores).softmax(-1) @ x
    if isinstance(model, AttentionOnly):
        return hidden @ model.values[run]
    return (hidden @ model.features[run]).relu() @ model.decoder[run]


@pytest.mark.parametrize("kind", [AttentionMLP, AttentionOnly])
def test_the_model_is_causal_attention_over_one_hot_tokens(kind):
    more = {"width": 5, "generator": generator()} if kind is AttentionMLP else {}
    model = scrambled(kind(2, vocabulary=9, **more))
    tokens = torch.randint(9, (2, 7, 4), generator=generator(2))
    found = model(tokens)
    for run in range(2):
        torch.testing.assert_close(found[run], dense(model, run, tokens[run])[:, -1])


def test_without_an_mlp_and_with_even_attention_it_is_a_linear_classifier_of_counts():
    model = scrambled(AttentionOnly(1, vocabulary=8))
    model.attention.data.zero_()
    tokens = torch.randint(8, (1, 5, 6), generator=generator())
    counts = one_hot(tokens[0], 8).double().sum(1)
    torch.testing.assert_close(model(tokens)[0], counts / 6 @ model.values[0])


def test_the_loss_is_next_token_prediction_on_the_sequences():
    facts = world(runs=2)
    model = scrambled(AttentionMLP(2, vocabulary=facts.vocabulary, width=5, generator=generator()))
    parts = [
        lab.loss(model, prompts)
        for prompts in (facts.after_subject(0, generator()), facts.after_template(0, generator()))
    ]
    for run in range(2):
        sequences = torch.tensor(
            [
                [s, int(r), int(facts.answer()[s])]
                for s in range(facts.subjects)
                for r in facts.stored[run, s]
            ]
        )
        logits = dense(model, run, sequences[:, :-1])
        for position in (0, 1):
            torch.testing.assert_close(
                parts[position][run], cross_entropy(logits[:, position], sequences[:, position + 1])
            )


def test_the_gradient_of_the_last_layer_is_error_times_activation():
    facts = world(runs=1)
    model = scrambled(AttentionMLP(1, vocabulary=facts.vocabulary, width=5, generator=generator()))
    asked = facts.questions()
    lab.loss(model, asked).sum().backward()
    x = one_hot(asked.tokens[0], facts.vocabulary).double()
    scores = torch.einsum("nv,vw,ntw->nt", x[:, -1], model.attention[0], x)
    hidden = (torch.einsum("nt,ntv->nv", scores.softmax(-1), x) @ model.features[0]).relu()
    error = (hidden @ model.decoder[0]).softmax(-1)
    error[torch.arange(facts.subjects), asked.targets[0, :, 0]] -= 1
    torch.testing.assert_close(model.decoder.grad[0], hidden.mT @ error / facts.subjects)
    for part in model.parameters():
        assert part.grad is not None and bool((part.grad != 0).any())


def test_worlds_are_what_they_are_called():
    facts = world(runs=3, subjects=10, answers=4, distractors=5)
    pool = set(facts.template_tokens.tolist())
    for run, subject in itertools.product(range(3), range(10)):
        stored = facts.stored[run, subject].tolist()
        assert len(set(stored)) == 2 and set(stored) <= pool
    assert facts.answer().tolist() == [14 + s % 4 for s in range(10)]
    assert facts.vocabulary == 10 + 4 + 4 + 1 + 5
    pretraining = [facts.after_subject(3, generator()), facts.after_template(3, generator(1))]
    for prompts in pretraining:
        assert facts.question not in prompts.tokens
        noise = prompts.tokens[..., 1:4]
        assert int(noise.min()) > facts.question and int(noise.max()) < facts.vocabulary
    assert torch.equal(pretraining[1].tokens[..., -1], facts.stored.flatten(1))
    asked = facts.questions()
    assert bool((asked.tokens[..., 1] == facts.question).all())
    assert asked.first(3).targets.shape == (3, 3, 1)


def test_more_templates_than_there_are_are_refused():
    with pytest.raises(InputError, match="multiplicity must be at most 4"):
        world(multiplicity=5)


@given(seed=st.integers(0, 10**6), multiplicity=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_no_model_is_below_the_floor(seed, multiplicity):
    facts = world(runs=1, multiplicity=multiplicity)
    model = scrambled(AttentionOnly(1, facts.vocabulary), seed)
    found = float(lab.loss(model, facts.after_subject(0, generator())).min())
    assert found >= lab.pretraining_floor(multiplicity) - 1e-9


def test_the_floor_is_reached_by_even_probabilities_on_the_stored_templates():
    facts = world(runs=1)
    model = AttentionOnly(1, facts.vocabulary)
    for subject in range(facts.subjects):
        model.values.data[0, subject, facts.stored[0, subject]] = 50.0
    assert float(lab.loss(model, facts.after_subject(0, generator())).detach()) == pytest.approx(
        math.log(2)
    )


def test_coverage_is_the_share_of_templates_that_sampled_worlds_touch():
    facts = lab.draw_facts(
        4000, subjects=5, templates=6, multiplicity=2, answers=5, generator=generator()
    )
    touched = one_hot(facts.stored[:, :3].flatten(1), facts.vocabulary).sum(1) > 0
    share = touched.float().sum(1).mean() / 6
    assert float(share) == pytest.approx(lab.template_coverage(3, 2, 6), abs=0.01)


def test_the_bound_falls_with_k_and_n_and_rises_with_the_pool():
    bound = lab.extraction_error_bound
    assert bound(16, 3, 24) == pytest.approx(24 ** (-16 * 9 / (2 * 24**2)))
    assert bound(16, 8, 24) < bound(16, 3, 24) < bound(4, 3, 24) < bound(4, 3, 60) < 1


def trained(runs: int = 2, seed: int = 0) -> tuple[AttentionMLP, lab.Facts]:
    facts = world(runs=runs)
    model = AttentionMLP(runs, facts.vocabulary, 32, generator=generator(seed))
    lab.pretrain(model, facts, steps=200, rate=0.02)
    return model, facts


def test_runs_do_not_see_each_other():
    facts = world(runs=2)
    model = AttentionMLP(2, facts.vocabulary, 32, generator=generator())
    lab.pretrain(model, facts, steps=20, rate=0.02)  # few: Adam enlarges rounding
    lab.finetune(model, facts, 3, [0.5] * 5)
    alone_facts = lab.Facts(facts.stored[1:], facts.templates, facts.answers)
    alone = AttentionMLP(2, facts.vocabulary, 32, generator=generator())
    for part in alone.parameters():
        part.data = part.data[1:]
    lab.pretrain(alone, alone_facts, steps=20, rate=0.02)
    lab.finetune(alone, alone_facts, 3, [0.5] * 5)
    for whole, part in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(whole[1:], part, rtol=1e-3, atol=1e-4)


def test_pretraining_reaches_the_floor_and_remembers_the_answers():
    model, facts = trained()
    losses = [
        lab.loss(model, prompts).detach()
        for prompts in (facts.after_subject(0, generator()), facts.after_template(0, generator()))
    ]
    assert float((losses[0] - math.log(2)).abs().max()) < 0.01
    assert float(losses[1].max()) < 0.02
    before = lab.extraction(model, facts, 3)
    assert float(before.seen.max()) < 0.5  # the question token means nothing yet


def test_finetuning_descends_on_its_own_questions_by_the_rates_it_is_given():
    model, facts = trained()
    start = copy.deepcopy(model)
    course = lab.finetune(model, facts, 3, [1.0] * 60)
    assert course.shape == (60, 2, 2)
    np.testing.assert_allclose(
        course[0, 0], lab.loss(start, facts.questions().first(3)).detach(), rtol=1e-5
    )
    found = lab.extraction(model, facts, 3)
    assert float(found.seen.min()) == 1 and float(found.seen_loss.max()) < 0.1
    still = copy.deepcopy(start)
    lab.finetune(still, facts, 3, [0.0] * 5)
    for one, other in zip(still.parameters(), start.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_of_finetuning_is_the_gradient_of_the_questions():
    model, facts = trained()
    expected = copy.deepcopy(model)
    lab.loss(expected, facts.questions().first(2)).sum().backward()
    lab.finetune(model, facts, 2, [0.7])
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other - 0.7 * other.grad)


def test_a_low_rank_update_begins_at_the_model_and_moves_w1_only():
    model, facts = trained()
    start = copy.deepcopy(model)
    tuned = LowRank(model, 2, generator=generator(3))
    asked = facts.questions().tokens
    torch.testing.assert_close(tuned(asked), start(asked))
    lab.finetune(tuned, facts, 3, [1.0] * 20)
    profile = lab.update_rank_profile(start.features, tuned.features)
    assert float(profile[:, 2:].detach().abs().max()) < 1e-6 < float(profile[:, 0].detach().min())
    for name in ("attention", "features", "decoder"):
        assert torch.equal(getattr(tuned.model, name), getattr(start, name))
    assert float(lab.loss(tuned, facts.questions().first(3)).detach().max()) < float(
        lab.loss(start, facts.questions().first(3)).detach().min()
    )


def test_what_is_extracted_is_counted_on_each_side():
    facts = world(runs=1)
    model = AttentionOnly(1, facts.vocabulary)
    for subject in (0, 1, 2, 5):  # 2 is fine-tuned on but wrong, 5 is untouched and right
        answer = facts.answer()[3 if subject == 2 else subject]
        model.values.data[0, subject, answer] = 30.0
    found = lab.extraction(model, facts, 3)
    assert float(found.seen) == pytest.approx(2 / 3)
    assert float(found.unseen) == pytest.approx(1 / 3)
    assert float(found.unseen_loss) > 1


def test_shares_of_attention_add_up():
    facts = world(runs=2, distractors=4)
    model = scrambled(AttentionOnly(2, facts.vocabulary))
    shares = lab.attention_shares(model.attention, facts.after_template(3, generator()))
    torch.testing.assert_close(sum(shares.values()), torch.ones(2, dtype=torch.float64))
    model.attention.data[:, :, facts.question + 1 :] = -50.0
    shares = lab.attention_shares(model.attention, facts.after_template(3, generator()))
    assert float(shares["between"].max()) < 1e-9


def test_a_random_direction_has_its_share_of_a_span():
    features = torch.randn(2000, 12, 16, generator=generator())
    direction = torch.randn(2000, 16, generator=generator(1))
    share = lab.span_share(direction, features, torch.arange(4))
    assert float(share.mean()) == pytest.approx(4 / 16, abs=0.01)
    inside = (torch.randn(2000, 1, 4, generator=generator(2)) @ features[:, :4])[:, 0]
    torch.testing.assert_close(
        lab.span_share(inside, features, torch.arange(4)), torch.ones(2000), rtol=1e-4, atol=1e-4
    )


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="finetuned must be below 10"):
        FilteringStoring(subjects=10, finetuned=(4, 10))
    with pytest.raises(InputError, match="multiplicities must be at most 8"):
        FilteringStoring(templates=(8, 24), multiplicities=(1, 9))


def test_a_small_run_measures_everything_and_sees_templates_help():
    small = FilteringStoring(
        subjects=24, templates=(6, 12), multiplicities=(1, 5), finetuned=(3, 9), steps=250, seeds=2
    )
    result = small.run()
    names = {
        "floor",
        "stored",
        "filtered",
        "seen",
        "bound",
        "order",
        "rank one",
        "token",
        "trigger",
    }
    assert names | {"more templates", "more questions", "larger pool"} == set(result.checks)
    assert result.checks["more templates"].measured > 0.2, str(result)
    assert result.checks["stored"].measured < 0.1
    assert len(result.series) == 4
    assert all(math.isfinite(row["measured"]) for row in result.rows())
