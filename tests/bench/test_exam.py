from __future__ import annotations

from typing import Any

import pytest

from regard._errors import InputError
from regard.bench.documents import CONTINUATION, KINDS, builtin_documents, text_documents
from regard.bench.exam import QUESTIONS, Exam, make_exam
from regard.texts import prose


@pytest.fixture(scope="module", params=KINDS)
def exam(request: Any, tiny_tokenizer: Any) -> Exam:
    (document,) = builtin_documents(tiny_tokenizer, 2000, kinds=[request.param])
    return make_exam(tiny_tokenizer, document, 2000)


def test_lengths_are_exact(exam: Exam):
    assert len(exam.context) == exam.length == 2000
    assert len(exam.continuation) == CONTINUATION
    assert {question.measure for question in exam.questions} == set(QUESTIONS)
    assert [q.measure for q in exam.questions] == sorted(
        (q.measure for q in exam.questions), key=QUESTIONS.index
    )


def test_every_answer_stands_in_the_context_where_its_depth_says(exam: Exam, tiny_tokenizer: Any):
    for question in exam.questions:
        answer = tiny_tokenizer.decode(question.answer).strip()
        around = int(question.depth * exam.length)
        near = tiny_tokenizer.decode(exam.context[max(0, around - 8) : around + 120])
        if question.measure == "variables":
            assert answer.rpartition(", ")[2] in near  # the chain ends there
        else:
            assert answer in near


def test_needles_are_stated_twice_and_numbers_once(exam: Exam, tiny_tokenizer: Any):
    text = tiny_tokenizer.decode(exam.context)
    for question in exam.questions:
        answer = tiny_tokenizer.decode(question.answer)
        if question.measure == "needle":
            assert text.count(f"is{answer}.") == 2
        if question.measure == "multikey":
            assert text.count(f"is:{answer}.") == 1


def test_without_what_was_planted_the_document_is_whole(exam: Exam, tiny_tokenizer: Any):
    planted = {place for start, end in exam.planted for place in range(start, end)}
    left = [t for place, t in enumerate(exam.context.tolist()) if place not in planted]
    (document,) = builtin_documents(tiny_tokenizer, 2000, kinds=[exam.kind])
    assert left + exam.continuation.tolist() == list(document.ids[: len(left) + CONTINUATION])


def test_copied_passages_hold_nothing_planted(exam: Exam):
    context = exam.context.tolist()
    planted = {place for start, end in exam.planted for place in range(start, end)}
    for question in exam.questions:
        if question.measure == "copy":
            passage = [*question.prompt, *question.answer]
            starts = [i for i in range(len(context)) if context[i : i + len(passage)] == passage]
            assert any(planted.isdisjoint(range(s, s + len(passage))) for s in starts)


def test_the_seed_and_the_document_decide_what_is_planted(tiny_tokenizer: Any):
    one, two = text_documents(tiny_tokenizer, prose(9000), 600, most=2)
    first = make_exam(tiny_tokenizer, one, 600)
    assert first.context.tolist() == make_exam(tiny_tokenizer, one, 600).context.tolist()
    assert first.questions != make_exam(tiny_tokenizer, one, 600, seed=1).questions
    assert first.questions != make_exam(tiny_tokenizer, two, 600).questions


def test_documents_share_no_text(tiny_tokenizer: Any):
    found = builtin_documents(tiny_tokenizer, 500, each=2) + builtin_documents(
        tiny_tokenizer, 500, each=1, skip=2
    )
    assert len({document.ids for document in found}) == len(found) == 9
    assert {document.kind for document in found} == set(KINDS)
    for kind in KINDS:
        texts = [tiny_tokenizer.decode(d.ids) for d in found if d.kind == kind]
        assert not any(a[100:200] in b for a in texts for b in texts if a is not b)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda t: builtin_documents(t, 500, kinds=["poems"]), "kinds must be of prose"),
        (lambda t: builtin_documents(t, 10**6), "built-in prose texts hold"),
        (lambda t: text_documents(t, "too short", 500), "must have at least 548 tokens"),
        (lambda t: make_exam(t, text_documents(t, prose(3000), 300)[0], 200), "at least 256"),
        (lambda t: make_exam(t, text_documents(t, prose(3000), 300)[0], 900), "document 'text 1' must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused(tiny_tokenizer: Any, work: Any, message: str):
    with pytest.raises(InputError, match=message):
        work(tiny_tokenizer)
