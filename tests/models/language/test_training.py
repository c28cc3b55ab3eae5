from __future__ import annotations

import math

import torch

from regard.models.language import MaskedDiffusionConfig, MaskedDiffusionLM, char_tasks
from regard.models.language.char_tasks import Samples
from regard.models.language.training import diffusion_loss, fit, hide, noise_levels


def test_prompts_are_never_hidden_and_answers_are_at_their_level():
    tokens = torch.zeros(4000, 20, dtype=torch.long)
    prompts = torch.full((4000,), 8)
    levels = torch.linspace(0.05, 0.95, 4000)
    noisy, hidden = hide(tokens, prompts, levels, 62, torch.Generator().manual_seed(0))
    assert not bool(hidden[:, :8].any()) and bool((noisy[hidden] == 62).all())
    assert bool((noisy[~hidden] == 0).all())
    share = hidden[:, 8:].double().mean(1)
    slope = float(((levels - 0.5) * (share - 0.5)).sum() / ((levels - 0.5) ** 2).sum())
    assert abs(slope - 1) < 0.03 and abs(float(share.mean()) - 0.5) < 0.01


def test_noise_levels_are_uniform_and_spread():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([noise_levels(10, generator) for _ in range(2000)])
    assert drawn.min() >= 1e-3 and drawn.max() <= 1
    first = drawn[:, 0].sort().values  # one sample's level is uniform
    assert float((first - torch.linspace(0, 1, 2000)).abs().max()) < 0.05
    gaps = drawn.sort(1).values.diff(dim=1)
    torch.testing.assert_close(gaps, torch.full_like(gaps, 0.0999), atol=1e-5, rtol=0)


def test_the_loss_is_the_formula_and_uniform_guesses_cost_log_vocabulary():
    torch.manual_seed(0)
    tokens, prompts = torch.randint(0, 60, (3, 12)), torch.tensor([2, 4, 6])
    levels = torch.tensor([0.2, 0.5, 0.9])
    logits, hidden = torch.randn(3, 12, 64), torch.rand(3, 12) < 0.5
    expected = 0.0
    for b in range(3):
        for i in range(12):
            if hidden[b, i]:
                nats = -float(torch.log_softmax(logits[b, i].double(), 0)[tokens[b, i]])
                expected += nats / float(levels[b]) / (12 - int(prompts[b])) / 3
    found = float(diffusion_loss(logits, tokens, hidden, prompts, levels))
    assert abs(found - expected) < 1e-4
    full = torch.arange(12)[None] >= prompts[:, None]
    uniform = diffusion_loss(torch.zeros(3, 12, 64), tokens, full, prompts, torch.ones(3))
    assert abs(float(uniform) - math.log(64)) < 1e-5


def test_training_learns_a_constant_answer():
    torch.manual_seed(0)
    model = MaskedDiffusionLM(MaskedDiffusionConfig(layers=1, width=16, heads=2, hidden=24))

    def draw(count: int, seed: int) -> Samples:
        tokens = torch.randint(0, 10, (count, 8), generator=torch.Generator().manual_seed(seed))
        tokens[:, 4:] = 7
        return Samples(tokens, torch.full((count,), 4))

    losses = fit(model, draw, steps=60, batch=8, learning_rate=0.02, warmup=5)
    assert len(losses) == 60 and losses[0] > 3 and sum(losses[-5:]) / 5 < 0.5
    assert not model.training


def test_tasks_have_the_answers_they_say():
    samples = char_tasks.task_samples(20, seed=5)
    for row, count in zip(samples.tokens, samples.prompts.tolist(), strict=True):
        prompt, given = char_tasks.decode(row[:count]), char_tasks.decode(row[count:])
        backwards, ordered, sums = given.split("|")
        assert len(set(prompt)) == count and backwards == "".join(reversed(prompt))
        assert list(ordered) == sorted(prompt)
        digits = [int(c) if c.isdigit() else 0 for c in prompt]
        assert [int(c) for c in sums] == [sum(digits[: i + 1]) % 10 for i in range(count)]


def test_prose_windows_hold_out_their_last_tenth():
    train = char_tasks.text_samples(200, seed=1)
    held = char_tasks.text_samples(50, seed=1, held_out=True)
    assert not bool((train.tokens == char_tasks.EOS).any())
    prose = char_tasks._prose()
    edge = len(prose) * 9 // 10
    for row in held.tokens[:10]:
        assert char_tasks.decode(row) in prose[edge:]
    for row in train.tokens[:10]:
        assert char_tasks.decode(row) in prose[:edge]
    mixed = char_tasks.mixed_samples(10, seed=0)
    assert mixed.tokens.shape == (10, char_tasks.LENGTH)
