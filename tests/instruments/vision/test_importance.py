"""Pruning equals zeroed weights; divergences equal scipy's; planted importance."""

from __future__ import annotations

import copy

import pytest
import torch
from scipy.spatial.distance import jensenshannon

from regard._errors import InputError
from regard.attach import attach
from regard.coordinates import Head
from regard.instruments.vision import (
    METRICS,
    MeanOutput,
    Prune,
    area,
    changes,
    head_importance,
    js_divergence,
    predict,
    pruning_curve,
)
from regard.papers._digits_vit import new_vit
from regard.papers._planted_vit import lights, planted_vit


@pytest.fixture
def vit():
    return new_vit(3, width=32, layers=2, heads=4).eval()


def images(count: int = 6):
    return torch.randn(count, 1, 32, 32), torch.arange(count) % 10


def projection(model, layer: int):
    attention = model.vit.layers[layer].attention
    return next(m for n, m in attention.named_modules() if n.endswith(("o_proj", "output.dense")))


def test_pruning_equals_zeroed_columns_of_the_output_projection(vit):
    pixels, _ = images()
    pruned = predict(vit, pixels, Prune([Head(1, 2), Head(0, 3), Head(0, 0)]))
    edited = copy.deepcopy(vit)
    with torch.no_grad():
        projection(edited, 1).weight[:, 16:24] = 0
        projection(edited, 0).weight[:, 24:32] = 0
        projection(edited, 0).weight[:, :8] = 0
        expected = edited(pixel_values=pixels).logits
    torch.testing.assert_close(pruned.logits, expected, atol=1e-6, rtol=1e-5)
    assert (pruned.logits - predict(vit, pixels).logits).abs().max() > 1e-4


def test_mean_outputs_are_the_mean_and_replace_a_head(vit):
    pixels, _ = images()
    sums, seen = MeanOutput(), []

    class Keep(MeanOutput):
        def heads(self, call, output):
            seen.append(output)

    with torch.no_grad(), attach(vit, sums, Keep()):
        vit(pixel_values=pixels)
    means = sums.compute()
    torch.testing.assert_close(means["", 1], seen[1].mean((0, 2)))
    seen.clear()
    with torch.no_grad(), attach(vit, Keep()):
        vit(pixel_values=pixels)
    plain = seen[1]
    seen.clear()
    with torch.no_grad(), attach(vit, Prune([Head(1, 2)], means), Keep()):
        vit(pixel_values=pixels)
    torch.testing.assert_close(seen[1][3, 2, 5], means["", 1][2])
    torch.testing.assert_close(seen[1][:, [0, 1, 3]], plain[:, [0, 1, 3]])


def test_divergence_equals_scipy():
    p, q = torch.rand(2, 20, 7, dtype=torch.float64).softmax(-1)
    expected = [jensenshannon(a, b) ** 2 for a, b in zip(p.numpy(), q.numpy(), strict=True)]
    torch.testing.assert_close(js_divergence(p, q), torch.tensor(expected), atol=1e-12, rtol=1e-9)


def test_importance_is_the_mean_change_of_single_prunings(vit):
    pixels, labels = images()
    found = head_importance(vit, pixels, labels, batch=4)
    before = predict(vit, pixels)
    after = predict(vit, pixels, Prune([Head(0, 1)]))
    expected = changes(before, after, labels)
    for metric in METRICS:
        assert found.measure(metric)["L0H1"] == pytest.approx(
            float(expected[metric].mean()), abs=1e-6
        )
        assert found.images[metric]["", 0].shape == (4, 6)
    p, q = before.logits.softmax(-1), after.logits.softmax(-1)
    fall = (p - q)[torch.arange(6), labels].mean()
    assert found.measure("probability")["L0H1"] == pytest.approx(float(fall), abs=1e-6)


def test_alone_prunes_the_rest_of_the_layer(vit):
    pixels, labels = images()
    found = head_importance(vit, pixels, labels, alone=True)
    after = predict(vit, pixels, Prune(Head(1, h) for h in (0, 1, 3)))
    expected = changes(predict(vit, pixels), after, labels)["divergence"].mean()
    assert found.measure("divergence")["L1H2"] == pytest.approx(float(expected), abs=1e-6)


def test_a_head_without_output_weights_has_no_importance():
    pixels, labels = lights(12), torch.arange(12) % 10
    for mean in (False, True):
        found = head_importance(planted_vit(), pixels, labels, mean=mean)
        for measure in found.measures().values():
            values = measure.matrix()[0]
            assert abs(float(values[5])) < 1e-6
        assert (found.measure("divergence").matrix()[0, :5] > 1e-4).any()


def test_curves_go_from_the_whole_model_to_no_head(vit):
    pixels, labels = images(10)
    order = [Head(layer, head) for layer in range(2) for head in range(4)]
    curve = pruning_curve(vit, pixels, labels, order, sizes=(0, 3, 8))
    whole = (vit(pixel_values=pixels).logits.argmax(-1) == labels).float().mean()
    assert float(curve[0]) == pytest.approx(float(whole))
    none = predict(vit, pixels, Prune(order)).right(labels).mean()
    assert float(curve[2]) == pytest.approx(float(none))
    assert area(torch.tensor([1.0, 1.0, 0.0]), (0, 3, 4)) == pytest.approx(0.875)


def test_what_cannot_be_analysed_says_so(vit):
    with pytest.raises(InputError, match="classifier"):
        predict(vit.vit, torch.zeros(1, 1, 32, 32))
    pixels, labels = images(2)
    with pytest.raises(InputError, match="metric must be one of probability"):
        head_importance(vit, pixels, labels).measure("loss")
