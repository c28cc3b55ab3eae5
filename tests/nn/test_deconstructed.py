"""The six replacements of attention, and the model that gives three of them their queries and keys."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch

from regard._errors import InputError
from regard.nn import LanguageModel, LanguageModelConfig, make_mixer
from regard.nn.deconstructed import FixedQKAttention, GivenQKAttention
from regard.nn.deconstructed_model import (
    PLACEMENTS,
    DeconstructedLanguageModel,
    replaced,
    without_layers,
)

KINDS = ("no_mixing", "taylor", "self_gated", "random_qk", "fixed_text_qk", "static_qk")
TEXT = [(7 * i) % 50 for i in range(64)]


def build(mixers: list[str], layers: int = 3, **more: object) -> DeconstructedLanguageModel:
    torch.manual_seed(0)
    config = LanguageModelConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=layers,
        mixers=mixers,
        max_position_embeddings=64,
        fixed_text=TEXT,
        **more,  # type: ignore[arg-type]
    )
    model = DeconstructedLanguageModel(config).eval()
    torch.nn.init.normal_(model.embed_tokens.weight)
    return model


def ids(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_all_have_the_parameters_of_attention(kind: str) -> None:
    count = sum(p.numel() for p in make_mixer(kind, 96, 4).parameters())
    assert abs(count - 4 * 96**2) <= 0.01 * 4 * 96**2


@pytest.mark.parametrize("kind", ["random_qk", "fixed_text_qk", "static_qk"])
def test_a_mixer_without_its_model_says_so(kind: str) -> None:
    with pytest.raises(InputError, match="DeconstructedLanguageModel"):
        make_mixer(kind, 32, 4)(torch.randn(1, 3, 32))
    model = LanguageModel(LanguageModelConfig(hidden_size=32, num_hidden_layers=1, mixers=[kind]))
    with pytest.raises(InputError, match="DeconstructedLanguageModel"):
        model(ids(1, 4))


def seen_sources(model: DeconstructedLanguageModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What the mixers made their queries and keys of in one call."""
    found: list[torch.Tensor] = []

    def note(mixer: GivenQKAttention, *_: object) -> None:
        found.append(mixer.given())

    handles = [mixer.register_forward_pre_hook(note) for mixer in model.mixers]
    model(tokens)
    for handle in handles:
        handle.remove()
    return found[-len(model.layers) :]


def as_softmax(model: DeconstructedLanguageModel) -> LanguageModel:
    """The same weights with ordinary attention in every layer."""
    config = copy.deepcopy(model.config)
    config.mixers = ["softmax"]
    plain = LanguageModel(config).eval()
    plain.load_state_dict(
        {n: t for n, t in model.state_dict().items() if n not in ("noise", "text")}
    )
    return plain


def normed_inputs(model: LanguageModel, hidden: torch.Tensor) -> list[torch.Tensor]:
    states = []
    for block in model.layers:
        states.append(block.input_layernorm(hidden))
        hidden = block(hidden, None, None)
    return states


@pytest.mark.parametrize("kind", ["random_qk", "fixed_text_qk"])
def test_the_second_stream_is_the_model_with_ordinary_attention(kind: str) -> None:
    model = build([kind])
    start = model.noise if kind == "random_qk" else model.embed_tokens(model.text)
    expected = normed_inputs(as_softmax(model), start[None, :20])
    for found, states in zip(seen_sources(model, ids(2, 20)), expected, strict=True):
        torch.testing.assert_close(found[:20], states[0])


def test_static_keys_are_embeddings_in_every_layer() -> None:
    model, tokens = build(["static_qk"]), ids(2, 9)
    for found in seen_sources(model, tokens):
        assert torch.equal(found, model.embed_tokens(tokens))


@pytest.mark.parametrize("kind", ["random_qk", "fixed_text_qk"])
def test_weights_of_fixed_maps_do_not_depend_on_the_input(kind: str) -> None:
    model = build([kind])
    one, other = seen_sources(model, ids(1, 12)), seen_sources(model, ids(1, 12, seed=9))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_fixed_text_fed_to_itself_is_ordinary_attention() -> None:
    model = build(["fixed_text_qk"])
    text = torch.tensor(TEXT)[None, :20]
    torch.testing.assert_close(model(text).logits, as_softmax(model)(text).logits)


def test_a_kept_stream_is_renewed_when_a_parameter_changes() -> None:
    model, tokens = build(["random_qk"]), ids(1, 10)
    before = model(tokens).logits
    assert torch.equal(model(tokens).logits, before)
    with torch.no_grad():
        model.mixers[0].q_proj.weight.mul_(-3)  # type: ignore[union-attr]
    fresh = build(["random_qk"])
    fresh.load_state_dict(model.state_dict())
    changed = model(tokens).logits
    torch.testing.assert_close(changed, fresh(tokens).logits)
    assert not torch.allclose(changed, before)
    assert all(mixer.source is None for mixer in model.mixers)  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", ["random_qk", "fixed_text_qk"])
def test_training_and_evaluation_agree_and_the_stream_is_trained(kind: str) -> None:
    model, tokens = build([kind]), ids(2, 10)
    kept = model(tokens, labels=tokens)
    model.train()
    trained = model(tokens, labels=tokens)
    torch.testing.assert_close(trained.logits, kept.logits)
    trained.loss.backward()
    # the values of layer 0 reach the second layer's queries through the stream alone when their own path is cut
    model.zero_grad()
    through = model(tokens, labels=tokens).loss
    for mixer in model.mixers:
        assert isinstance(mixer, FixedQKAttention)
    (with_stream,) = torch.autograd.grad(through, [model.mixers[0].v_proj.weight])  # type: ignore[union-attr]
    model.eval()
    (without,) = torch.autograd.grad(
        model(tokens, labels=tokens).loss,
        [model.mixers[0].v_proj.weight],  # type: ignore[union-attr]
    )
    assert not torch.allclose(with_stream, without)


def test_hybrid_generates_with_a_memory_as_without() -> None:
    model = build(["random_qk", "softmax", "static_qk"])
    prompt = ids(2, 9)
    found = model.generate(prompt, max_new_tokens=8, do_sample=False)
    plain = prompt
    for _ in range(8):
        plain = torch.cat([plain, model(plain).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, plain)


def test_saves_its_noise_and_its_text(tmp_path: Path) -> None:
    model = build(["random_qk", "fixed_text_qk"])
    model.save_pretrained(tmp_path)
    again = DeconstructedLanguageModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again.noise, model.noise) and torch.equal(again.text, model.text)
    assert torch.equal(again(ids(1, 8)).logits, model(ids(1, 8)).logits)


def test_too_long_for_the_stream() -> None:
    with pytest.raises(InputError, match="at most 64"):
        build(["random_qk"])(ids(1, 65))
    config = LanguageModelConfig(hidden_size=32, num_hidden_layers=1, mixers=["fixed_text_qk"])
    with pytest.raises(InputError, match="fixed_text"):
        DeconstructedLanguageModel(config)


def test_the_source_must_fit() -> None:
    mixer = make_mixer("static_qk", 32, 4)
    mixer.source = torch.randn(1, 4, 32)  # type: ignore[assignment]
    with pytest.raises(InputError, match="source"):
        mixer(torch.randn(1, 5, 32))
    fixed = make_mixer("random_qk", 32, 4)
    fixed.source = torch.randn(4, 32)  # type: ignore[assignment]
    with pytest.raises(InputError, match="below 4"):
        fixed(torch.randn(1, 5, 32))


def test_uniform_no_mixing_sees_one_token() -> None:
    model = build(["no_mixing"])
    whole = model(ids(1, 12)).logits
    torch.testing.assert_close(model(ids(1, 12)[:, 5:]).logits, whole[:, 5:])


def test_self_gated_knows_no_order() -> None:
    model = build(["self_gated"], layers=1)
    tokens = ids(1, 12)
    swapped = tokens.clone()
    swapped[:, :11] = tokens[:, :11].flip(1)
    torch.testing.assert_close(model(swapped).logits[:, -1], model(tokens).logits[:, -1])


@pytest.mark.parametrize(
    ("placement", "kept"),
    [
        ("uniform", []),
        ("even", list(range(2, 25, 2))),
        ("odd", list(range(1, 25, 2))),
        ("quarter", list(range(4, 25, 4))),
        ("top", list(range(1, 13))),
        ("middle", [*range(1, 7), *range(19, 25)]),
        ("bottom", list(range(13, 25))),
        ("first", [1]),
        ("last", [24]),
        ("bilateral", [1, 24]),
    ],
)
def test_placements_of_the_source(placement: str, kept: list[int]) -> None:
    mixers = replaced("taylor", 24, placement)
    assert [i for i, name in enumerate(mixers, 1) if name == "softmax"] == kept
    assert set(PLACEMENTS) >= {placement}


def test_unknown_placement() -> None:
    with pytest.raises(InputError, match="bilateral"):
        replaced("taylor", 4, "sideways")


def test_skipping_leaves_the_other_layers() -> None:
    model = build(replaced("taylor", 4), layers=4)
    short = without_layers(model, [0, 2])
    hidden = model.embed_tokens(ids(1, 9))
    for i in (1, 3):
        hidden = model.layers[i](hidden, None, None)
    torch.testing.assert_close(short(ids(1, 9)).logits, model.lm_head(model.norm(hidden)))
    assert len(model.layers) == 4
    generated = short.generate(ids(1, 5), max_new_tokens=3, do_sample=False)
    assert generated.shape == (1, 8)
    with pytest.raises(InputError, match="layers"):
        without_layers(model, range(4))


def test_loss_starts_at_a_guess() -> None:
    torch.manual_seed(0)
    for kind in KINDS:
        config = LanguageModelConfig(
            vocab_size=50, hidden_size=32, num_hidden_layers=2, mixers=[kind], fixed_text=TEXT
        )
        loss = DeconstructedLanguageModel(config).eval()(ids(2, 16), labels=ids(2, 16)).loss
        assert float(loss) == pytest.approx(math.log(50), abs=0.3), kind
