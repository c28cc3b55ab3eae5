"""The parts of the experiment against independent computations."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from regard.nn import ATConv2d
from regard.papers import Run
from regard.papers import _atconv_runs as runs
from regard.papers import atconv as paper


def test_the_operator_is_exact():
    torch.manual_seed(0)
    assert max(runs.exactness().values()) < 1e-5


def test_labels_are_orientation_turned_round_by_the_cue():
    images, labels = runs.cued_orientation(400, torch.Generator().manual_seed(0))
    low = images[:, 0, :4, :4].mean((-2, -1)) < 0
    middle = functional.avg_pool2d(images[:, :, 14:26, 14:26], 2)[:, 0]
    falling = (middle[:, 1:, 1:] * middle[:, :-1, :-1]).mean((-2, -1))
    rising = (middle[:, 1:, :-1] * middle[:, :-1, 1:]).mean((-2, -1))
    at_45 = rising > falling  # waves across x + y are constant along x - y
    assert float(((at_45 ^ low).long() == labels).float().mean()) > 0.95
    assert 150 < int(labels.sum()) < 250


def test_a_far_corner_is_out_of_reach_of_a_static_kernel_and_within_that_of_routing():
    torch.manual_seed(0)
    for name, reached in (("static", False), ("ATConv", True), ("attention", True)):
        model = runs.OneBlock(runs.MIXERS[name]).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        image = torch.randn(1, 1, 40, 40, requires_grad=True)
        features = model.block(model.stem(image))
        features[0, :, 10, 10].sum().backward()
        assert image.grad is not None
        assert bool(image.grad[0, 0, :4, :4].abs().max() > 0) is reached, name


def test_variants_differ_from_atconv_in_one_thing():
    torch.manual_seed(0)
    plain, kept, image = ATConv2d(6), runs.WithoutInhibition(6), torch.randn(2, 6, 8, 8)
    kept.load_state_dict({n: p for n, p in plain.state_dict().items() if n != "theta"})
    plain.theta.data.fill_(-100.0)
    torch.testing.assert_close(kept(image), plain(image))
    static, inhibited = runs.StaticConv2d(6), runs.InhibitedStaticConv2d(6)
    inhibited.load_state_dict({**static.state_dict(), "theta": torch.full((6,), -100.0)})
    torch.testing.assert_close(inhibited(image), static(image))
    inhibited.theta.data.fill_(100.0)
    weight = static.depthwise.weight
    static.depthwise.weight.data = weight - weight.mean((-2, -1), keepdim=True)
    torch.testing.assert_close(inhibited(image), static(image))


def test_attention_is_softmax_over_pixels():
    torch.manual_seed(0)
    layer, image = runs.ImageAttention(16), torch.randn(2, 16, 3, 4)
    query, key, value = layer.qkv(image).flatten(2).chunk(3, dim=1)
    weights = (query.transpose(1, 2) @ key / 4).softmax(-1)
    mixed = (value @ weights.transpose(1, 2)).view_as(image)
    torch.testing.assert_close(layer(image), layer.o_proj(mixed))


def test_digits_are_not_trained_on_and_held_out():
    (images, labels), (held, answers) = runs.digit_images(0)
    assert (len(images), len(held)) == (400, 1397) == (len(labels), len(answers))
    assert images.shape[1:] == (1, 16, 16)
    assert not (images[:, None, :50] == held[None, :200, :50]).flatten(2).all(-1).any()


def test_training_is_repeatable():
    one, two = (runs.train_cued("ATConv", 1, 1, 100, 50) for _ in range(2))
    assert one == two and len(one["curve"]) == 1


def test_verdicts_follow_the_numbers(tmp_path):
    def recorded(own: float, static: float, before: float, after: float) -> dict[str, Any]:
        run = Run(paper.PAPER, scale="quick", work=tmp_path)
        curves = {"ATConv": own, "ATConv without inhibition": own, "static": static}
        cued = {
            n: [{"curve": [p, p], "fitted": p}] for n, p in {**curves, "attention": 50.0}.items()
        }
        paper.record_cued(run, cued, 100)
        seen = {n: [{"accuracy": p + s} for s in (0.0, 0.1, 0.2)] for n, p in curves.items()}
        paper.record_digits(run, seen, 1)
        layer = {"constant before": before, "constant after": after, "alpha": 0.5}
        layer |= {"similarity before": before, "similarity after": after}
        paper.record_redundancy(run, [{"redundancy": [layer]}])
        return {name: row["holds"] for name, row in run.records.items()}

    good, bad = recorded(99.0, 50.0, 0.4, 0.1), recorded(60.0, 80.0, 0.1, 0.4)
    names = ("routing", "static", "routing-alone", "digits", "constant", "redundancy")
    assert [good[name] for name in names] == [True] * 6
    assert [bad[name] for name in names] == [False] * 6
