"""DHSA, dynamic hierarchical sparse attention: chunks end where a small network sees the text break.

The network reads the keys of the first layer, once for each prompt; all layers share its cuts. From its logits z of the gaps:

    candidates: z > threshold, none in the first or last w gaps, one forced where the instruction begins and none after it
    kept:       in order of falling z, if farther than `distance` tokens from every kept one, at most 8 floor(L / block)
    cuts:       0, every kept gap + 1, L

What follows is `HierarchicalSparse`: chunk scores, handed down to tokens, a budget of tokens for each block of queries.
Source: Xiong et al. 2025, "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs"
(arXiv 2510.24606), version 1.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from regard._errors import ModelError, OutputError
from regard.engine import AttentionCall
from regard.nn.boundary_predictor import BoundaryPredictor
from regard.ops.nms import nms1d
from regard.sparse._teacher import shared_keys
from regard.sparse.hierarchical import HierarchicalSparse


def boundary_cuts(
    logits: Float[Tensor, " length"],
    *,
    block: int = 128,
    instruction: int = 64,
    threshold: float = 1.1,
    distance: int = 8,
    window: int = 4,
) -> Int[Tensor, " ends"]:
    """Where chunks end, from the logit of each gap (that between tokens i and i + 1 is the i-th); see the module's text.

    As in the released code the forced gap is L - instruction, so that the chunk before holds the first instruction token.

    >>> import torch
    >>> logits = torch.full((40,), -5.0)
    >>> logits[[10, 12, 25]] = torch.tensor([3.0, 2.0, 4.0])  # 12 is too near 10
    >>> boundary_cuts(logits, block=8, instruction=4).tolist()
    [0, 11, 26, 37, 40]
    """
    length = len(logits)
    gap = torch.arange(length, device=logits.device)
    forced = [length - instruction] if 0 < instruction < length else []
    last = min([length - window - 1, *forced])
    open_gaps = (gap >= window - 1) & (gap <= last) & (logits > threshold)
    scores = logits.masked_fill(~open_gaps, -torch.inf)
    kept = nms1d(scores, distance, most=8 * (length // block), forced=forced)
    ends = [gap.new_tensor([0]), kept + 1, gap.new_tensor([length])]
    return torch.cat(ends).unique()


class DHSA(HierarchicalSparse):
    """Dynamic hierarchical sparse attention for the prefill of a causal language model.

    Args:
        predictor: a boundary predictor trained for the model (`train_boundary_predictor`, `load_predictor`).
        threshold: logits that a boundary must exceed; the paper's 1.1 is a probability of 0.75.
        distance: boundaries nearer than this to a higher one are dropped.
        rest: `budget`, `block`, `local`, `first`, `instruction`, `layers` of `HierarchicalSparse`.

    Raises:
        InputError: as `HierarchicalSparse`, or (in use) a predictor for keys of another width.

    Cost beyond `HierarchicalSparse`: the predictor once a prompt, about 1 MFLOP a token for 192 channels.

        with regard.attach(model, DHSA.for_smollm2(budget=0.25)):
            model.generate(**inputs)
    """

    def __init__(
        self,
        predictor: BoundaryPredictor,
        *,
        threshold: float = 1.1,
        distance: int = 8,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.predictor = predictor
        self.threshold, self.distance = threshold, distance

    @classmethod
    def for_smollm2(cls, *, threshold: float = -math.inf, **rest: Any) -> DHSA:
        """With the predictor that comes with regard, trained on the embedded SmolLM2-135M-Instruct.

        Its training is short and its logits seldom reach the paper's threshold, so that by default none is set: the highest
        logits become boundaries, as many as their distance and the most chunks allow.
        """
        data = resources.files("regard.sparse").joinpath("data", "smollm2_boundaries.safetensors")
        with resources.as_file(data) as path:
            return cls(load_predictor(path), threshold=threshold, **rest)

    @torch.no_grad()
    def cuts(self, call: AttentionCall) -> Int[Tensor, " ends"]:
        predictor = self.predictor.to(call.key.device)
        logits = predictor(shared_keys(call.key[0]).float()[None])[0]
        return boundary_cuts(
            logits,
            block=self.block,
            instruction=self.instruction,
            threshold=self.threshold,
            distance=self.distance,
            window=predictor.window,
        )


def save_predictor(predictor: BoundaryPredictor, path: str | Path, *, model: str = "") -> None:
    """Writes a predictor as float16 safetensors, whole or not at all.

    Args:
        model: name of the model it was trained for, kept in the file.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    meta = {
        "model": model,
        "window": predictor.window,
        "heads": predictor.heads,
        "hidden": predictor.mlp[0].out_features,
        "channels": predictor.channels,
    }
    tensors = {name: t.half().contiguous().cpu() for name, t in predictor.state_dict().items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as room:
            written = Path(room) / path.name
            save_file(tensors, written, metadata={"boundary_predictor": json.dumps(meta)})
            written.chmod(0o644)  # safetensors writes files that only their owner may read
            os.replace(written, path)
    except OSError as error:
        raise OutputError(f"cannot write the boundary predictor to {path}: {error}") from error


def load_predictor(path: str | Path) -> BoundaryPredictor:
    """Reads what `save_predictor` wrote, in eval mode.

    Raises:
        ModelError: no such file, or one that is not a boundary predictor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = (file.metadata() or {}).get("boundary_predictor")
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read a boundary predictor from {path}: {error}") from error
    if meta is None:
        raise ModelError(
            f"{path} is not a boundary predictor (no such metadata); make one with save_predictor"
        )
    given = json.loads(meta)
    predictor = BoundaryPredictor(
        given["channels"], given["window"], given["heads"], given["hidden"]
    )
    try:
        predictor.load_state_dict(tensors)
    except RuntimeError as error:
        raise ModelError(f"{path}: weights and description do not fit: {error}") from error
    return predictor.eval()


__all__ = ["DHSA", "boundary_cuts", "load_predictor", "save_predictor"]
