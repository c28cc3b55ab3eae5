"""The recipe step by step: what is trained, under which attention, and what is left behind."""

from __future__ import annotations

import pytest
import torch

import regard
from fixtures_models import tiny_llama
from regard._errors import InputError
from regard.labs.context_extension import Recipe, extend_context, fine_tune, recovery, token_losses
from regard.sparse.shifted import SFAttention

ROWS = torch.randint(320, (6, 64), generator=torch.Generator().manual_seed(1))
RECIPE = Recipe(steps=2, rate=1e-2, warmup=2, batch=3, r=2)


def test_the_first_loss_is_the_loss_under_the_pattern():
    model, pattern = tiny_llama(), SFAttention()
    extended = extend_context(model, ROWS, pattern, Recipe(steps=1, batch=6, r=2), factor=1)
    plain = tiny_llama()
    with torch.no_grad():
        full = float(plain(input_ids=ROWS, labels=ROWS).loss)
        with regard.attach(plain, pattern):
            grouped = float(plain(input_ids=ROWS, labels=ROWS).loss)
    assert extended.losses == [pytest.approx(grouped, abs=1e-5)]
    assert abs(full - grouped) > 1e-4


def test_training_lowers_the_loss_and_full_attention_comes_back():
    model = tiny_llama()
    before = float(token_losses(model, ROWS).mean())
    recipe = Recipe(steps=30, rate=1e-2, warmup=2, batch=3, r=4)
    extended = extend_context(model, ROWS, SFAttention(), recipe)
    assert float(token_losses(extended.model, ROWS).mean()) < before - 0.5
    merged = extended.model.merge_and_unload()
    assert merged.config._attn_implementation == tiny_llama().config._attn_implementation
    assert not merged.training


def test_the_rate_grows_to_its_value_and_stays():
    rates: list[float] = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.before = 0.0

        def forward(self, input_ids, labels):
            # the first Adam step of a constant gradient moves the weight by the rate
            rates.append(float(self.before - self.weight.detach()))
            self.before = float(self.weight.detach())
            return type("Output", (), {"loss": self.weight.sum()})

    fine_tune(Spy(), ROWS, None, Recipe(steps=7, rate=0.1, warmup=4, batch=1))
    expected = torch.tensor([0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    torch.testing.assert_close(torch.tensor(rates), expected, atol=1e-5, rtol=0)


def test_every_row_comes_once_before_any_comes_again():
    seen: list[int] = []

    class Spy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, labels):
            seen.extend(input_ids[:, 0].tolist())
            return type("Output", (), {"loss": self.weight.sum()})

    fine_tune(Spy(), torch.arange(6)[:, None], None, Recipe(steps=4, batch=3))
    assert sorted(seen[:6]) == sorted(seen[6:]) == [0, 1, 2, 3, 4, 5]
    assert seen[:6] != seen[6:]


def test_positions_are_interpolated_by_the_least_whole_factor():
    rows = torch.randint(320, (3, 300))
    model = tiny_llama()  # knows 256 positions
    extended = extend_context(model, rows, None, RECIPE)
    assert extended.interpolation is not None and extended.interpolation.factor == 2
    extended.interpolation.undo()
    assert model.config.max_position_embeddings == 256
    assert extend_context(tiny_llama(), ROWS, None, RECIPE).interpolation is None


def test_the_same_seed_gives_the_same_training():
    one, two, other = (
        extend_context(tiny_llama(), ROWS, SFAttention(), RECIPE, seed=s).losses for s in (0, 0, 1)
    )
    assert one == two != other


def test_a_failure_leaves_the_positions_as_they_were():
    model = tiny_llama()
    with pytest.raises(InputError, match="at least a batch of 3, got 2"):
        extend_context(model, torch.randint(320, (2, 300)), None, RECIPE)
    assert model.config.max_position_embeddings == 256


def test_token_losses_are_cross_entropies_of_the_next_tokens():
    model = tiny_llama()
    found = token_losses(model, ROWS, batch=4)
    with torch.no_grad():
        chance = model(ROWS).logits.double().log_softmax(-1)[:, :-1]
    expected = -chance.gather(2, ROWS[:, 1:, None])[..., 0]
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_recovery_needs_a_gain():
    assert recovery(10.0, 7.0, 6.0) == 0.75
    with pytest.raises(InputError, match="needs a gain from full attention"):
        recovery(6.0, 5.0, 6.0)
