"""Built-in text is deterministic; every probe has the answer that it says it has."""

from __future__ import annotations

import ast
import re
from collections import Counter

import pytest
import torch

from regard import texts
from regard._errors import InputError
from regard.texts import (
    NEEDLES,
    arithmetic_problems,
    code,
    default_text,
    induction_batch,
    needle_prompts,
    prose,
    random_tokens,
    repeated_random_tokens,
    rouge1_recall,
)


@pytest.mark.parametrize("make", [prose, code])
def test_text_has_the_length_and_seed_asked_for(make):
    assert len(make(3000)) == 3000
    assert make(3000, seed=5) == make(3000, seed=5) != make(3000, seed=6)
    with pytest.raises(InputError, match=r"has 1\.\.\d+ characters to give, got 9000000"):
        make(9_000_000)
    with pytest.raises(InputError, match="got 0"):
        make(0)


def test_prose_is_prose_without_repetitions():
    paragraphs = prose(60_000, seed=3).split("\n\n")[:-1]
    assert max(Counter(paragraphs).values()) == 1
    assert all("\n" not in p and p.endswith(".") and p[0].isalpha() for p in paragraphs)
    assert not set(texts._paragraphs()) & {"", "."}


def test_code_is_python():
    for piece in texts._definitions():
        ast.parse(piece)


def test_default_text_is_readable_and_exactly_as_long_as_asked(tiny_tokenizer):
    text = default_text(tiny_tokenizer, 2000)
    ids = tiny_tokenizer(text, add_special_tokens=False).input_ids
    assert abs(len(ids) - 2000) <= 1  # the last word's pieces may join differently once cut
    assert text.startswith("Objects, values and types\n\nObjects are Python's abstraction")
    assert default_text(n_tokens=100) == text[:400]
    assert not re.search(r"[“”‘’*]{2}|\*{4}|={4}", text)
    with pytest.raises(InputError, match="n_tokens must be at most"):
        default_text(tiny_tokenizer, 10_000_000)
    with pytest.raises(InputError, match="at least 1, got 0"):
        default_text(tiny_tokenizer, 0)


def test_default_text_repeats_no_paragraph():
    blocks = [block for block in texts._document().split("\n\n") if len(block) > 100]
    assert max(Counter(blocks).values()) == 1


def test_sources_name_the_bytes():
    assert {name: len(digest) for name, digest in texts.sources().items()} == {
        "prose": 64,
        "code": 64,
    }


def test_random_tokens_are_ordinary_and_different(tiny_tokenizer):
    tokens = random_tokens(tiny_tokenizer, 100, batch=5, seed=1)
    assert tokens.shape == (5, 100) and tokens.dtype == torch.int64
    assert all(row.unique().numel() == 100 for row in tokens)
    assert not set(tokens.flatten().tolist()) & set(tiny_tokenizer.all_special_ids)
    assert torch.equal(tokens, random_tokens(tiny_tokenizer, 100, batch=5, seed=1))
    assert not torch.equal(tokens, random_tokens(tiny_tokenizer, 100, batch=5, seed=2))
    with pytest.raises(InputError, match=r"length must be in 1\.\.318, got 319"):
        random_tokens(tiny_tokenizer, 319)


def test_repeats_repeat(tiny_tokenizer):
    tokens = repeated_random_tokens(tiny_tokenizer, 7, repeats=3, batch=2)
    assert tokens.shape == (2, 21)
    assert torch.equal(tokens[:, :7], tokens[:, 7:14])
    assert torch.equal(tokens[:, :7], tokens[:, 14:])


def test_induction_batch_keeps_its_promises(tiny_tokenizer):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = tiny_tokenizer.backend_tokenizer.__class__.from_str(
        tiny_tokenizer.backend_tokenizer.to_str()
    )
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    for source, prefix in ((tiny_tokenizer, 0), (tokenizer, 1), (500, 0)):
        probe = induction_batch(source, length=9, repeats=3, batch=4)
        tokens = probe.tokens
        assert (probe.prefix, tokens.shape) == (prefix, (4, prefix + 27))
        assert (tokens[:, :prefix] == 0).all()
        for t in range(*probe.second.indices(tokens.shape[1])):
            assert torch.equal(tokens[:, t], tokens[:, t - probe.length])
        for t in range(probe.second.start, tokens.shape[1] - 1):  # induction predicts the next
            assert torch.equal(tokens[:, t + 1], tokens[:, t - probe.length + 1])


def test_word_problems_have_the_answer_they_state():
    problems = arithmetic_problems(60, seed=4)
    assert len({problem.question for problem in problems}) == 60
    assert problems == arithmetic_problems(60, seed=4) != arithmetic_problems(60, seed=5)
    for problem in problems:
        for step in problem.steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert int(problem.steps[-1].split(" = ")[1]) == problem.answer
        assert 1 <= problem.answer <= 999
        used = {int(number) for number in re.findall(r"\d+", problem.question)}
        made = {int(step.split(" = ")[1]) for step in problem.steps}
        for step in problem.steps:  # nothing appears in a step that was neither given nor computed
            assert {int(n) for n in re.findall(r"\d+", step.split(" = ")[0])} <= used | made


class TestNeedles:
    def test_needles_are_distinct_and_absent_from_the_haystack(self):
        assert len(NEEDLES) >= 10
        answers = [
            set(needle.answer.lower().split()) - {"a", "of", "the", "with"} for needle in NEEDLES
        ]
        for i, mine in enumerate(answers):
            assert all(not mine & other for other in answers[:i])
        hay = " ".join(texts._paragraphs())
        assert not any(needle.answer in hay or needle.statement in hay for needle in NEEDLES)

    def test_the_span_is_the_answer(self, tiny_tokenizer):
        prompts = needle_prompts(
            tiny_tokenizer, lengths=(400, 700), depths=(0, 0.5, 1), needles=NEEDLES, chat=False
        )
        assert len(prompts) == 2 * 3 * len(NEEDLES)
        for prompt in prompts:
            assert tiny_tokenizer.decode(prompt.answer_ids).strip(" .") == prompt.needle.answer
            text = tiny_tokenizer.decode(prompt.ids)
            assert text.count(f"{prompt.needle.statement} {prompt.needle.answer}.") == 1
            assert text.endswith(f"\n\nQuestion: {prompt.needle.question}\nAnswer:")
            before = tiny_tokenizer.decode(prompt.ids[: prompt.start])
            sentence = f" {prompt.needle.statement}"
            hay = before.rstrip().removesuffix(sentence)
            assert hay.endswith(".") or "." not in tiny_tokenizer.decode(
                prompt.ids[prompt.end + 2 : 350]
            )
        assert [len(prompt.ids) for prompt in prompts] == [400] * 36 + [700] * 36

    def test_depth_orders_the_places(self, tiny_tokenizer):
        prompts = needle_prompts(
            tiny_tokenizer, lengths=(3000,), depths=(0.2, 0.5, 0.8), needles=1, chat=False
        )
        for prompt in prompts:
            assert prompt.depth - 0.12 < prompt.start / 3000 <= prompt.depth + 0.02

    def test_chat_template_surrounds_the_text(self, tiny_tokenizer):
        import copy

        chatty = copy.deepcopy(tiny_tokenizer)
        chatty.chat_template = (
            "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
        (prompt,) = needle_prompts(chatty, lengths=(500,), depths=(0.5,), needles=1)
        text = chatty.decode(prompt.ids)
        assert text.startswith("[user] ") and text.endswith("[end][assistant]")
        assert prompt.needle.question in text and len(prompt.ids) == 500

    def test_permuted_answer_has_no_token_in_its_place(self, tiny_tokenizer):
        for prompt in needle_prompts(tiny_tokenizer, lengths=(400,), depths=(0.5,), needles=5):
            assert sorted(prompt.permuted.tolist()) == sorted(prompt.answer_ids.tolist())
            assert not torch.equal(prompt.permuted, prompt.answer_ids)

    def test_recall_counts_words(self, tiny_tokenizer):
        (prompt,) = needle_prompts(tiny_tokenizer, lengths=(400,), depths=(0.5,), needles=1)
        assert prompt.recall("It is PURPLE elephant, seven!") == 1
        assert prompt.recall("yellow curios") == 0
        assert rouge1_recall("a b b", "b a") == pytest.approx(2 / 3)
        assert rouge1_recall("", "b") == 0

    def test_what_cannot_be_built_is_refused(self, tiny_tokenizer):
        with pytest.raises(
            InputError, match=r"length must be at least \d+ for this needle, got 20"
        ):
            needle_prompts(tiny_tokenizer, lengths=(20,))
        with pytest.raises(InputError, match=r"depth must be in \[0, 1\], got 2"):
            needle_prompts(tiny_tokenizer, depths=(2,))
        with pytest.raises(InputError, match="needles must be"):
            needle_prompts(tiny_tokenizer, needles=99)

    @pytest.mark.model
    def test_smollm2_prompts_decode_to_the_answers(self, smollm2):
        for prompt in needle_prompts(smollm2.tokenizer, lengths=(300,), depths=(0.5,), needles=12):
            assert smollm2.tokenizer.decode(prompt.answer_ids) == f" {prompt.needle.answer}"
            assert len(prompt.ids) == 300
