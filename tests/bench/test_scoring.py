from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fixtures_models import tiny_llama
from regard.bench.controls import Given, chance, oracle
from regard.bench.documents import text_documents
from regard.bench.exam import Exam, make_exam
from regard.bench.machine import decode_bytes, measured, read_bandwidth
from regard.bench.replay import Prefill
from regard.bench.scoring import agreement, answers, branch, continuation, held_bytes, read
from regard.bench.speed import write
from regard.cache import Full
from regard.cache.budgets import Uniform
from regard.cache.scorers import H2O
from regard.texts import prose


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama().double()


@pytest.fixture(scope="module")
def exam(tiny_tokenizer: Any) -> Exam:
    (document,) = text_documents(tiny_tokenizer, prose(9000), 600, most=1)
    return make_exam(tiny_tokenizer, document, 600)


def test_the_full_cache_answers_as_the_plain_model_does(model: Any, exam: Exam):
    full = Prefill(model, exam.context).full
    graded = answers(model, full, exam)
    assert len(graded) == len(exam.questions)
    for question, (measure, depth, value) in zip(exam.questions, graded, strict=True):
        ids = torch.cat([exam.context, torch.tensor(question.prompt + question.answer)])
        with torch.no_grad():
            logits = model(ids[None]).logits[0].log_softmax(-1)
        size = len(question.answer)
        plain = logits[-size - 1 : -1].gather(1, ids[-size:, None]).mean()
        assert (measure, depth) == (question.measure, question.depth)
        assert value == pytest.approx(plain.item(), abs=1e-6)
    assert full.get_seq_length() == exam.length  # nothing that was asked is left in it


def test_batched_questions_equal_questions_one_by_one(model: Any, exam: Exam, monkeypatch: Any):
    cache, _ = Prefill(model, exam.context).watched(H2O()).evicted(Uniform(0.2))
    together = answers(model, cache, exam)
    monkeypatch.setattr("regard.bench.scoring.BATCH_BYTES", 1)
    alone = answers(model, cache, exam)
    assert [one[2] for one in together] == pytest.approx([one[2] for one in alone], abs=1e-9)


def test_the_continuation_equals_feeding_it_token_by_token(model: Any, exam: Exam):
    cache, _ = Prefill(model, exam.context).watched(H2O()).evicted(Uniform(0.3))
    at_once = continuation(model, cache, exam)
    steps = branch(cache)
    rows = [read(model, steps, token.view(1, 1))[0, 0] for token in exam.continuation[:-1]]
    torch.testing.assert_close(at_once, torch.stack(rows), atol=1e-8, rtol=0)


def test_agreement_with_itself_is_perfect(model: Any, exam: Exam):
    logits = continuation(model, Prefill(model, exam.context).full, exam)
    found = agreement(logits, logits, exam)
    assert found["kl"] == 0 and found["top1"] == 1
    targets = exam.continuation[1:]
    assert found["nll"] == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item())


def test_the_oracle_keeps_what_was_planted_and_chance_does_not(model: Any, exam: Exam):
    prefill = Prefill(model, exam.context)
    planted = {place for start, end in exam.planted for place in range(start, end)}
    size = len(planted) + 4 + 32
    perfect, _ = prefill.watched(oracle(exam, 2, 2)).evicted(Uniform(size))
    assert planted <= set(perfect.kept(1, 1).tolist())
    lucky, _ = prefill.watched(chance(2, 2, exam.length)).evicted(Uniform(size))
    hit = len(planted & set(lucky.kept(1, 1).tolist())) / len(planted)
    assert abs(hit - size / exam.length) < 0.15
    assert lucky.kept(0, 0).tolist() != lucky.kept(0, 1).tolist()


def test_given_scores_follow_their_keys(model: Any, exam: Exam):
    table = torch.zeros(2, 2, exam.length)
    table[1, 0, 300:320] = 1
    cache, _ = Prefill(model, exam.context).watched(Given(table=table)).evicted(Uniform(24))
    assert cache.kept(1, 0).tolist() == [0, 1, 2, 3, *range(300, 320)]
    twice = cache.branch()
    twice.budget = Uniform(14)
    twice.compress()
    assert twice.kept(1, 0).tolist() == [0, 1, 2, 3, *range(300, 310)]


def test_bytes_of_either_kind_of_cache(model: Any, exam: Exam):
    ours, theirs = Full(model), DynamicCache(config=model.config)
    with torch.no_grad():
        ours.prefill(exam.context[None])
        model(exam.context[None], past_key_values=theirs)
    exact = 2 * 2 * 2 * exam.length * 16 * 8
    assert held_bytes(theirs) == exact
    assert exact <= held_bytes(ours) <= 1.2 * exact


def test_greedy_writing_equals_generate(model: Any, exam: Exam):
    prefill = Prefill(model, exam.context)
    first = int(prefill.logits.argmax())
    written = write(model, branch(prefill.full), first, steps=8)
    plain = model.generate(
        exam.context[None], max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    assert written.tokens == plain[0, exam.length :].tolist()
    assert written.milliseconds > 0


def test_the_machine_is_measured():
    assert read_bandwidth(megabytes=16) > 1e8
    tied = tiny_llama()
    assert decode_bytes(tied) == sum(p.nbytes for p in tied.parameters()) - 320 * 64 * 4
    device = torch.device("cpu")
    with measured(device) as took:
        kept = torch.ones(40_000_000)
        kept += 1
    assert took.seconds > 0
    assert took.peak is None or took.peak > 150e6
