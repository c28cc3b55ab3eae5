"""Chunked token selection: the choice against plain loops, the attention against dense float64 with the same keys."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import regard
from regard._errors import AttachError, InputError
from regard.engine import AttentionCall, Block, Method, Pipeline, attend
from regard.ops.chunks import chunk_mean
from regard.sparse.hierarchical import (
    FixedChunks,
    HierarchicalSparse,
    block_scores,
    select_tokens,
)


class Given(HierarchicalSparse):
    """Cuts that the test names."""

    def __init__(self, ends: list[int], **rest: Any) -> None:
        super().__init__(**rest)
        self.ends = ends

    def cuts(self, call: AttentionCall) -> torch.Tensor:
        return torch.tensor(self.ends)


class Read(Method):
    """Reads weights and changes nothing, so that the blockwise backend runs; keeps the maps."""

    reads_only = True

    def before(self, call: AttentionCall) -> None:
        self.map = torch.zeros(call.query.shape[0], call.heads, call.queries, call.keys)

    def weights(self, block: Block) -> None:
        self.map[:, :, block.rows, block.keys] = block.weights


def make(batch: int, length: int, heads: int = 4, kv: int = 2, dim: int = 8, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads), (batch, kv), (batch, kv))
    return [torch.randn(*shape, length, dim, generator=generator) for shape in shapes]


def visible(chosen: list[list[int]], block: int, length: int) -> torch.Tensor:
    """What the lists of each query block show; queries after the last block see all."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    for i, named in enumerate(chosen):
        rows = slice(i * block, min((i + 1) * block, length))
        hidden = torch.ones(length, dtype=torch.bool)
        hidden[named] = False
        seen[rows, hidden] = False
    return seen


def dense(query: Any, key: Any, value: Any, seen: torch.Tensor) -> torch.Tensor:
    """`[heads, length, dim]` in float64, one head at a time."""
    group, out = query.shape[0] // key.shape[0], []
    for head, q in enumerate(query.double()):
        k, v = key[head // group].double(), value[head // group].double()
        scores = (q @ k.T / math.sqrt(q.shape[-1])).masked_fill(~seen, -torch.inf)
        out.append(scores.softmax(-1) @ v)
    return torch.stack(out)


def choose(
    query: Any,
    key: Any,
    ends: list[int],
    budget: int,
    block: int,
    local: int,
    first: int,
    last: int,
) -> list[list[int]]:
    """The definition written out for one text, with sets and sorts."""
    q, k = query.double().mean(0), key.double().mean(0)
    chosen = []
    for start in range(0, last, block):
        stop = min(start + block, last)
        of_block = q[start:stop].mean(0) * math.sqrt(stop - start)
        score = {}
        for a, b in itertools.pairwise(ends):
            vector = k[a:b].mean(0) * math.sqrt(b - a)
            score |= {j: (of_block @ vector).item() for j in range(a, b)}
        allowed = list(range(stop))
        if len(allowed) <= budget:
            chosen.append(allowed)
            continue
        recent = allowed[-local:]
        others = sorted(allowed[:-local], key=lambda j: (-score[j], j))
        listed = sorted(others[: budget - local] + recent)
        chosen.append(sorted({*range(first), *listed[first:]}))
    return chosen


SMALL: dict[str, Any] = {"block": 8, "local": 4, "first": 3, "instruction": 5}
ENDS = [0, 2, 3, 9, 10, 17, 21, 30, 31, 38, 45, 50]


@pytest.mark.parametrize("backend", ["fused", "blockwise"])
@pytest.mark.parametrize("ends", [ENDS, list(range(51)), [*range(0, 50, 7), 50]])
def test_equals_dense_attention_to_the_chosen_keys(backend, ends):
    query, key, value = make(1, 50)
    method = Given(ends, budget=12, **SMALL)
    call = AttentionCall.make(query, key, value)
    others = [Read()] if backend == "blockwise" else []
    found = attend(call, Pipeline([method, *others]))
    chosen = choose(query[0], key[0], ends, 12, 8, 4, 3, 45)
    seen = torch.ones(50, 50, dtype=torch.bool).tril()
    everything = dense(query[0], key[0], value[0], seen)
    assert not torch.allclose(found[0].double(), everything, atol=1e-3)  # the budget bites
    seen[:45] = torch.nn.functional.pad(visible(chosen, 8, 45), (0, 5))
    expected = dense(query[0], key[0], value[0], seen)
    torch.testing.assert_close(found[0].double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["fused", "blockwise"])
def test_a_budget_of_everything_is_dense_attention(backend):
    query, key, value = make(2, 50)
    others = [Read()] if backend == "blockwise" else []
    for budget in (50, 1.0):
        method = Given(ENDS, budget=budget, **SMALL)
        found = attend(AttentionCall.make(query, key, value), Pipeline([method, *others]))
        plain = attend(AttentionCall.make(query, key, value), Pipeline([]))
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)


def test_every_token_a_chunk_is_top_k_of_the_mean_query_and_key():
    query, key, _ = make(1, 40)
    scores = block_scores(query[0], key[0], torch.arange(41), 8)
    plain = torch.stack([q.mean(0) for q in query[0].mean(0).split(8)]) @ key[0].mean(0).T
    torch.testing.assert_close(scores, plain * math.sqrt(8))
    picked = select_tokens(scores[4], 0, 40, budget=12, local=4, first=1)
    best = plain[4, :36].topk(8).indices.sort().values
    assert picked.tolist() == [0, *best[1:].tolist(), 36, 37, 38, 39]


def test_equal_chunks_are_block_sparse_attention():
    """With budgets of whole blocks: the top blocks of mean query . mean key, the own block and the first."""
    query, key, value = make(1, 64)
    method = FixedChunks(8, budget=32, block=8, local=8, first=8, instruction=0)
    found = attend(AttentionCall.make(query, key, value), Pipeline([method]))
    q = torch.stack([part.mean(0) for part in query[0].mean(0).split(8)])
    k = torch.stack([part.mean(0) for part in key[0].mean(0).split(8)])
    chosen = []
    for i, row in enumerate(q @ k.T):
        blocks = list(range(i + 1))
        if len(blocks) > 4:
            best = sorted(row[:i].topk(3).indices.tolist())
            blocks = sorted({0, *best[1:], i})
        chosen.append([j for b in blocks for j in range(8 * b, 8 * b + 8)])
    expected = dense(query[0], key[0], value[0], visible(chosen, 8, 64))
    torch.testing.assert_close(found[0].double(), expected, atol=1e-5, rtol=0)


@given(
    st.lists(st.floats(-3, 3, width=16), min_size=1, max_size=60),
    st.integers(0, 8),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 20),
)
@settings(max_examples=200, deadline=None)
def test_selection_has_no_repeats_keeps_its_promises_and_takes_the_best(
    scores, lo, local, first, more
):
    lo = min(lo, len(scores) - 1)
    hi, budget = len(scores), local + first + more
    chosen = select_tokens(
        torch.tensor(scores), lo, hi, budget=budget, local=local, first=first
    ).tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(budget, hi - lo)
    assert {*range(max(lo, hi - local), hi)} <= {*chosen}
    assert {*range(lo, min(lo + first, hi))} <= {*chosen}
    if hi - lo > budget:
        inner = range(lo + first, hi - local)
        kept = [scores[j] for j in inner if j in chosen]
        ranked = sorted((scores[j] for j in range(lo, hi - local)), reverse=True)
        assert all(value >= ranked[budget - local - 1] for value in kept)


def test_padding_on_either_side_changes_nothing():
    torch.manual_seed(0)
    model = llama()
    ids = torch.randint(0, 64, (2, 60))
    lengths = (60, 47)
    rest: dict[str, Any] = {"budget": 0.3, **SMALL}
    alone = []
    with torch.no_grad():
        for row, length in enumerate(lengths):
            with regard.attach(model, FixedChunks(5, **rest)):
                alone.append(model(ids[row : row + 1, :length]).logits[0])
        for left in (True, False):
            batch, mask = torch.zeros(2, 60, dtype=torch.long), torch.zeros(2, 60).long()
            places = [slice(60 - n, 60) if left else slice(0, n) for n in lengths]
            for row, place in enumerate(places):
                batch[row, place], mask[row, place] = ids[row, : lengths[row]], 1
            with regard.attach(model, FixedChunks(5, **rest)):
                positions = (mask.cumsum(1) - 1).clamp_min(0)
                logits = model(batch, attention_mask=mask, position_ids=positions).logits
            for row, place in enumerate(places):
                torch.testing.assert_close(logits[row, place], alone[row], atol=1e-4, rtol=0)


def llama(**more: Any) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **more,
    )
    return LlamaForCausalLM(config).eval()


def test_instruments_see_the_sparse_weights():
    model, read = llama(), Read()
    ids = torch.randint(0, 64, (1, 60))
    with torch.no_grad(), regard.attach(model, FixedChunks(5, budget=15, **SMALL), read):
        with_reader = model(ids).logits
    with torch.no_grad(), regard.attach(model, FixedChunks(5, budget=15, **SMALL)):
        fused = model(ids).logits
    torch.testing.assert_close(with_reader, fused, atol=1e-4, rtol=0)
    seen = (read.map[0] > 0).any(0).sum(-1)
    assert int(seen[:55].max()) <= 15 and int(seen[55:].min()) == 56


def test_only_the_prompt_is_sparse():
    model = llama()
    ids = torch.randint(0, 64, (1, 60))
    kinds = []

    class Look(Method):
        def before(self, call: AttentionCall) -> None:
            kinds.append((call.queries, type(call.mask).__name__))

    settings: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with regard.attach(model, FixedChunks(5, budget=15, **SMALL), Look()):
        model.generate(ids, **settings)  # pyright: ignore
    prompt = {mask for queries, mask in kinds if queries == 60}
    steps = {mask for queries, mask in kinds if queries == 1}
    assert prompt == {"SplitMask"} and "SplitMask" not in steps and steps


def test_the_first_layer_cuts_for_all():
    class Counting(FixedChunks):
        shared = True
        made = 0

        def cuts(self, call: AttentionCall) -> torch.Tensor:
            self.made += 1
            return super().cuts(call)

    class Each(Counting):
        shared = False

    model, ids = llama(), torch.randint(0, 64, (2, 40))
    for kind, expected in ((Counting, 2), (Each, 6)):
        method = kind(5, budget=15, **SMALL)
        with torch.no_grad(), regard.attach(model, method):
            model(ids)
            model(ids)
        assert method.made == 2 * expected


def test_layers_left_out_stay_dense():
    model, ids = llama(), torch.randint(0, 64, (1, 60))
    with torch.no_grad():
        plain = model(ids).logits
        with regard.attach(model, FixedChunks(5, budget=15, layers=[], **SMALL)):
            torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=0)
        with regard.attach(model, FixedChunks(5, budget=15, layers=[1], **SMALL)):
            assert not torch.allclose(model(ids).logits, plain, atol=1e-3)


def test_a_sliding_window_is_kept():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=20,
        initializer_range=0.3,
    )
    model = MistralForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 60))
    rest: dict[str, Any] = {"block": 8, "local": 8, "first": 2, "instruction": 5}
    read = Read()
    with torch.no_grad():
        plain = model(ids).logits
        with regard.attach(model, FixedChunks(5, budget=60, **rest)):
            torch.testing.assert_close(model(ids).logits, plain, atol=1e-4, rtol=0)
        with regard.attach(model, FixedChunks(5, budget=12, **rest), read):
            model(ids)
        assert int((read.map > 0).sum(-1)[:, :, :55].max()) <= 12
        assert float(read.map.sum(-1).min()) == pytest.approx(1, abs=1e-5)  # every query sees a key
        distance = torch.arange(60)[:, None] - torch.arange(60)
        assert float(read.map[..., distance >= 20].max()) == 0
        mask = torch.ones_like(ids)
        mask[0, :9] = 0
        with (
            pytest.raises(AttachError, match="sliding window"),
            regard.attach(model, FixedChunks(5, budget=12, **rest)),
        ):
            model(ids, attention_mask=mask)
        with (
            pytest.raises(AttachError, match="local must be at least block = 8, got 4"),
            regard.attach(model, FixedChunks(5, budget=15, **SMALL)),
        ):
            model(ids)


def test_gradients_flow_through_the_chosen_keys():
    query, key, value = make(1, 50)
    for tensor in (query, key, value):
        tensor.requires_grad_()
    found = attend(
        AttentionCall.make(query, key, value), Pipeline([Given(ENDS, budget=12, **SMALL)])
    )
    seen = torch.ones(50, 50, dtype=torch.bool).tril()
    chosen = choose(query[0], key[0], ENDS, 12, 8, 4, 3, 45)
    seen[:45] = torch.nn.functional.pad(visible(chosen, 8, 45), (0, 5))
    weight = torch.randn_like(found)
    grads = torch.autograd.grad((found * weight).sum(), [query, key, value])
    expected = dense(query[0], key[0], value[0], seen)
    reference = torch.autograd.grad((expected * weight[0].double()).sum(), [query, key, value])
    for a, b in zip(grads, reference, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_short_texts_are_dense_and_instruction_only_texts_too():
    for length in (2, 5, 11):
        query, key, value = make(1, length)
        call = AttentionCall.make(query, key, value)
        found = attend(call, Pipeline([FixedChunks(3, budget=7, **{**SMALL, "instruction": 9})]))
        plain = attend(AttentionCall.make(query, key, value), Pipeline([]))
        if length <= 9:
            torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)


def test_the_mean_without_the_root_orders_chunks_by_another_rule():
    class Mean(Given):
        def represent(self, vectors: torch.Tensor, cuts: torch.Tensor) -> torch.Tensor:
            return chunk_mean(vectors, cuts)

    key = torch.zeros(1, 1, 40, 2)
    key[0, 0, 4:6, 0], key[0, 0, 6:22, 0] = 2.0, 1.0  # a short strong chunk, a long weak one
    query = torch.ones(1, 1, 40, 2)
    rest: dict[str, Any] = {"budget": 6, "block": 8, "local": 2, "first": 1, "instruction": 0}
    ends = [0, 4, 6, 22, 40]
    picked = []
    for kind in (Given, Mean):
        scores = block_scores(query[0], key[0], torch.tensor(ends), 8, kind(ends, **rest).represent)
        picked.append(select_tokens(scores[4], 0, 40, budget=6, local=2, first=1).tolist())
    assert picked == [[0, 7, 8, 9, 38, 39], [0, 5, 6, 7, 38, 39]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 1.5}, r"budget must be in \(0, 1\] or an int >= 1, got 1.5"),
        ({"budget": 0}, "budget must be"),
        ({"budget": True, "local": 1, "first": 1}, "budget must be"),
        ({"budget": 100}, r"at least local \+ first = 256 keys, got 100"),
        ({"local": 0}, "local and first must be at least 1, got 0 and 128"),
        ({"instruction": -1}, "instruction must be at least 0, got -1"),
        ({"block": 0}, "block must be"),
    ],
)
def test_refuses_what_makes_no_sense(given, message):
    with pytest.raises(InputError, match=message):
        FixedChunks(8, **given)


def test_refuses_attention_in_both_directions():
    query, key, value = make(1, 20)
    call = AttentionCall.make(query, key, value, causal=False)
    call.site = regard.engine.Site(0, causal=False)
    with pytest.raises(AttachError, match="both directions"):
        attend(call, Pipeline([FixedChunks(5, budget=9, **SMALL)]))
