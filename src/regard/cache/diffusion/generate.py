"""Decoding with a masked-diffusion language model under a cache policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._errors import InputError
from regard.cache.diffusion.canvas import Canvas
from regard.cache.diffusion.commit import confident, first_end
from regard.cache.diffusion.denoiser import Denoiser
from regard.cache.diffusion.none import NoCache
from regard.cache.diffusion.policy import DiffusionCache
from regard.cache.diffusion.step import Cost, LayerStates, denoise


@dataclass(frozen=True)
class Generation:
    """What was decoded and what it cost.

    Attributes:
        tokens: `[batch, sequence]`; behind the first end of sequence everything is end of sequence.
        decided_at: `[batch, sequence]`, the step that decided each position; -1 where none did (prompt, behind the end).
        steps: `[batch]`, steps of each sequence.
        projected: `[batch]`, rows projected, summed over steps and layers.
        updates: `[batch]`, layers that recomputed every row, summed over steps.
        layers: of the model.
    """

    tokens: Int[Tensor, "batch sequence"]
    decided_at: Int[Tensor, "batch sequence"]
    steps: Int[Tensor, " batch"]
    projected: Int[Tensor, " batch"]
    updates: Int[Tensor, " batch"]
    layers: int

    @property
    def rows_fraction(self) -> float:
        """Rows projected / (steps x layers x sequence): 1 without a cache."""
        return float(self.projected.sum() / (self.steps.sum() * self.layers * self.tokens.shape[1]))

    @property
    def update_fraction(self) -> float:
        """Layer updates / (steps x layers): 1 without a cache."""
        return float(self.updates.sum() / (self.steps.sum() * self.layers))


Watch = Callable[[Canvas], None]
After = Callable[
    [Canvas, Float[Tensor, "batch window vocabulary"], Int[Tensor, "batch window"], Cost], None
]


@torch.no_grad()
def generate(
    model: Denoiser,
    tokens: Int[Tensor, "batch sequence"],
    cache: DiffusionCache | None = None,
    *,
    threshold: float = 0.9,
    before_step: Watch | None = None,
    after_step: After | None = None,
) -> Generation:
    """Fills in the masks of `tokens`.

    Args:
        model: `MaskedDiffusionLM`, or a transformers model through `adapt` or `load_denoiser`.
        tokens: prompts followed by masks (`model.mask_token_id`); all of one length, prompts may differ in length. Positions
            in front of the first mask are the prompt; tokens behind it are kept as given (infilling).
        cache: the policy; `NoCache()` when None.
        threshold: epsilon of confidence-parallel decoding.
        before_step: called with the canvas before each step (instruments that need to know what is decided).
        after_step: called with the canvas, the window's logits and positions, and the step's cost.

    Returns:
        Tokens, the step that decided each of them, and the counters of cost.

    Raises:
        InputError: no masks, or a model that is block-causal (its prefix is cached exactly already).

    Cost: `steps x layers x rows` projections; the states of all layers stay in memory (see `cache.diffusion.step`).
    """
    policy = NoCache() if cache is None else cache
    refuse_block_causal(model)
    if not threshold > 0:
        raise InputError.of("threshold", given=threshold, expected="above 0")
    masked = tokens == model.mask_token_id
    if not bool(masked.any(1).all()):
        raise InputError.of(
            "tokens",
            given=tuple(tokens.shape),
            expected=f"to hold at least one mask (token {model.mask_token_id}) in every sequence",
        )
    batch, length = tokens.shape
    tokens, still = tokens.clone(), masked.clone()
    starts = masked.to(torch.uint8).argmax(1)
    decided_at = torch.full_like(tokens, -1)
    committed = torch.zeros_like(masked)
    steps, projected, updates = (torch.zeros_like(starts) for _ in range(3))
    layers = len(model.blocks)
    states = [LayerStates(batch, length, policy.tracked, tokens.device) for _ in range(layers)]
    places = torch.arange(length, device=tokens.device)

    while bool(still.any()):
        alive = still.any(1).nonzero()[:, 0]
        canvas = Canvas(
            tokens[alive],
            still[alive],
            tokens[alive] != model.mask_token_id,
            committed[alive],
            starts[alive],
            steps[alive],
            alive,
        )
        if before_step is not None:
            before_step(canvas)
        logits, window, real, cost = denoise(model, canvas, policy, states)
        if after_step is not None:
            after_step(canvas, logits, window, cost)
        chosen, sure = confident(logits, real, threshold, model.mask_token_id)
        new = torch.zeros_like(canvas.open)
        values = canvas.tokens.clone()
        sequence, column = sure.nonzero(as_tuple=True)
        position = window[sequence, column]
        new[sequence, position] = True
        values[sequence, position] = chosen[sequence, column]
        tokens[alive], committed[alive] = values, new
        decided_at[alive] = torch.where(new, canvas.step[:, None], decided_at[alive])
        end = first_end(values, decided_at[alive] >= 0, model.eos_token_id)
        still[alive] &= ~new & (places < end[:, None])
        steps[alive] += 1
        projected[alive] += cost.projected
        updates[alive] += layers - cost.restored.clamp(min=0)

    end = first_end(tokens, decided_at >= 0, model.eos_token_id)[:, None]
    behind = (places > end) & masked
    if model.eos_token_id is not None:
        tokens = tokens.masked_fill(behind, model.eos_token_id)
    return Generation(tokens, decided_at.masked_fill(behind, -1), steps, projected, updates, layers)


def refuse_block_causal(model: object) -> None:
    """Raises `InputError` for models that attend block-causally."""
    block = getattr(model, "block_causal", None)
    if block:
        raise InputError(
            f"{type(model).__name__} attends block by block (blocks of {block} tokens, nothing looks ahead of its block), so the "
            "keys and values of finished blocks never change and an ordinary KV cache holds them exactly; the caches for "
            "diffusion models would only add steps there"
        )
