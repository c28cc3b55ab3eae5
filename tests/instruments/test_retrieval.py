"""Retrieval scores: hand-built copies, dense maps, padding, runs that fail, and the real model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from regard._errors import InputError
from regard.attach import attach
from regard.instruments.decoding import answer_logprob, batches, greedy, prefill, stopper
from regard.instruments.retrieval import (
    RetrievalHeads,
    copies,
    distinct_share,
    event_share,
    retrieval_heads,
    rotated_share,
    soft_share,
)
from regard.texts import Needle, NeedlePrompt

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
}


class Letters:
    """A tokenizer of 40 letters; letter 39 is a line break."""

    eos_token_id, pad_token_id, chat_template = 38, 0, None

    def decode(self, ids, skip_special_tokens=True):
        return " ".join("\n" if i == 39 else chr(65 + i) for i in ids)


def llama(scale: float = 6.0, vocabulary: int = 40):
    """Random weights with sharp attention, so that argmaxes differ between heads and steps."""
    config = LlamaConfig(**(SMALL | {"vocab_size": vocabulary}), eos_token_id=38)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= scale
    return model


def prompt(length: int, start: int, end: int, seed: int = 0, kinds: int = 38) -> NeedlePrompt:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, kinds, (length,), generator=generator)
    answer = Letters().decode(ids[start:end].tolist())
    return NeedlePrompt(ids, start, end, Needle("It is", answer, "What is it?"), 0.5)


def test_hand_built_copies():
    answer, start = torch.tensor([7, 8, 7]), 10
    generated = torch.tensor([7, 8, 7, 3])
    peaks = torch.tensor([
        # copies all | right place, wrong token | same place twice | outside | the 7 it did not mean
        [10, 11, 10, 2, 12],
        [11, 12, 99, 7, 12],
        [12, 11, 10, 8, 12],
        [10, 10, 10, 3, 12],
    ])  # fmt: skip
    events = copies(peaks, generated, answer, start)
    assert events.int().tolist() == [
        [1, 0, 1, 0, 1],
        [1, 0, 0, 0, 0],
        [1, 0, 1, 0, 1],
        [0, 0, 0, 0, 0],
    ]
    places = peaks - start
    assert distinct_share(events, places, 3).tolist() == pytest.approx([1, 0, 1 / 3, 0, 1 / 3])
    assert event_share(events, places, 3).tolist() == pytest.approx([1, 0, 2 / 3, 0, 2 / 3])


def test_rotated_needle_is_the_mean_over_rotations():
    answer, generated = torch.tensor([5, 6, 7, 8]), torch.tensor([5, 6, 7, 8])
    aligned, shifted, still = range(20, 24), [23, 20, 21, 22], [20] * 4
    peaks = torch.tensor([list(aligned), shifted, still, [0] * 4]).T
    chance = rotated_share(peaks, generated, answer, 20)
    # The shifted head copies everything under one rotation of three; the still one hits once in each.
    assert chance.tolist() == pytest.approx([0, 1 / 3, 1 / 4, 0])
    assert rotated_share(peaks[:1], generated[:1], answer[:1], 20).tolist() == [0, 0, 0, 0]


def test_soft_share_counts_only_steps_that_write_the_answer():
    weights = torch.tensor([[[0.2, 0.3, 0.1]], [[0.5, 0.1, 0.0]], [[0.9, 0.05, 0.05]]])
    answer = torch.tensor([4, 5, 4])
    got = soft_share(weights, torch.tensor([4, 5, 9]), answer)
    assert got.tolist() == pytest.approx([(0.3 + 0.1) / 2])
    assert soft_share(weights, torch.tensor([9, 9, 9]), answer).tolist() == [0]


def slow_scores(model, item: NeedlePrompt, answer: list[int], ended: bool):
    """Scores of one prompt from dense maps of the whole text, `[layers, heads]`."""
    steps = [*answer, -1] if ended else answer
    text = torch.cat([item.ids, torch.tensor(answer, dtype=torch.long)])[None]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = model(input_ids=text, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    hard, events = torch.zeros(2, len(maps), maps[0].shape[1]).unbind()
    soft = torch.zeros_like(hard)
    size = item.end - item.start
    writing = [k for k, y in enumerate(steps) if y in item.answer_ids.tolist()]
    for layer, dense in enumerate(maps):
        for head in range(dense.shape[1]):
            copied = set()
            for k, y in enumerate(steps):
                row = dense[0, head, len(item.ids) - 1 + k]
                peak = int(row.argmax())
                if item.start <= peak < item.end and int(item.ids[peak]) == y:
                    copied.add(peak)
                    events[layer, head] += 1 / size
                if k in writing:
                    same = [j for j in range(item.start, item.end) if int(item.ids[j]) == y]
                    soft[layer, head] += row[same].sum() / len(writing)
            hard[layer, head] = len(copied) / size
    return hard, events, soft


def observe(model, items, most=12, end=38, **settings):
    prefix = prefill(model, [p.ids for p in items])
    instrument = RetrievalHeads(**settings)
    instrument.begin(items, prefix.padding)
    with attach(model, instrument):
        answers = greedy(model, prefix, lambda y: y == end, most=most, step=instrument.step)
    return instrument, answers


@pytest.mark.parametrize("count", ["set", "events"])
def test_equals_the_definition_on_dense_maps_of_a_padded_batch(count):
    # Few kinds of tokens, so that a random model copies by accident; 5 ends an answer.
    model = llama(vocabulary=6)
    items = [prompt(n, 3, n - 4, seed, kinds=6) for seed, n in enumerate((26, 19, 26))]
    instrument, answers = observe(model, items, end=5, count=count)
    instrument.finish([True, True, False])
    found = instrument.runs()
    slow = [
        slow_scores(model, p, a, ended=len(a) < 12)
        for p, a in zip(items[:2], answers[:2], strict=True)
    ]
    kind = 0 if count == "set" else 1
    expected = torch.stack([s[kind] for s in slow])
    got = torch.stack([found["", layer] for layer in range(3)], dim=1)
    torch.testing.assert_close(got, expected)
    assert (expected > 0).any(), "nothing was copied: the test would pass on zeros"
    soft = instrument.compute()["retrieval_soft"].matrix()
    torch.testing.assert_close(soft, torch.stack([s[2] for s in slow]).mean(0), atol=1e-5, rtol=0)
    active = instrument.compute()["retrieval_activation"].matrix()
    torch.testing.assert_close(active, (expected > 0).float().mean(0))


def test_a_sliding_cache_names_the_same_keys():
    config = MistralConfig(**SMALL, sliding_window=8)
    model = MistralForCausalLM(config).eval()
    item = prompt(20, 14, 18)
    instrument, answers = observe(model, [item])
    instrument.finish([True])
    hard, _, soft = slow_scores(model, item, answers[0], ended=len(answers[0]) < 12)
    found = instrument.compute()
    torch.testing.assert_close(found["retrieval"].matrix(), hard)
    torch.testing.assert_close(found["retrieval_soft"].matrix(), soft, atol=1e-5, rtol=0)


def test_nothing_is_read_during_the_prefill():
    model, item, seen = llama(), prompt(20, 5, 9), []

    class Spy(RetrievalHeads):
        def weights(self, block):
            seen.append((block.call.queries, block.call.keys))
            super().weights(block)

    prefix = prefill(model, [item.ids])
    spy = Spy()
    spy.begin([item])
    with attach(model, spy):
        greedy(model, prefix, lambda y: False, most=2, step=spy.step)
    assert seen == [(1, 20)] * 3 + [(1, 21)] * 3


def test_greedy_equals_generate_and_can_be_repeated():
    model = llama()
    items = [prompt(15, 3, 6, 1), prompt(11, 3, 6, 2)]
    prefix = prefill(model, [p.ids for p in items])
    answers = greedy(model, prefix, lambda y: y == 38, most=9)
    for item, answer in zip(items, answers, strict=True):
        text = model.generate(
            item.ids[None],
            attention_mask=torch.ones_like(item.ids[None]),
            max_new_tokens=9,
            do_sample=False,
            pad_token_id=0,
        )
        expected = [y for y in text[0, len(item.ids) :].tolist() if y != 38]
        assert answer == expected
    prefix.rewind()
    assert greedy(model, prefix, lambda y: y == 38, most=9) == answers


def test_answer_logprob_equals_one_forward_pass():
    model = llama()
    items, answers = [prompt(15, 3, 6, 1), prompt(11, 3, 6, 2)], [[3, 4, 5], [9]]
    prefix = prefill(model, [p.ids for p in items])
    got = answer_logprob(model, prefix, [torch.tensor(a) for a in answers])
    for item, answer, value in zip(items, answers, got.tolist(), strict=True):
        text = torch.cat([item.ids, torch.tensor(answer)])[None]
        with torch.no_grad():
            logits = model(input_ids=text).logits[0, len(item.ids) - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(answer)[:, None]).mean()
        assert value == pytest.approx(float(expected), abs=1e-5)
    prefix.rewind()
    tail = answer_logprob(model, prefix, [torch.tensor(a) for a in answers], given=[2, 0])
    assert tail[1] == pytest.approx(float(got[1]), abs=1e-6)
    text = torch.cat([items[0].ids, torch.tensor(answers[0])])[None]
    with torch.no_grad():
        last = model(input_ids=text).logits[0, -2].log_softmax(-1)[answers[0][2]]
    assert float(tail[0]) == pytest.approx(float(last), abs=1e-5)


def test_merging_keeps_every_run():
    model = llama()
    first, _ = observe(model, [prompt(18, 3, 12, 1)])
    second, _ = observe(model, [prompt(21, 3, 12, 2)])
    first.finish([True])
    second.finish([True])
    table = torch.stack([first.runs()["", 1][0], second.runs()["", 1][0]])
    torch.testing.assert_close(first.merge(second).runs()["", 1], table)


def test_no_answered_run_gives_no_score():
    report = retrieval_heads(llama(), Letters(), prompts=[prompt(20, 5, 9)], most=1)
    assert not report.answered
    assert report.scores.matrix().isnan().all()
    assert report.heads() == []
    assert report.sentence() == "No head can be scored: 0 of 1 needle questions answered."
    with pytest.raises(InputError, match="no needle question was answered"):
        report.plot()


def test_batches_go_by_length():
    assert list(batches([30, 10, 20, 10], 2)) == [[1, 3], [2, 0]]


def test_stops_at_line_breaks_and_ends():
    stops = stopper(llama(), Letters())
    assert [stops(y) for y in (38, 39, 5)] == [True, True, False]


def test_bad_arguments():
    with pytest.raises(InputError, match="count must be 'set' or 'events', got 'bag'"):
        RetrievalHeads("bag")
    with pytest.raises(InputError, match="causal language model, got Linear"):
        retrieval_heads(torch.nn.Linear(2, 2))


@pytest.mark.model
def test_smollm2_has_few_strong_retrieval_heads():
    import regard

    report = retrieval_heads(regard.load("smollm2"), depths=(0.5,), needles=3, lengths=(200,))
    assert report.answered == 3
    assert 0.01 < report.share() < 0.15
    assert report.scores["L18H6"] > 0.5  # also one of its strongest induction heads
    assert "3 of 3 needle questions answered" in report.sentence()
    assert report.to_frame().shape == (270, 7)
    assert report.runs_frame()["answered"].all()
    assert len(report.plot().axes) == 3
