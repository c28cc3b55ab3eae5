from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import regard
from regard._errors import InputError, ModelError
from regard.attach import anatomy
from regard.coordinates import Head
from regard.instruments._intervals import bootstrap, standard_error
from regard.instruments._losses import evaluation_inputs
from regard.instruments._replay import Replay
from regard.instruments._variants import variant_losses
from regard.instruments.importance import head_importance

VOCAB = 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(2)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).double().eval()


def gemma2() -> Gemma2ForCausalLM:
    """Caps its logits, so its losses cannot be made in the output layer."""
    torch.manual_seed(2)
    config = Gemma2Config(**SIZES, final_logit_softcapping=2.0, query_pre_attn_scalar=8)
    return Gemma2ForCausalLM(config).double().eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3, n_positions=64
    )
    return GPT2LMHeadModel(config).double().eval()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        initializer_factor=0.5,
    )
    return T5ForConditionalGeneration(config).double().eval()


def ids(rows: int = 2, tokens: int = 24) -> Tensor:
    return torch.randint(2, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(5))


def naive(
    model: nn.Module, inputs: dict[str, Tensor], heads: list[Head], mode: str, means: Any
) -> Tensor:
    """One whole forward pass for each head: `[heads, batch, tokens - 1]`."""
    found = []
    decoder = "decoder_" if "decoder_input_ids" in inputs else ""
    labels = inputs[f"{decoder}input_ids"]
    for head in heads:
        with torch.no_grad(), regard.ablate(model, [head], mode, means=means):
            logits = model(**inputs).logits
        losses = nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
        if (mask := inputs.get(f"{decoder}attention_mask")) is not None:
            losses = losses.masked_fill((mask[:, 1:] & mask[:, :-1]) == 0, float("nan"))
        found.append(losses)
    return torch.stack(found)


@pytest.mark.parametrize("mode", ["zero", "mean", "uniform", "sink"])
def test_equals_the_loop_over_heads(mode):
    model, tokens = llama(), ids()
    result = head_importance(model, tokens, mode=mode, means=tokens)
    heads = [Head(layer, head) for layer in range(3) for head in range(4)]
    expected = naive(model, {"input_ids": tokens}, heads, mode, tokens) - result.loss
    for head, change in zip(heads, expected, strict=True):
        assert result[head] == pytest.approx(float(change.mean()), abs=1e-5)
    assert max(abs(value) for _, value in result.change.items()) > 1e-3
    assert result.tokens == 46


@pytest.mark.parametrize(
    ("make", "partial", "streamed"),
    [(llama, True, True), (gpt2, True, True), (gemma2, True, False)],
)
def test_shortcuts_are_taken_where_they_hold(make, partial, streamed):
    model, tokens = make(), ids()
    with torch.no_grad():
        replay = Replay(model, {"input_ids": tokens}, anatomy(model))
    assert (replay.partial, replay.streamed) == (partial, streamed)
    heads = [Head(layer, head) for layer in range(3) for head in range(4)]
    found = variant_losses(model, tokens, [(head,) for head in heads])
    torch.testing.assert_close(
        found.losses, naive(model, {"input_ids": tokens}, heads, "zero", None), atol=1e-9, rtol=0
    )
    assert not any("forward" in vars(module) for module in model.modules())


def test_encoder_decoder_with_cross_attention():
    model = t5()
    inputs = {"input_ids": ids(2, 10), "decoder_input_ids": ids(2, 14) % 90}
    heads = [
        Head(0, 1, "encoder"),
        Head(1, 3, "encoder"),
        Head(0, 0),
        Head(1, 2),
        Head(1, 2, "cross"),
    ]
    found = variant_losses(model, inputs, [(head,) for head in heads])
    torch.testing.assert_close(
        found.losses, naive(model, inputs, heads, "zero", None), atol=1e-9, rtol=0
    )
    assert (found.changes.abs().amax((1, 2)) > 1e-6).all()


class Leaky(nn.Module):
    """A block that reads what the first block left on the side: it must not be answered from a record."""

    def __init__(self, block: nn.Module, side: dict[str, Tensor], first: bool) -> None:
        super().__init__()
        self.block, self.side, self.first = block, side, first

    def forward(self, hidden_states: Tensor, *args: Any, **rest: Any) -> Tensor:
        if self.first:
            self.side["kept"] = hidden_states * 5
        return self.block(hidden_states, *args, **rest) + self.side["kept"]


def test_a_model_that_passes_more_between_blocks_is_run_whole():
    model, tokens, side = llama(), ids(), {}
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = Leaky(block, side, i == 0)
        model.model.layers[i].attention_type = "full_attention"
    heads = [Head(2, 1), Head(1, 0)]
    found = variant_losses(model, tokens, [(head,) for head in heads])
    torch.testing.assert_close(
        found.losses, naive(model, {"input_ids": tokens}, heads, "zero", None), atol=1e-9, rtol=0
    )


def test_padding_is_left_out():
    model, tokens = llama(), ids()
    mask = torch.ones_like(tokens)
    mask[0, :9] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    result = head_importance(model, inputs, "L1")
    heads = [Head(1, head) for head in range(4)]
    losses = naive(model, inputs, heads, "zero", None)
    for head, row in zip(heads, losses, strict=True):
        assert result[head] == pytest.approx(float(row.nanmean()) - result.loss, abs=1e-6)
    assert result.tokens == 23 + 14
    assert torch.isnan(result.change.values["", 1]).sum() == 0
    assert result.change.stacks() == [""] and list(result.change.values) == [("", 1)]


def test_small_budgets_and_windows_change_nothing():
    model, tokens = llama(), ids(3, 24)
    whole = head_importance(model, tokens)
    pieces = head_importance(model, tokens, budget=100)
    torch.testing.assert_close(pieces.change.matrix(), whole.change.matrix(), atol=1e-6, rtol=0)
    windows = evaluation_inputs(model, tokens.flatten(), 24)["input_ids"]
    assert torch.equal(windows, tokens)


def test_variants_of_several_heads_in_one_batch_equal_their_ablation():
    model, tokens = llama(), ids()
    sets = [(Head(0, 1), Head(2, 2)), (), (Head(1, 1), Head(1, 3))]
    found = variant_losses(model, tokens, sets, together=True)
    assert found.changes[1].abs().max() < 1e-12
    for heads, losses in zip(sets, found.losses, strict=True):
        if heads:
            with torch.no_grad(), regard.ablate(model, heads):
                logits = model(tokens).logits
            expected = nn.functional.cross_entropy(
                logits[:, :-1].mT, tokens[:, 1:], reduction="none"
            )
            torch.testing.assert_close(losses, expected, atol=1e-10, rtol=0)


def test_result_tables_and_sentence():
    result = head_importance(llama(), ids(), "L0H0 L2H3")
    frame = result.to_frame().drop_nans("value")
    assert frame.shape[0] == 2 and set(frame["layer"]) == {0, 2}
    assert "of 2 heads" in result.sentence()
    assert set(result.per_token) == {Head(0, 0), Head(2, 3)}
    assert result.plot() is not None


def test_what_cannot_be_measured_is_refused():
    model = llama()
    with pytest.raises(InputError, match=r"layer 0 has heads 0\.\.3"):
        head_importance(model, ids(), "L0H9")
    with pytest.raises(InputError, match="nothing to predict"):
        head_importance(model, torch.tensor([[3]]))
    with pytest.raises(InputError, match="did you mean zero"):
        head_importance(model, ids(), mode="zeros")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj"):
        head_importance(model, ids())


def test_the_model_is_restored_after_an_interrupt(monkeypatch):
    model, tokens = llama(), ids()
    with torch.no_grad():
        before = model(tokens).logits
    calls = iter([False] * 4 + [True] * 20)
    original = type(model.model.layers[2].self_attn).forward

    def forward(self: nn.Module, *args: Any, **rest: Any) -> Any:
        if self is model.model.layers[2].self_attn and next(calls):
            raise KeyboardInterrupt
        return original(self, *args, **rest)

    monkeypatch.setattr(type(model.model.layers[2].self_attn), "forward", forward)
    with pytest.raises(KeyboardInterrupt):
        head_importance(model, tokens)
    monkeypatch.undo()
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_intervals_cover_the_mean_of_independent_stretches():
    generator = torch.Generator().manual_seed(0)
    hits, errors = 0, []
    for trial in range(60):
        values = torch.randn(2, 640, generator=generator)
        low, high = bootstrap(values, draws=400, seed=trial).tolist()
        hits += low <= 0 <= high
        errors.append(standard_error(values))
    assert 50 <= hits <= 60
    assert sum(errors) / 60 == pytest.approx(1 / 1280**0.5, rel=0.1)
    assert standard_error(torch.ones(1, 10)) != standard_error(
        torch.ones(1, 10)
    )  # nan: one stretch


@pytest.mark.model
@pytest.mark.slow
def test_on_smollm2_a_batch_of_heads_equals_the_loop():
    model = regard.load("smollm2")
    tokens = evaluation_inputs(model, regard.texts.prose(2000, seed=4), 48)["input_ids"][:1]
    heads = [Head(0, 2), Head(14, 3), Head(29, 8)]
    found = variant_losses(model, tokens, [(head,) for head in heads])
    expected = naive(model, {"input_ids": tokens}, heads, "zero", None)
    torch.testing.assert_close(found.losses, expected, atol=1e-3, rtol=0)
