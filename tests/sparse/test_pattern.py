"""A pattern attached to a model: padding, decoding, the model's own masks, instruments, training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import regard
from regard._errors import AttachError
from regard.engine import AttentionCall, Both, CausalMask, Method, Pipeline, SplitMask, attend
from regard.engine.masks import TensorMask
from regard.engine.split import Part
from regard.instruments import Entropy
from regard.sparse import LongNet, Pattern, Power, Sliding, SlidingTokens, TopKBlocks


def llama(**more: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
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
    return LlamaForCausalLM(config).eval().double()


PATTERNS = [
    Power(window=1, sinks=1, block=4),
    SlidingTokens(window=6, sinks=2, block=4),
    LongNet(segments=(2, 8), dilations=(1, 2), block=4),
    TopKBlocks(count=2, window=1, block=4),
    Sliding(window=1, sinks=1, block=4, heads=[0, 3], layers=[0, 2]),
]
by_name = pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: type(p).__name__)


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(1))


def masked(model: LlamaForCausalLM, ids: Tensor, visible: dict[int, Tensor]) -> Tensor:
    """The logits with each layer's visible pairs `[heads, n, n]` forced by a method that changes scores."""

    class Hide(Method):
        def scores(self, block):  # type: ignore[no-untyped-def]
            seen = visible[block.site.layer][:, block.rows, block.keys]
            return block.scores.masked_fill(~seen, torch.finfo(block.scores.dtype).min)

    with torch.no_grad(), regard.attach(model, Hide()):
        return model(ids).logits


def pairs(pattern: Pattern, layer: int, heads: int, n: int) -> Tensor:
    seen = torch.ones(heads, n, n, dtype=torch.bool).tril()
    if not pattern.applies(layer):
        return seen
    for head in range(heads):
        if pattern.heads_of is not None and head not in pattern.heads_of:
            continue
        one = pattern.of_head(head, heads)
        probe = torch.zeros(1, dtype=torch.long)
        position = torch.arange(n)
        whole = one.visible(probe, probe) is None
        rule = None if whole else one.visible(position[:, None], position)
        lists = one.lists(n, n)
        named = torch.zeros(n, n, dtype=torch.bool)
        for row in range(n):
            for key in range(n):
                named[row, key] = key // one.block in lists[row // one.block]
        seen[head] &= named if rule is None else named & rule
    return seen


@by_name
def test_a_model_attends_only_to_named_keys(pattern: Pattern) -> None:
    if not pattern.static:
        pytest.skip("depends on the text; test_patterns.py has its definition")
    model, ids = llama(), tokens(2, 37)
    expected = masked(model, ids, {i: pairs(pattern, i, 4, 37) for i in range(3)})
    with torch.no_grad(), regard.attach(model, pattern):
        found = model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
    assert (found - model(ids).logits).abs().max() > 1e-3


@by_name
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(pattern: Pattern, side: str) -> None:
    model, long, short = llama(), tokens(37), tokens(23)
    gap = torch.zeros(14, dtype=torch.long)
    row = torch.cat([gap, short] if side == "left" else [short, gap])
    mask = torch.ones(2, 37, dtype=torch.long)
    mask[1] = (row > 0).long()
    position = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), regard.attach(model, pattern):
        alone = [model(x[None]).logits[0] for x in (long, short)]
        batch = model(torch.stack([long, row]), attention_mask=mask, position_ids=position).logits
        torch.testing.assert_close(batch[0], alone[0], atol=1e-10, rtol=0)
        torch.testing.assert_close(batch[1, mask[1].bool()], alone[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "pattern", [p for p in PATTERNS if p.static], ids=lambda p: type(p).__name__
)
def test_decoding_continues_the_prefill(pattern: Pattern) -> None:
    model, ids = llama(), tokens(1, 30)
    with torch.no_grad(), regard.attach(model, pattern):
        whole = model(ids).logits[0]
        cache, steps = None, []
        for part in (ids[:, :13], ids[:, 13:21], *ids[:, 21:].split(1, 1)):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits[0])
    torch.testing.assert_close(torch.cat(steps), whole, atol=1e-9, rtol=0)


def test_generation_of_a_padded_batch() -> None:
    model, pattern = llama(pad_token_id=0), Power(window=1, sinks=1, block=4)
    long, short = tokens(20), tokens(11)
    row = torch.cat([torch.zeros(9, dtype=torch.long), short])
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with regard.attach(model, pattern):
        alone = [model.generate(x[None], **settings)[0, len(x) :] for x in (long, short)]
        both = model.generate(
            torch.stack([long, row]),
            attention_mask=(torch.stack([long, row]) > 0).long(),
            **settings,
        )
    assert torch.equal(both[:, 20:], torch.stack(alone))


def test_a_models_own_window_still_hides() -> None:
    """Mistral's sliding layers: a key is seen when the model's window and the pattern both show it."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        sliding_window=9,
    )
    model, ids = MistralForCausalLM(config).eval().double(), tokens(2, 30)
    pattern = Sliding(window=2, sinks=1, block=4)
    expected = masked(model, ids, {i: pairs(pattern, i, 4, 30) for i in range(2)})
    with torch.no_grad(), regard.attach(model, pattern):
        found = model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_a_mask_of_the_callers_own_still_hides() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 20, 8, generator=generator).double() for _ in range(3))
    own = torch.rand(2, 1, 20, 20, generator=generator) > 0.4
    own |= torch.eye(20, dtype=torch.bool)
    bias = torch.randn(2, 1, 20, 20, generator=generator).double()
    pattern, causal = Sliding(window=2, sinks=0, block=4), torch.ones(20, 20).tril().bool()
    both = own & causal & pairs(pattern, 0, 2, 20)
    for tensor, added in ((own & causal, 0.0), (bias.masked_fill(~(own & causal), -1e30), bias)):
        lowest = torch.finfo(torch.float64).min
        mask = tensor if tensor.dtype == torch.bool else tensor.masked_fill(tensor < -1e29, lowest)
        output = attend(AttentionCall(q, k, v, TensorMask(mask, 20), 0.4), Pipeline([pattern]))
        scores = (q @ k.mT * 0.4 + added).masked_fill(~both, float("-inf"))
        torch.testing.assert_close(output, scores.softmax(-1) @ v, atol=1e-10, rtol=0)


@by_name
def test_instruments_see_the_sparse_rows(pattern: Pattern) -> None:
    """Entropy beside a pattern is that of the hidden-key maps; attaching it does not change the output."""
    model, ids = llama(), tokens(1, 37)
    entropy = Entropy()
    with torch.no_grad(), regard.attach(model, pattern):
        alone = model(ids).logits
    with torch.no_grad(), regard.attach(model, pattern, entropy):
        watched = model(ids).logits
    torch.testing.assert_close(watched, alone, atol=1e-9, rtol=0)
    free = Entropy()
    with torch.no_grad(), regard.attach(model, free):
        model(ids)
    name = next(iter(free.compute().keys()))
    assert (entropy.compute()[name].matrix()[0] < free.compute()[name].matrix()[0]).any()


def test_training_through_a_pattern() -> None:
    model, ids = llama(), tokens(2, 40)
    pattern = Power(window=1, sinks=1, block=4)
    seen = {i: pairs(pattern, i, 4, 40) for i in range(3)}

    class Hide(Method):
        def scores(self, block):  # type: ignore[no-untyped-def]
            shown = seen[block.site.layer][:, block.rows, block.keys]
            return block.scores.masked_fill(~shown, torch.finfo(block.scores.dtype).min)

    grads = []
    for method in (pattern, Hide()):
        model.zero_grad()
        with regard.attach(model, method):
            model(ids, labels=ids).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_both_directions_are_refused() -> None:
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = BertModel(config).eval()
    with (
        pytest.raises(AttachError, match="Power is a causal pattern, but L0 attends in both"),
        torch.no_grad(),
        regard.attach(model, Power(block=4)),
    ):
        model(tokens(1, 12))


def test_split_masks_show_their_parts_to_the_blockwise_backend() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 12, 8, generator=generator).double()
    k, v = (torch.randn(2, 2, 12, 8, generator=generator).double() for _ in range(2))
    parts = (
        Part(CausalMask(12), (0,), (0, 3), 0, 12, 0, 12),
        Part(Sliding(window=1, sinks=0, block=3).mask(12, 12), (0,), (1, 2), 0, 12, 0, 12),
        Part(CausalMask(7), (1,), None, 5, 12, 5, 12),
    )
    mask = SplitMask((2, 4, 12, 12), parts)
    seen = torch.zeros(2, 4, 12, 12, dtype=torch.bool)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()
    block = torch.arange(12) // 3
    seen[0, [0, 3]] = causal
    seen[0, [1, 2]] = causal & (block[:, None] == block)
    seen[1, :, 5:, 5:] = causal[5:, 5:]
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.4).masked_fill(~seen, float("-inf"))
    weights = torch.where(seen.any(-1, keepdim=True), scores.softmax(-1), 0)
    expected = weights @ v.repeat_interleave(2, 1)
    fused = attend(AttentionCall(q, k, v, mask, 0.4), Pipeline(()))
    torch.testing.assert_close(fused, expected, atol=1e-12, rtol=0)
    watched = attend(AttentionCall(q, k, v, mask, 0.4), Pipeline((Entropy(),)))
    torch.testing.assert_close(watched, expected, atol=1e-12, rtol=0)
    same = Both(CausalMask(12), mask, 12)
    torch.testing.assert_close(
        attend(AttentionCall(q, k, v, same, 0.4), Pipeline(())), expected, atol=1e-12, rtol=0
    )
