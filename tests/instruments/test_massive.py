"""Dose-response: the capping itself is exact, and a planted massive activation answers as it must."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard import texts
from regard._errors import InputError
from regard.engine import State
from regard.instruments.massive import CapMassive, dose_response, natural_sizes
from regard.instruments.stream import Massive, ResidualPeaks

PLACE = ({2: {3: 1000.0, 5: 400.0}}, {2: 200.0})


def state(hidden, part="block", layer=1, stack=""):
    return State(part, layer, stack, hidden)


def test_only_massive_entries_at_their_sites_are_clamped():
    hidden = torch.randn(1, 4, 8)
    hidden[0, 0, 3], hidden[0, 2, 3], hidden[0, 0, 5], hidden[0, 1, 6] = (
        1200.0,
        -900.0,
        150.0,
        5000.0,
    )
    expected = hidden.clone()
    expected[0, 0, 3], expected[0, 2, 3] = (
        500.0,
        -500.0,
    )  # 150 is below the threshold, dimension 6 is not massive
    cap = CapMassive(*PLACE, 0.5)
    kept = hidden.clone()
    assert torch.equal(cap.residual(state(hidden)), expected)
    assert torch.equal(hidden, kept)  # the model's own tensor is not written to
    for other in (state(hidden, layer=0), state(hidden, "mlp"), state(hidden, stack="vision")):
        assert cap.residual(other) is None
    assert cap.residual(state(torch.randn(1, 4, 8))) is None


def test_the_control_sets_other_dimensions_of_the_same_tokens_to_zero():
    hidden = torch.randn(1, 4, 8)
    hidden[0, 2, 3] = 1200.0
    expected = hidden.clone()
    expected[0, 2, [1, 7]] = 0
    assert torch.equal(CapMassive(*PLACE, 0.0, instead=[1, 7]).residual(state(hidden)), expected)


def test_natural_sizes_are_means_over_massive_entries():
    hidden = torch.randn(2, 6, 8)
    hidden[:, 0, 3] = torch.tensor([4000.0, -6000.0])
    peaks = ResidualPeaks()
    peaks.residual(state(hidden, "embed", 0))
    peaks.residual(state(torch.randn(2, 6, 8)))
    natural, thresholds = natural_sizes(peaks.compute()[""])
    assert natural == {0: {3: 5000.0}}
    assert abs(thresholds[0] - 1000 * float(hidden.abs().flatten(1).median(1).values.mean())) < 1
    assert peaks.compute()[""].massive[0] == Massive(0, 0, 0, 3, 4000.0)


def massive_model():
    """A tiny Llama whose first token (id 0) carries 5000 in dimension 3 from the embedding on."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.model.embed_tokens.weight.data[0, 3] = 5000.0
    return model


def windows(n=8, tokens=16):
    ids = torch.randint(1, 64, (n, tokens))
    ids[:, 0] = 0
    return ids


def test_a_full_dose_changes_nothing_and_none_changes_most():
    model, ids = massive_model(), windows()
    response = dose_response(model, ids, fractions=(1.0, 0.1, 0.0), controls=4)
    assert set(response.natural) == {0, 1, 2} and set(response.natural[0]) == {3}
    assert response.sequences == 6 and response.tokens == 6 * 15
    assert abs(response[1.0].nll.mean) < 1e-5 and response[1.0].nll.low <= response[1.0].nll.high
    assert abs(response[0.0].entropy.mean) > 10 * abs(response[1.0].entropy.mean)
    assert response[0.0].nll.mean != 0 and len(response.controls) == 4
    assert all(3 not in dimensions for dimensions in response.drawn)


def test_the_loss_is_that_of_the_model_with_the_entry_overwritten():
    """The zero dose at the embedding, done by hand on the embedding table."""
    model, ids = massive_model(), windows()
    response = dose_response(model, ids[2:], probe=ids[:2], fractions=(0.0,), controls=0)

    def loss():
        with torch.no_grad():
            logits = model(input_ids=ids[2:]).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[2:, 1:].flatten()))

    before = loss()
    assert abs(response.nll - before) < 1e-4
    model.model.embed_tokens.weight.data[0, 3] = 0.0
    assert abs(response[0.0].nll.mean - (loss() - before)) < 1e-4


def test_it_is_reproducible_and_leaves_the_model_alone():
    model, ids = massive_model(), windows(5)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    first, second = (dose_response(model, ids, fractions=(0.0,), controls=2) for _ in range(2))
    assert first == second
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)
    assert first.to_frame().shape == (1, 10)
    assert first.plot().get_ylabel() == "loss change, nats / token"


def test_a_capped_model_composes_with_other_methods():
    model, ids = massive_model(), windows(1)
    peaks = ResidualPeaks()
    with (
        torch.no_grad(),
        regard.attach(model, CapMassive({0: {3: 5000.0}}, {0: 100.0}, 0.0), peaks),
    ):
        model(input_ids=ids)
    assert not peaks.compute()[""].massive


def test_errors_say_what_to_do():
    torch.manual_seed(0)
    model = massive_model()
    with pytest.raises(InputError, match=r"no activation is massive .* lower ratio or floor"):
        dose_response(model, torch.randint(1, 64, (4, 12)))
    with pytest.raises(InputError, match="at least two held-out windows"):
        dose_response(model, windows(2))
    with pytest.raises(InputError, match="fraction must be from 0 to 1, got 2"):
        CapMassive({}, {}, 2)


@pytest.mark.model
def test_smollm2_breaks_without_its_massive_activation_and_not_without_others():
    model = regard.load("smollm2")
    ids = model.tokenizer(texts.prose(2000), return_tensors="pt").input_ids[0, : 4 * 48].view(4, 48)
    response = dose_response(model, ids, fractions=(1.0, 0.0), controls=3)
    assert {d for table in response.natural.values() for d in table} >= {507}
    assert abs(response[1.0].nll.mean) < 0.05 and response[0.0].nll.low > 1
    assert response[0.0].sink.high < 0 < response[0.0].entropy.low
    assert max(abs(effect) for effect in response.controls) < 0.2
