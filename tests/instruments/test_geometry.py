"""Cosines and norms against float64 loops over full maps."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

import regard
from regard.engine import AttentionCall, Method
from regard.instruments.geometry import (
    BosCosine,
    QueryKeyAngle,
    bos_cosine,
    norm_report,
    qk_angle_report,
)


def llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


class Seen(Method):
    def __init__(self):
        self.calls = []

    def after(self, call: AttentionCall) -> None:
        self.calls.append(call)


def padded(side):
    rows = [torch.randint(64, (n,)) for n in (9, 5)]
    ids, mask = torch.zeros(2, 9, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(9 - len(row), 9) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return rows, ids, mask


def reference(call, causal=True):
    """cos to the first key and mean cos to the others, averaged over queries, by a loop over the full map."""
    key = call.key.repeat_interleave(call.group, 1)
    cosine = cosine_similarity(call.query[:, :, :, None], key[:, :, None], dim=-1)
    first, others, count = 0.0, 0.0, 0
    for t in range(1 if causal else 0, call.queries):
        end = t + 1 if causal else call.keys
        first = first + cosine[:, :, t, 0].sum(0)
        others = others + cosine[:, :, t, 1:end].mean(-1).sum(0)
        count += len(cosine)
    return first / count, others / count


def test_angle_equals_the_full_map():
    model, ids, seen = llama(), torch.randint(64, (3, 10)), Seen()
    with torch.no_grad(), regard.attach(model, seen):
        model(input_ids=ids)
    found = qk_angle_report(model, ids)
    for layer, call in enumerate(seen.calls):
        first, others = reference(call)
        torch.testing.assert_close(
            found["cosine to first key"].values["", layer].double(), first, rtol=0, atol=1e-6
        )
        torch.testing.assert_close(
            found["cosine to other keys"].values["", layer].double(), others, rtol=0, atol=1e-6
        )
        torch.testing.assert_close(
            found["angle to first key"].values["", layer].double(),
            first - others,
            rtol=0,
            atol=1e-6,
        )


def test_angle_without_a_causal_mask_compares_with_every_other_key():
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
    )
    torch.manual_seed(0)
    model, seen, angle = ViTModel(config).eval(), Seen(), QueryKeyAngle()
    with torch.no_grad(), regard.attach(model, seen, angle):
        model(pixel_values=torch.randn(2, 3, 8, 8))
    first, others = reference(seen.calls[0], causal=False)
    (table,) = angle.compute()["angle to first key"].values.values()
    torch.testing.assert_close(table, first - others, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_give_what_their_rows_give_alone(side):
    model = llama()
    rows, ids, mask = padded(side)
    alone, cosines = QueryKeyAngle(), BosCosine()
    for row in rows:
        with torch.no_grad(), regard.attach(model, alone, cosines):
            model(input_ids=row[None])
    together, both = QueryKeyAngle(), BosCosine()
    with torch.no_grad(), regard.attach(model, together, both):
        model(input_ids=ids, attention_mask=mask)
    expected = alone.compute()["angle to first key"].matrix()
    torch.testing.assert_close(
        together.compute()["angle to first key"].matrix(), expected, rtol=0, atol=1e-5
    )
    batch = both.compute()[""][0]
    for i, (row, single) in enumerate(zip(rows, cosines.compute()[""], strict=True)):
        kept = batch[:, i][:, mask[i].bool()]
        assert kept.shape == (3, len(row)) and batch[:, i][:, ~mask[i].bool()].isnan().all()
        torch.testing.assert_close(kept, single[:, 0], rtol=0, atol=1e-5)


def test_merging_is_seeing_both():
    model, ids = llama(), torch.randint(64, (4, 8))
    parts = [QueryKeyAngle(), QueryKeyAngle()]
    for part, some in zip(parts, (ids[:1], ids[1:]), strict=True):
        with torch.no_grad(), regard.attach(model, part):
            model(input_ids=some)
    merged = parts[0].merge(parts[1]).compute()["angle to first key"].matrix()
    torch.testing.assert_close(merged, qk_angle_report(model, ids)["angle to first key"].matrix())


def test_bos_cosine_has_a_gradient_and_the_right_value():
    hidden = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    cosine = bos_cosine(hidden)
    torch.testing.assert_close(cosine, cosine_similarity(hidden, hidden[:, :1], dim=-1))
    cosine.square().mean().backward()
    assert hidden.grad is not None and hidden.grad.abs().max() > 0
    # the gradient of a cosine is orthogonal to the vector it moves
    assert (hidden.grad * hidden).sum(-1).abs().max() < 1e-12


def test_large_half_precision_states_do_not_overflow():
    hidden = torch.full((1, 2, 64), 20000.0, dtype=torch.float16)
    assert bos_cosine(hidden).tolist() == [[1.0, 1.0]] or torch.allclose(
        bos_cosine(hidden), torch.ones(1, 2)
    )


def test_norm_report_is_that_of_the_hidden_states():
    model, ids = llama(), torch.randint(64, (2, 9))
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
    report = norm_report(model, ids)
    norms = hidden.norm(dim=-1)
    assert abs(report.layers[0].hidden_first - float(norms[:, 0].mean())) < 1e-5
    assert abs(report.layers[0].hidden_others - float(norms[:, 1:].median(1).values.mean())) < 1e-5
    assert report.to_frame().shape == (2, 7) and len(report.plot().axes) == 3
