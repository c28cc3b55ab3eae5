"""Every scorer against its definition on dense float64 maps, with grouped heads and padding on either side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cache.reference import Dense, dense
from regard._errors import InputError
from regard.cache import Cache
from regard.cache.budgets import Uniform
from regard.cache.scorer import Scorer
from regard.cache.scorers import (
    CAKE,
    H2O,
    TOVA,
    ExpectedAttention,
    KeyNorm,
    RetrievalHeads,
    SnapKV,
    Streaming,
)

KV_HEADS, WINDOW = 2, 5


def grouped(per_head: Tensor) -> Tensor:
    return per_head.unflatten(0, (KV_HEADS, -1))


def pooled(scores: Tensor, kernel: int = 5) -> Tensor:
    out = torch.zeros_like(scores)
    for j in range(scores.shape[-1]):
        out[..., j] = scores[..., max(0, j - kernel // 2) : j + kernel // 2 + 1].sum(-1) / kernel
    return out


def h2o(text: Dense, layer: int) -> Tensor:
    return grouped(text.maps[layer].sum(1)).sum(1)


def h2o_mean(text: Dense, layer: int) -> Tensor:
    tokens = text.maps[layer].shape[-1]
    return h2o(text, layer) / torch.arange(tokens, 0, -1)


def observed(text: Dense, layer: int, gamma: float) -> Tensor:
    rows = text.maps[layer][:, -WINDOW:, :-WINDOW]
    return grouped(pooled(rows.mean(1) + gamma * rows.var(1))).mean(1)


def tova(text: Dense, layer: int) -> Tensor:
    return text.maps[layer][:, -1, :-1].mean(0).expand(KV_HEADS, -1)


def expected(text: Dense, layer: int, horizon: int = 32, skip: int = 4) -> Tensor:
    """By the definition: rotate mean and covariance to every future position's average."""
    queries, keys, values = text.queries[layer], text.keys[layer], text.values[layer]
    dim, tokens = keys.shape[-1], keys.shape[1]
    turns = torch.stack([rotation(dim, tokens + t) for t in range(horizon)]).mean(0)
    out = torch.zeros(KV_HEADS, tokens, dtype=torch.float64)
    for h, query in enumerate(queries):
        used = query[skip:]
        mean, spread = turns @ used.mean(0), turns @ torch.cov(used.T, correction=0) @ turns.T
        g = h // 2
        exponents = keys[g] @ mean + 0.5 * ((keys[g] @ spread) * keys[g]).sum(-1)
        out[g, skip:] += torch.softmax(exponents[skip:], 0) / 2
    return out * values.norm(dim=-1)


def rotation(dim: int, position: int, theta: float = 10000.0) -> Tensor:
    """Llama's rotation matrix at one position: dimension i turns with i + dim / 2."""
    half = dim // 2
    angles = position * theta ** (-torch.arange(half, dtype=torch.float64) * 2 / dim)
    cosine, sine = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)])


CASES: dict[str, tuple[Scorer, Callable[[Dense, int], Tensor]]] = {
    "h2o": (H2O(), h2o),
    "h2o mean": (H2O(normalise=True), h2o_mean),
    "snapkv": (SnapKV(window=WINDOW), lambda t, i: observed(t, i, 0.0)),
    "cake": (CAKE(window=WINDOW), lambda t, i: observed(t, i, 200.0)),
    "tova": (TOVA(), tova),
    "key norm": (KeyNorm(), lambda t, i: -t.keys[i].norm(dim=-1)),
    "expected": (ExpectedAttention(horizon=32), expected),
}


def watched(model: Any, scorer: Scorer, batch: tuple[Tensor, Tensor], chunk: int | None) -> Cache:
    """A cache that has seen the batch and dropped nothing but padding."""
    ids, mask = batch
    cache = Cache(model, scorer, Uniform(1.0), sinks=0)
    with cache.paused():
        cache.prefill(ids, mask, chunk=chunk)
    return cache


@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("name", CASES)
def test_equals_its_definition_whole_and_in_chunks(name, chunk, model, batch):
    scorer, reference = CASES[name]
    texts = dense(model, *batch)
    with watched(model, scorer, batch, chunk) as cache:
        for layer in cache.held:
            scores = scorer.score(layer)
            for b, text in enumerate(texts):
                wanted = reference(text, layer.index)
                tokens = text.maps[0].shape[-1]
                found = scores[b, :, scores.shape[-1] - tokens :][:, : wanted.shape[-1]]
                torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-4)


def test_streaming_prefers_the_newest(model, batch):
    with watched(model, Streaming(), batch, None) as cache:
        for layer in cache.held:
            scores = Streaming().score(layer)
            assert bool((scores.diff(dim=-1)[layer.valid[..., 1:]] > 0).all())


def test_dispersion_and_shift_belong_to_the_text_alone(model, batch):
    texts = dense(model, *batch)
    with watched(model, CAKE(window=WINDOW), batch, None) as cache:
        for layer in cache.held:
            for b, text in enumerate(texts):
                rows = text.maps[layer.index][:, -WINDOW:, :-WINDOW]
                spread = -(rows * torch.log(rows + 1e-10)).sum()
                found = layer.memory["dispersion"][b].double()
                torch.testing.assert_close(found, spread, atol=1e-4, rtol=1e-5)
                found = layer.memory["shift"][b].double()
                torch.testing.assert_close(found, rows.var(1).sum(), atol=1e-6, rtol=1e-4)


def test_h2o_goes_on_counting_while_decoding(model, batch):
    """Mass after a prompt and four single steps is that of the longer text."""
    ids, mask = batch
    if not bool(mask[:, -1].all()):
        pytest.skip("nobody decodes behind padding on the right")
    cache = Cache(model, H2O(), Uniform(1.0), every=1)
    with cache, cache.paused(), torch.no_grad():
        cache.prefill(ids[:, :-4], mask[:, :-4])
        for t in range(36, 40):
            cache.prefill(ids[:, t : t + 1], mask[:, : t + 1])
        for layer in cache.held:
            scores = H2O().score(layer)
            for b, text in enumerate(dense(model, ids, mask)):
                wanted = h2o(text, layer.index)
                found = scores[b, :, -wanted.shape[-1] :].double()
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_cake_scores_by_the_current_query_while_decoding(model):
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (1, 30))
    mask = torch.ones_like(ids)
    scorer = CAKE(window=WINDOW)
    with Cache(model, scorer, Uniform(1.0), every=1) as cache, cache.paused(), torch.no_grad():
        cache.prefill(ids[:, :-1])
        cache.prefill(ids[:, -1:])
        text = dense(model, ids, mask)[0]
        for layer in cache.held:
            row = text.maps[layer.index][:, -1, :-WINDOW]
            wanted = grouped(pooled(row)).mean(1)
            found = scorer.score(layer)[0, :, :-WINDOW].double()
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.model
def test_half_the_rows_rank_like_all(smollm2):
    from scipy.stats import spearmanr

    from regard.texts import default_text

    ids = smollm2.tokenizer(default_text(smollm2.tokenizer, 600), return_tensors="pt").input_ids
    ranks = []
    for sample in (1, 2):
        scorer = H2O(sample=sample)
        with Cache(smollm2, scorer, Uniform(1.0)) as cache, cache.paused():
            cache.prefill(ids)
            ranks.append(torch.stack([scorer.score(layer)[0] for layer in cache.held]).flatten())
    correlation: Any = spearmanr(*ranks)[0]
    assert correlation > 0.95


def test_retrieval_heads_rank_heads_before_tokens(model, batch):
    scores = tuple((0.0, 0.5, 0.1, 0.2) for _ in range(3))
    with watched(model, RetrievalHeads(scores=scores), batch, None) as cache:
        for layer in cache.held:
            found = RetrievalHeads(scores=scores).score(layer)
            assert bool((found[:, 0] > found[:, 1].max()).all())
    short = RetrievalHeads(scores=scores[:1])
    with Cache(model, short, 4) as cache, pytest.raises(InputError, match="retrieval scores"):
        cache.prefill(batch[0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: H2O(recent=1.0),
        lambda: H2O(sample=0),
        lambda: SnapKV(window=0),
        lambda: SnapKV(kernel=4),
        lambda: CAKE(gamma=-1.0),
        lambda: ExpectedAttention(horizon=0),
    ],
)
def test_refuses_what_makes_no_sense(make):
    with pytest.raises(InputError, match="must be"):
        make()
