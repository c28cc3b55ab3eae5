from __future__ import annotations

import itertools

import pytest
import torch

from cache.diffusion import reference
from regard._errors import InputError
from regard.cache.diffusion import (
    BlockCache,
    Blocks,
    ElasticCache,
    FixedIntervalCache,
    NoCache,
    generate,
)


class Always(ElasticCache):
    """Elastic-Cache with r = -1 in every step."""

    def restart(self, canvas):
        return torch.ones_like(canvas.step, dtype=torch.bool)


def finished(tokens, masked, eos):
    ends = ((tokens == eos) & masked).nonzero()[:, 0]
    if len(ends):
        tokens = tokens.clone()
        tokens[int(ends[0]) :][masked[int(ends[0]) :]] = eos
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 5, 16])
@pytest.mark.parametrize("threshold", [0.2, 0.9])
@pytest.mark.parametrize("policy", [NoCache, Always])
def test_full_refresh_equals_the_cache_free_decoder_step_by_step(
    model, canvas, window, threshold, policy
):
    seen: dict[int, list] = {0: [], 1: [], 2: []}

    def after(view, logits, places, cost):
        for row, sequence in enumerate(view.sequences.tolist()):
            real = int(view.open[row].sum().clamp(max=window))
            seen[sequence].append((logits[row, :real], places[row, :real].tolist()))

    found = generate(model, canvas, policy(window=window), threshold=threshold, after_step=after)
    for sequence, tokens in enumerate(canvas):
        steps = reference.decode(
            model, tokens, model.mask_token_id, model.eos_token_id, window, threshold
        )
        assert int(found.steps[sequence]) == len(steps)
        for (logits, places), (expected, active, _) in zip(seen[sequence], steps, strict=True):
            assert places == active
            torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=0)
        last = finished(steps[-1][2], tokens == model.mask_token_id, model.eos_token_id)
        assert torch.equal(found.tokens[sequence], last)
    assert found.rows_fraction == 1 and found.update_fraction == 1


@torch.no_grad()
def test_with_a_window_over_every_mask_all_logits_agree(model, canvas):
    logits = {}

    def after(view, found, places, cost):
        if int(view.step[0]) == 0:
            logits["mine"], logits["places"] = found, places

    generate(model, canvas, Always(window=64), after_step=after)
    expected = model(canvas).gather(1, logits["places"][..., None].expand(-1, -1, 64))
    torch.testing.assert_close(logits["mine"], expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("gamma", [0.0, 0.8, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("track", [1, 3])
def test_elastic_equals_the_plain_loop_for_each_sequence_of_a_batch(model, canvas, gamma, track):
    restored: dict[int, list] = {0: [], 1: [], 2: []}
    sigmas: dict[int, list] = {0: [], 1: [], 2: []}

    def after(view, logits, places, cost):
        for row, sequence in enumerate(view.sequences.tolist()):
            restored[sequence].append(int(cost.restored[row]))
            sigma = cost.similarity[row]
            sigmas[sequence] += sigma[~sigma.isnan()].tolist()

    cache = ElasticCache(gamma=gamma, window=6, track=track)
    found = generate(model, canvas, cache, threshold=0.3, after_step=after)
    for sequence, tokens in enumerate(canvas):
        expected, rs, sigma = reference.elastic(model, tokens, 6, gamma, 0.3, track)
        masked = tokens == model.mask_token_id
        assert restored[sequence] == rs
        assert torch.equal(found.tokens[sequence], finished(expected, masked, model.eos_token_id))
        flat = [value for step in sigma for value in step]
        torch.testing.assert_close(
            torch.tensor(sigmas[sequence]), torch.tensor(flat), atol=1e-5, rtol=0
        )


def test_gamma_decides_how_many_layers_are_refreshed(model, canvas):
    costs = [
        generate(model, canvas, ElasticCache(gamma=gamma, window=6), threshold=0.3)
        for gamma in (0.0, 1.0)
    ]
    first, last = costs
    steps = first.steps
    assert torch.equal(first.updates, torch.full_like(steps, 3))  # the first step only
    assert torch.equal(last.updates, 3 + 2 * (last.steps - 1))  # layer 0 always reuses
    assert first.rows_fraction < last.rows_fraction < 1


@pytest.mark.parametrize("cache", [FixedIntervalCache(interval=1), NoCache()])
def test_interval_one_is_no_cache(model, canvas, cache):
    plain = generate(model, canvas)
    assert torch.equal(generate(model, canvas, cache).tokens, plain.tokens)


def test_the_interval_sets_which_steps_are_full(model, canvas):
    full = []

    def after(view, logits, places, cost):
        full.append((int(view.step[0]), set(cost.restored.tolist())))

    generate(model, canvas, FixedIntervalCache(interval=3), threshold=2.0, after_step=after)
    assert all(r == ({-1} if step % 3 == 0 else {3}) for step, r in full)


def test_blocks_are_filled_in_order_and_refreshed_at_their_borders(model, canvas):
    restored: dict[int, list] = {0: [], 1: [], 2: []}

    def after(view, logits, places, cost):
        for row, sequence in enumerate(view.sequences.tolist()):
            restored[sequence].append(int(cost.restored[row]))

    cache = BlockCache(window=Blocks(8))
    found = generate(model, canvas, cache, threshold=0.3, after_step=after)
    for sequence, start in enumerate([6, 10, 6]):
        at = found.decided_at[sequence, start:]
        at = at[at >= 0]
        blocks = at.split(8)
        for before, after_ in itertools.pairwise(blocks):
            assert before.max() < after_.min()
        borders = [int(block.min()) for block in blocks]
        assert [i for i, r in enumerate(restored[sequence]) if r == -1] == borders


def test_reuse_inside_a_block_projects_only_the_block(model, canvas):
    one = canvas[:1]
    found = generate(model, one, BlockCache(window=Blocks(8)), threshold=2.0)
    steps, full = int(found.steps), int(found.updates) // 3
    last = 28 - 6 - 8 * 2  # positions of the last block
    assert steps == 22 or model.eos_token_id in found.tokens[0].tolist()
    if steps == 22:
        assert full == 3
        assert int(found.projected) == 3 * (3 * 28 + 2 * 7 * 8 + (last - 1) * last)


def test_a_batch_decodes_as_its_sequences_alone(model, canvas):
    for cache in (ElasticCache(gamma=0.95, window=6), FixedIntervalCache(interval=3), BlockCache()):
        together = generate(model, canvas, cache, threshold=0.3)
        for i in range(3):
            alone = generate(model, canvas[i : i + 1], cache, threshold=0.3)
            assert torch.equal(alone.tokens[0], together.tokens[i])
            assert alone.projected[0] == together.projected[i]
            assert alone.steps[0] == together.steps[i]


def test_nothing_is_decoded_behind_an_end_of_sequence(model, canvas):
    class Ends:
        """Says end of sequence twice in the third step, and one letter elsewhere, always surely."""

        mask_token_id, eos_token_id, shift = 62, 61, 0

        def __init__(self, inner):
            self.inner, self.blocks = inner, inner.blocks

        def embed(self, tokens):
            return self.inner.embed(tokens)

        def logits(self, hidden):
            logits = torch.zeros(*hidden.shape[:2], 64)
            logits[..., 11] = 9.0
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == 3:
                logits[:, 1, 11], logits[:, 1, 61] = 0.0, 9.0
                logits[:, 2, 61] = 14.0
            return logits

    found = generate(Ends(model), canvas[:1], NoCache(window=4), threshold=0.9)
    masked = canvas[0] == 62
    end = int((found.tokens[0] == 61).nonzero()[0, 0])
    assert end == 6 + 4 + 4 + 1
    assert bool((found.tokens[0, end:] == 61).all())
    assert bool((found.tokens[0][masked][: end - 6] == 11).all())
    assert int(found.steps[0]) == 3
    assert bool((found.decided_at[0, end + 1 :] == -1).all())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: ElasticCache(gamma=1.5), "gamma must be in \\[0, 1\\], got 1.5"),
        (lambda: ElasticCache(track=0), "track must be"),
        (lambda: ElasticCache(window=0), "window must be"),
        (lambda: FixedIntervalCache(interval=0), "interval must be"),
        (lambda: BlockCache(window=Blocks(0)), "block must be"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_bad_canvases_and_block_causal_models_are_refused(model, canvas):
    with pytest.raises(InputError, match="at least one mask"):
        generate(model, torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(InputError, match="threshold"):
        generate(model, canvas, threshold=0.0)
    model.block_causal = 32
    with pytest.raises(InputError, match="block by block"):
        generate(model, canvas)
