"""Names in other tools translate there and back, and what has no translation is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fixtures_models import tiny_llama
from regard.addresses import (
    from_interp_engine,
    from_nnsight,
    from_transformer_lens,
    to_interp_engine,
    to_nnsight,
    to_transformer_lens,
)
from regard.coordinates import Dimension, Head, Neuron

MODULES = {
    Head: "model.layers.{layer}.self_attn.o_proj",
    Neuron: "model.layers.{layer}.mlp.down_proj",
    Dimension: "model.layers.{layer}",
}
places = st.builds(
    lambda kind, layer, index: kind(layer, index),
    st.sampled_from([Head, Neuron, Dimension]),
    st.integers(0, 99),
    st.integers(0, 999),
)


@given(places)
def test_there_and_back(place):
    assert from_transformer_lens(*to_transformer_lens(place)) == place
    assert from_nnsight(to_nnsight(place, MODULES[type(place)], 64), 64) == place
    assert from_interp_engine(*to_interp_engine(place), place.unit) == place


def test_transformer_lens_names():
    assert to_transformer_lens(Head(5, 3)) == ("blocks.5.attn.hook_z", 3)
    assert to_transformer_lens(Neuron(4, 17)) == ("blocks.4.mlp.hook_post", 17)
    assert to_transformer_lens(Dimension(5, 42)) == ("blocks.5.hook_resid_post", 42)
    assert from_transformer_lens("blocks.5.attn.hook_pattern", 3) == Head(5, 3)
    assert from_transformer_lens("blocks.5.hook_resid_pre", 42) == Dimension(4, 42)


def test_an_nnsight_expression_reads_the_same_numbers_as_a_hook():
    """The expression, evaluated on stand-ins with `.input` and `.output`, selects head 3."""
    model = tiny_llama()
    seen = {}
    names = {Head(1, 3): "self_attn.o_proj", Neuron(1, 5): "mlp.down_proj", Dimension(1, 7): ""}
    for place, name in names.items():
        module = model.get_submodule(f"model.layers.1.{name}".rstrip("."))
        hook = lambda _, args, output, place=place: seen.update({place: (args[0], output)})  # noqa: E731
        module.register_forward_hook(hook)
    with torch.no_grad():
        model(torch.arange(2, 12)[None])
    for place, name in names.items():
        given, output = seen[place]
        inner = type("Module", (), {"input": given, "output": output})
        expression = to_nnsight(place, MODULES[type(place)], head_dim=16)
        tail = expression.removeprefix("model.layers[1]" + (f".{name}" if name else ""))
        read = eval(f"module{tail}", {"module": inner})
        if isinstance(place, Head):
            assert torch.equal(read, given.unflatten(-1, (4, 16))[..., 3, :])
        else:
            tensor = given if isinstance(place, Neuron) else output
            assert torch.equal(read, tensor[..., place.index])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_transformer_lens("blocks.3.attn.hook_k", 0), "has no coordinate here"),
        (lambda: from_transformer_lens("hook_embed", 0), "has no coordinate here"),
        (lambda: from_transformer_lens("blocks.0.hook_resid_pre", 0), "is the embedding"),
        (lambda: to_transformer_lens(Head(0, 0, "encoder")), "models with one stack"),
        (lambda: to_nnsight(Head(0, 0), "model.layers.{layer}.self_attn.o_proj"), "head_dim must"),
        (lambda: from_nnsight("m.layers[0].attn.o_proj.input[..., 3:67]", 64), "one head"),
        (lambda: from_nnsight("m.layers[0].attn.o_proj.input[..., 0:128]", 64), "one head"),
        (lambda: from_nnsight("m.layers[0].attn.output[..., 3]"), "neither one head"),
        (lambda: from_nnsight("m.lm_head.output"), "has no coordinate"),
        (lambda: from_interp_engine("value", 0, 0), "point must be"),
    ],
)
def test_what_has_no_translation_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_other_spellings_of_nnsight():
    assert from_nnsight("model.layers[5].self_attn.o_proj.input[:, :, 192:256]", 64) == Head(5, 3)
    assert from_nnsight("transformer.h[5].output[0][..., 42]") == Dimension(5, 42)
    assert from_nnsight("transformer.h[4].mlp.c_proj.input[:, :, 17]") == Neuron(4, 17)
    path = to_nnsight(Head(5, 3), "transformer.h.5.attn.c_proj", head_dim=64)
    assert path == "transformer.h[5].attn.c_proj.input[..., 192:256]"
