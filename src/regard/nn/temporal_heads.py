"""An image transformer that reads video: some heads take their keys and values from another frame (STDHA).

Frames are a batch of images; head h with offset D attends, from frame t, to frame t + D of the same clip:

    k_t, v_t  <-  k_{t+D}, v_{t+D}   for the heads that have an offset, where 0 <= t + D < T;   else its own frame's

Queries stay, all tokens of those heads move (the class token too), and clips do not wrap around. Parameters and multiplications
are those of the image model. The shift is by whole heads, after the projections; a shift that cuts through heads is another
method (a channel shift).

    with regard.attach(vit, TemporalHeads(frames=8, offsets={0: -1, 1: +1})): vit(pixel_values=frames)

Source: Li et al. 2023, "ZeroI2V: Zero-Cost Adaptation of Pre-trained Transformers from Image to Video", arXiv 2310.01324. Of 12
heads, it gives -1 and +1 to one each; on Something-Something V2 also -2 and +2.

Cost: a copy of the keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard._errors import InputError, at_least_one
from regard.attach import attach
from regard.engine import AttentionCall, Method


def shift_heads(
    states: Float[Tensor, "images heads tokens dim"], frames: int, offsets: Mapping[int, int]
) -> Float[Tensor, "images heads tokens dim"]:
    """Keys or values with those of each head in `offsets` taken from so many frames later; frames without one keep theirs.

    Args:
        states: of `images / frames` clips, the frames of each in a row.
        frames: of a clip.
        offsets: frames to look ahead (negative: back), by head.

    Raises:
        InputError: images that are no whole number of clips, or a head that does not exist.

    >>> states = torch.arange(3.0).view(3, 1, 1, 1)  # one clip of three frames
    >>> shift_heads(states, 3, {0: -1}).flatten()
    tensor([0., 0., 1.])
    """
    images, heads = states.shape[:2]
    if frames < 1 or images % frames:
        raise InputError(f"{images} images are no whole number of clips of {frames} frames")
    unknown = [head for head in offsets if not 0 <= head < heads]
    if unknown:
        raise InputError.of("offsets", given=dict(offsets), expected=f"for heads 0 .. {heads - 1}")
    if not offsets:
        return states
    own = torch.arange(frames, device=states.device)[:, None]
    chosen = torch.tensor(list(offsets), device=states.device)
    source = own + torch.tensor(list(offsets.values()), device=states.device)
    source = torch.where((source >= 0) & (source < frames), source, own)
    clips = states.unflatten(0, (-1, frames))
    shifted = clips.clone()
    shifted[:, :, chosen] = clips[:, source, chosen]
    return shifted.flatten(0, 1)


class TemporalHeads(Method):
    """Attached to a vision model, heads with an offset read keys and values of another frame; see the module.

    Causal attention (a text tower beside the vision tower) and cross-attention are left as they are.

    Args:
        frames: of a clip; the images of a batch are whole clips.
        offsets: frames to look ahead (negative: back), by KV head.

    >>> from regard.engine import Pipeline, attend
    >>> value = torch.arange(3.0).view(3, 1, 1, 1)
    >>> call = AttentionCall.make(torch.ones(3, 1, 1, 1), torch.ones(3, 1, 1, 1), value, causal=False)
    >>> call.site = replace(call.site, causal=False)
    >>> attend(call, Pipeline([TemporalHeads(3, {0: +1})])).flatten()
    tensor([1., 2., 2.])
    """

    def __init__(self, frames: int, offsets: Mapping[int, int]) -> None:
        at_least_one(frames=frames)
        self.frames, self.offsets = frames, dict(offsets)

    def before(self, call: AttentionCall) -> AttentionCall | None:
        if call.site.causal or call.site.kind == "cross" or not self.offsets:
            return None
        key, value = (
            shift_heads(part, self.frames, self.offsets) for part in (call.key, call.value)
        )
        return replace(call, key=key, value=value)


class VideoClassifier(nn.Module):
    """A vision transformer of `transformers` (CLIP's tower, ViT) as a video classifier.

    Each frame runs through the image model, with temporal heads and a learnt embedding of its time added to its tokens; class
    tokens are averaged over time, before a linear head. The embedding starts at zero, so at first every head without an offset
    does what it did.

    Args:
        backbone: `CLIPVisionModel` or `ViTModel` (`add_pooling_layer=False`): anything with `embeddings` whose output holds
            `last_hidden_state`.
        frames: of a clip.
        classes: of the head.
        offsets: of `TemporalHeads`; {} for the image model on every frame.
        dropout: before the head.
        timed: whether there is an embedding of time.

    Raises:
        InputError: a backbone without `embeddings`, or clips of another length (in the call).
    """

    def __init__(
        self,
        backbone: nn.Module,
        frames: int,
        classes: int,
        offsets: Mapping[int, int],
        *,
        dropout: float = 0.5,
        timed: bool = True,
    ) -> None:
        super().__init__()
        embeddings = getattr(backbone, "embeddings", None)
        if not isinstance(embeddings, nn.Module):
            raise InputError(
                f"{type(backbone).__name__} has no `embeddings`; give its vision tower (CLIPVisionModel, ViTModel)"
            )
        config: Any = backbone.config
        self.backbone, self.heads = backbone, TemporalHeads(frames, offsets)
        self.time = nn.Parameter(torch.zeros(frames, config.hidden_size)) if timed else None
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(config.hidden_size, classes)

    def forward(
        self, clips: Float[Tensor, "clips frames channels height width"]
    ) -> Float[Tensor, "clips classes"]:
        frames = self.heads.frames
        if clips.shape[1] != frames:
            raise InputError.of(
                "clips", given=tuple(clips.shape), expected=f"of {frames} frames in dimension 1"
            )
        embeddings: Any = self.backbone.embeddings
        timing = embeddings.register_forward_hook(self._add_time)
        try:
            with attach(self.backbone, self.heads):
                hidden = self.backbone(pixel_values=clips.flatten(0, 1)).last_hidden_state[:, 0]
        finally:
            timing.remove()
        # CLIP leaves its last norm to whoever pools; ViT has applied it
        norm: Any = getattr(self.backbone, "post_layernorm", nn.Identity())
        pooled = norm(hidden).unflatten(0, (-1, frames)).mean(1)
        return self.head(self.dropout(pooled))

    def _add_time(self, module: nn.Module, args: Any, tokens: Tensor) -> Tensor:
        if self.time is None:
            return tokens
        timed = tokens.unflatten(0, (-1, self.heads.frames)) + self.time[:, None]
        return timed.flatten(0, 1)
