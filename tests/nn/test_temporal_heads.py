"""Heads that look at other frames: against a loop, and on vision towers of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import regard
from fixtures_models import tiny_vision
from regard._errors import InputError
from regard.engine import AttentionCall, Method
from regard.nn import TemporalHeads, VideoClassifier, shift_heads

FRAMES = 4
OFFSETS = {0: -1, 1: +1, 3: -2}


def vit(seed: int = 0) -> Any:
    return tiny_vision("vit", seed)


def clip(seed: int = 0) -> Any:
    return tiny_vision("clip", seed)


def by_loop(states: torch.Tensor, frames: int, offsets: dict[int, int]) -> torch.Tensor:
    found = states.clone()
    for image in range(len(states)):
        start, time = image - image % frames, image % frames
        for head, offset in offsets.items():
            if 0 <= time + offset < frames:
                found[image, head] = states[start + time + offset, head]
    return found


@pytest.mark.parametrize("frames", [1, 3, 6])
def test_the_shift_is_a_loop_over_frames_and_heads(frames):
    torch.manual_seed(0)
    states = torch.randn(6, 4, 5, 3)
    assert torch.equal(shift_heads(states, frames, OFFSETS), by_loop(states, frames, OFFSETS))


def test_gradients_of_the_shift():
    states = torch.randn(3, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: shift_heads(s, 3, {0: -1, 1: 2}), states)


@pytest.mark.parametrize("make", [vit, clip])
def test_a_tower_attends_to_other_frames_with_those_heads_alone(make):
    class Watch(Method):
        def heads(self, call: AttentionCall, output: torch.Tensor) -> None:
            seen.append(output.clone())

    class Keep(Method):
        def before(self, call: AttentionCall) -> None:
            kept.append((call.query.clone(), call.key.clone(), call.value.clone()))

    seen: list[torch.Tensor] = []
    kept: list[Any] = []
    images = torch.randn(2 * FRAMES, 1, 8, 8)
    model = make()
    with torch.no_grad(), regard.attach(model, Keep(), TemporalHeads(FRAMES, OFFSETS), Watch()):
        model(pixel_values=images)
    assert len(seen) == 2
    for (query, key, value), output in zip(kept, seen, strict=True):
        key, value = by_loop(key, FRAMES, OFFSETS), by_loop(value, FRAMES, OFFSETS)
        weights = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1)
        torch.testing.assert_close(output, weights @ value)


@pytest.mark.parametrize("make", [vit, clip])
@pytest.mark.parametrize("heads", [TemporalHeads(1, OFFSETS), TemporalHeads(FRAMES, {})])
def test_one_frame_or_no_offsets_is_the_image_model(make, heads):
    model, images = make(), torch.randn(FRAMES, 1, 8, 8)
    before = model(pixel_values=images).last_hidden_state
    with regard.attach(model, heads):
        assert torch.equal(model(pixel_values=images).last_hidden_state, before)
    with regard.attach(model, TemporalHeads(FRAMES, {0: 1})):
        assert (model(pixel_values=images).last_hidden_state - before).abs().max() > 1e-5
    assert torch.equal(model(pixel_values=images).last_hidden_state, before)


@pytest.mark.parametrize("make", [vit, clip])
def test_the_order_of_frames_is_seen_with_offsets_only(make):
    torch.manual_seed(1)
    clips, order = torch.randn(2, FRAMES, 1, 8, 8), torch.tensor([2, 0, 3, 1])
    blind = VideoClassifier(make(), FRAMES, 3, {}, timed=False).eval()
    torch.testing.assert_close(blind(clips[:, order]), blind(clips), rtol=0, atol=1e-5)
    sees = VideoClassifier(make(), FRAMES, 3, OFFSETS, timed=False).eval()
    assert (sees(clips[:, order]) - sees(clips)).abs().max() > 1e-4
    assert (sees(clips.flip(1)) - sees(clips)).abs().max() > 1e-4
    timed = VideoClassifier(make(), FRAMES, 3, {}).eval()
    nn.init.normal_(timed.time)
    assert (timed(clips[:, order]) - timed(clips)).abs().max() > 1e-4


@pytest.mark.parametrize("make", [vit, clip])
def test_a_classifier_reads_each_clip_alone_and_leaves_the_tower_as_it_was(make):
    torch.manual_seed(1)
    tower, clips = make(), torch.randn(3, FRAMES, 1, 8, 8)
    before = tower(pixel_values=clips[0]).last_hidden_state
    model = VideoClassifier(tower, FRAMES, 3, OFFSETS).eval()
    nn.init.normal_(model.time)
    torch.testing.assert_close(model(clips)[1:2], model(clips[1:2]))
    copied = copy.deepcopy(model)
    torch.testing.assert_close(copied(clips), model(clips))
    assert torch.equal(tower(pixel_values=clips[0]).last_hidden_state, before)
    assert not tower.embeddings._forward_hooks


def test_everything_learns():
    model = VideoClassifier(vit(), FRAMES, 3, OFFSETS)
    model(torch.randn(2, FRAMES, 1, 8, 8)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_text_tower_is_left_alone():
    from transformers import CLIPTextConfig, CLIPTextModel

    settings: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 20}
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            **settings, num_attention_heads=4, intermediate_size=48, eos_token_id=19, bos_token_id=0
        )
    ).eval()
    ids = torch.randint(1, 19, (FRAMES, 5))
    before = text(input_ids=ids).last_hidden_state
    with regard.attach(text, TemporalHeads(FRAMES, OFFSETS)):
        torch.testing.assert_close(text(input_ids=ids).last_hidden_state, before)


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match=r"6 images.*4 frames"):
        shift_heads(torch.zeros(6, 2, 1, 1), 4, {0: 1})
    with pytest.raises(InputError, match=r"heads 0 \.\. 1"):
        shift_heads(torch.zeros(4, 2, 1, 1), 4, {2: 1})
    with pytest.raises(InputError, match="1 or more"):
        TemporalHeads(0, {})
    with pytest.raises(InputError, match="no `embeddings`"):
        VideoClassifier(nn.Linear(2, 2), 4, 3, {})
    with pytest.raises(InputError, match="of 4 frames"):
        VideoClassifier(vit(), FRAMES, 3, {})(torch.zeros(1, 3, 1, 8, 8))
