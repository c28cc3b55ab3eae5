"""DHSA: boundaries from logits, the predictor in a model, its file, its training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import regard
import regard.texts
from regard._errors import InputError, ModelError, OutputError
from regard.nn import BoundaryPredictor
from regard.ops.boundary_ratio import boundary_ratio
from regard.sparse.boundary_training import lessons, train_boundary_predictor
from regard.sparse.dhsa import DHSA, boundary_cuts, load_predictor, save_predictor

SMALL: dict[str, Any] = {"block": 8, "local": 4, "first": 3, "instruction": 5}


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def naive_cuts(
    logits: list[float], block: int, instruction: int, threshold: float, distance: int
) -> list[int]:
    """The steps of the paper's code in order: threshold, sort, the forced gap, suppression, the most chunks, ends."""
    length, window = len(logits), 4
    found = [i for i, z in enumerate(logits) if z > threshold]
    found = [i for i in found if window - 1 <= i < length - window]
    kept = [length - instruction] if 0 < instruction < length else []
    for i in sorted(found, key=lambda i: (-logits[i], i)):
        if len(kept) >= 8 * (length // block):
            break
        after = 0 < instruction < length and i > length - instruction
        if not after and all(abs(i - k) > max(distance, 0) for k in kept):
            kept.append(i)
    return sorted({0, length, *(i + 1 for i in kept)})


@given(
    st.lists(st.floats(-4, 6, width=16), min_size=1, max_size=120),
    st.integers(1, 40),
    st.integers(0, 30),
    st.sampled_from([float("-inf"), 0.0, 1.1]),
    st.integers(0, 9),
)
@settings(max_examples=200, deadline=None)
def test_cuts_equal_the_steps_written_out(logits, block, instruction, threshold, distance):
    found = boundary_cuts(
        torch.tensor(logits),
        block=block,
        instruction=instruction,
        threshold=threshold,
        distance=distance,
    )
    assert found.tolist() == naive_cuts(logits, block, instruction, threshold, distance)


def test_attaches_to_a_model_and_a_budget_of_everything_changes_nothing():
    torch.manual_seed(0)
    model, predictor = llama(), BoundaryPredictor(16).eval()
    ids = torch.randint(0, 64, (2, 90))
    low: dict[str, Any] = {"threshold": -10.0, "distance": 2, **SMALL}
    with torch.no_grad():
        plain = model(ids).logits
        with regard.attach(model, DHSA(predictor, budget=90, **low)):
            torch.testing.assert_close(model(ids).logits, plain, atol=1e-5, rtol=0)
        with regard.attach(model, DHSA(predictor, budget=20, **low)):
            sparse = model(ids).logits
        assert not torch.allclose(sparse, plain, atol=1e-2)
        assert torch.equal(model(ids).logits, plain)
        rows = []
        for row in ids:  # each text has boundaries of its own
            with regard.attach(model, DHSA(predictor, budget=20, **low)):
                rows.append(model(row[None]).logits[0])
    torch.testing.assert_close(sparse, torch.stack(rows), atol=1e-4, rtol=0)


def test_refuses_a_predictor_of_another_width():
    model = llama()
    with (
        pytest.raises(InputError, match="KV heads x head dim"),
        regard.attach(model, DHSA(BoundaryPredictor(8), budget=20, **SMALL)),
    ):
        model(torch.randint(0, 64, (1, 40)))


def test_file_and_back(tmp_path: Path):
    predictor = BoundaryPredictor(8, window=3, heads=2, hidden=5).eval()
    save_predictor(predictor, tmp_path / "new" / "p.safetensors", model="toy")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["p.safetensors"]
    again = load_predictor(tmp_path / "new" / "p.safetensors")
    keys = torch.randn(1, 30, 8)
    assert (again.window, again.heads, again.training) == (3, 2, False)
    torch.testing.assert_close(again(keys), predictor(keys), atol=2e-2, rtol=0)
    save_predictor(again, tmp_path / "p.safetensors")
    twice = load_predictor(tmp_path / "p.safetensors")
    assert torch.equal(twice(keys), again(keys))


def test_bad_files_are_named(tmp_path: Path):
    with pytest.raises(ModelError, match=r"cannot read a boundary predictor from .*nowhere"):
        load_predictor(tmp_path / "nowhere")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ModelError, match="cannot read"):
        load_predictor(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="is not a boundary predictor"):
        load_predictor(tmp_path / "other.safetensors")
    meta = '{"channels": 8, "window": 4, "heads": 4, "hidden": 8}'
    save_file({"a": torch.zeros(1)}, tmp_path / "cut.safetensors", {"boundary_predictor": meta})
    with pytest.raises(ModelError, match="do not fit"):
        load_predictor(tmp_path / "cut.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the boundary predictor"):
        save_predictor(BoundaryPredictor(8), tmp_path / "file" / "p.safetensors")


def test_lessons_are_the_keys_and_the_ratio_of_the_models_own_attention():
    torch.manual_seed(0)
    model, ids = llama(), torch.randint(0, 64, (300,))
    found = lessons(model, ids, [0, 2])
    model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model(ids[None], output_attentions=True)
    assert [lesson.layer for lesson in found] == [0, 2]
    cache = output.past_key_values
    for lesson in found:
        attention = output.attentions[lesson.layer][0].mean(0)
        expected = boundary_ratio(attention)
        torch.testing.assert_close(lesson.ratio, expected, atol=0, rtol=1e-4)
        keys = cache.layers[lesson.layer].keys[0].transpose(0, 1).reshape(300, 16)
        torch.testing.assert_close(lesson.keys.float(), keys, atol=1e-2, rtol=0)


def test_training_lowers_the_loss_and_follows_its_seed():
    torch.manual_seed(0)
    model = llama()
    texts = [torch.randint(0, 64, (80,)) for _ in range(3)]
    one, same, longer = (
        train_boundary_predictor(model, texts, layers=2, epochs=epochs, rate=3e-3)
        for epochs in (1, 1, 12)
    )
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    from regard.nn.boundary_predictor import boundary_targets, focal_loss, inner_gaps

    losses = []
    for predictor in (one, longer):
        lesson = lessons(model, texts[0], [0])[0]
        logits = predictor(lesson.keys.float()[None])[0]
        losses.append(focal_loss(logits, boundary_targets(lesson.ratio), inner_gaps(80)).item())
    assert losses[1] < 0.9 * losses[0]


def test_training_refuses_texts_without_gaps():
    with pytest.raises(InputError, match="at least 16 tokens each, got"):
        train_boundary_predictor(llama(), [torch.zeros(15, dtype=torch.long)])
    with pytest.raises(InputError, match="texts must be one or more"):
        train_boundary_predictor(llama(), [])


@pytest.mark.model
def test_the_embedded_model_with_its_own_predictor():
    model = regard.load("smollm2")
    ids = model.tokenizer(regard.texts.prose(1500), return_tensors="pt").input_ids[:, :240]
    small: dict[str, Any] = {"block": 32, "local": 32, "first": 16, "instruction": 16}
    with torch.no_grad():
        plain = model(ids).logits
        with regard.attach(model, DHSA.for_smollm2(budget=1.0, **small)):
            torch.testing.assert_close(model(ids).logits, plain, atol=1e-3, rtol=0)
        method = DHSA.for_smollm2(budget=80, **small)
        with regard.attach(model, method):
            sparse = model(ids).logits
            cuts = method._cuts[""][0]
    assert cuts[0] == 0 and cuts[-1] == 240 and 8 <= len(cuts) <= 8 * (240 // 32) + 2
    change = (sparse.log_softmax(-1) - plain.log_softmax(-1)).abs().mean()
    assert 1e-3 < change < 2
