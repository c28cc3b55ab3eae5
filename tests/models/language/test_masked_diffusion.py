from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import regard
from regard._errors import InputError, ModelError
from regard.instruments import Entropy
from regard.models.language import MaskedDiffusionConfig, MaskedDiffusionLM, char_tasks
from regard.models.language.masked_diffusion import SHIPPED, answers
from regard.nn.rotary import rotate

SMALL = MaskedDiffusionConfig(layers=2, width=32, heads=4, hidden=48)


@torch.no_grad()
def test_a_block_is_the_textbook_transformer_in_float64():
    torch.manual_seed(1)
    model = MaskedDiffusionLM(SMALL).double()
    block, hidden = model.blocks[0], torch.randn(2, 7, 32, dtype=torch.float64)
    positions = torch.arange(7).expand(2, 7)

    def normed(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    inner = normed(hidden, block.attention_norm.weight) @ block.attention.qkv_proj.weight.T
    q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in inner.split(32, dim=-1))
    turn = torch.exp(1j * torch.arange(7)[:, None] * 10_000.0 ** (-torch.arange(4) / 4)[None])

    def turned(x):
        z = torch.complex(x[..., :4], x[..., 4:]) * turn.to(torch.complex128)
        return torch.cat([z.real, z.imag], -1)

    weights = (turned(q) @ turned(k).transpose(-1, -2) / 8**0.5).softmax(-1)
    mixed = (weights @ v).transpose(1, 2).flatten(2)
    stream = hidden + mixed @ block.attention.o_proj.weight.T
    seen = normed(stream, block.mlp_norm.weight)
    gate, up = (seen @ part.weight.T for part in (block.mlp.gate_proj, block.mlp.up_proj))
    expected = stream + (gate * gate.sigmoid() * up) @ block.mlp.down_proj.weight.T
    torch.testing.assert_close(block(hidden, positions), expected, atol=1e-6, rtol=1e-6)


def test_rotation_depends_on_distance_only():
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(a, b):
        return (rotate(q, torch.tensor([a])) * rotate(k, torch.tensor([[b]]))).sum()

    torch.testing.assert_close(score(3, 5), score(10, 12), atol=1e-5, rtol=1e-5)
    assert abs(float(score(3, 5) - score(3, 9))) > 1e-3


@torch.no_grad()
def test_every_token_sees_every_other():
    model = MaskedDiffusionLM(SMALL)
    tokens = torch.randint(0, 60, (1, 9))
    other = tokens.clone()
    other[0, 8] = (other[0, 8] + 1) % 60
    assert bool(((model(tokens) - model(other)).abs().amax(-1) > 1e-6).all())


def test_save_and_load(tmp_path):
    model = MaskedDiffusionLM(SMALL)
    tokens = torch.randint(0, 60, (2, 9))
    model.save(tmp_path)
    assert torch.equal(MaskedDiffusionLM.from_pretrained(tmp_path)(tokens), model(tokens))
    model.save(tmp_path, dtype=torch.float16)
    half = MaskedDiffusionLM.from_pretrained(tmp_path)
    assert half.head.weight.dtype == torch.float32
    torch.testing.assert_close(half(tokens), model(tokens), atol=1e-3, rtol=1e-2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        MaskedDiffusionLM.from_pretrained(tmp_path)
    MaskedDiffusionLM(SMALL).save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"layers": 3}))
    with pytest.raises(ModelError, match="do not fit"):
        MaskedDiffusionLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"colour": 3}))
    with pytest.raises(ModelError, match="does not hold"):
        MaskedDiffusionLM.from_pretrained(tmp_path)
    MaskedDiffusionLM(SMALL).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="does not hold"):
        MaskedDiffusionLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="width"):
        MaskedDiffusionConfig(width=30)
    with pytest.raises(InputError, match="mask_token_id"):
        MaskedDiffusionConfig(vocabulary=40)
    with pytest.raises(InputError, match="prompt must be"):
        MaskedDiffusionLM(SMALL).generate([""])
    with pytest.raises(InputError, match="text must be made of"):
        MaskedDiffusionLM(SMALL).generate(["~"])


def test_the_vocabulary_of_model_and_tasks_agree():
    config = MaskedDiffusionConfig()
    assert (config.eos_token_id, config.mask_token_id) == (char_tasks.EOS, char_tasks.MASK)
    assert config.vocabulary == char_tasks.VOCABULARY > char_tasks.MASK


def test_instruments_attach_and_the_attention_is_not_causal():
    model, entropy = MaskedDiffusionLM(SMALL), Entropy()
    with torch.no_grad(), regard.attach(model, entropy) as session:
        model(torch.randint(0, 60, (1, 9)))
    assert [site.causal for site in session.sites.values()] == [False, False]
    assert entropy.measures()["entropy"].matrix().shape == (2, 4)


def test_shipped_weights_are_small_and_answer():
    file = SHIPPED / "model.safetensors"
    assert file.stat().st_size < 4 * 2**20
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    model = MaskedDiffusionLM.from_pretrained()
    prompts = char_tasks.task_prompts(16, seed=99)
    generation = model.generate(prompts)
    given = answers(generation, prompts)
    backwards = [text.split("|")[0] == p[::-1] for text, p in zip(given, prompts, strict=True)]
    assert sum(backwards) >= 8
    scores = model.evaluate(prompts)
    parts = [char_tasks.right_parts(a, p) for a, p in zip(given, prompts, strict=True)]
    assert scores["parts"] == sum(parts) / 16 and scores["rows"] == 1
