"""A small masked-diffusion language model: a bidirectional transformer that fills in masks (LLaDA, arXiv 2502.09992).

Training hides each answer token with probability t, drawn anew for each sample, and asks for the hidden ones:

    loss = E_t [ 1 / (t * L) * sum over masked tokens of cross-entropy ],   t ~ U(0.001, 1),  L answer tokens

Generation starts from an answer made of masks and commits the tokens that it is sure of, step by step
(`regard.cache.diffusion`). The blocks are pre-norm with RMSNorm, rotary positions and SwiGLU, their attention goes through
`regard`'s engine, so every instrument attaches. `MaskedDiffusionLM.from_pretrained()` loads the weights that ship with the
package; the commands that trained them are in `regard.models.language.training`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard._errors import InputError, ModelError
from regard.cache.diffusion import DiffusionCache, Generation, generate
from regard.models.language.blocks import Block, MaskedDiffusionConfig
from regard.models.language.char_tasks import (
    LENGTH,
    Samples,
    answer,
    decode,
    encode,
    mixed_samples,
    right_parts,
)

SHIPPED = Path(__file__).parent / "data"


class MaskedDiffusionLM(nn.Module):
    """A masked-diffusion language model over a small vocabulary.

    Cost of one forward: that of a transformer of the same shape over all tokens; there is no causal mask and so no
    incremental decoding. `generate(cache=...)` is where steps become cheaper.
    """

    def __init__(self, config: MaskedDiffusionConfig | None = None) -> None:
        super().__init__()
        self.config = config or MaskedDiffusionConfig()
        self.embedding = nn.Embedding(self.config.vocabulary, self.config.width)
        self.layers = nn.ModuleList(Block(self.config) for _ in range(self.config.layers))
        self.norm = nn.RMSNorm(self.config.width, eps=1e-6)
        self.head = nn.Linear(self.config.width, self.config.vocabulary, bias=False)
        self.apply(self._initialise)
        for block in self.blocks:
            for linear in (block.attention.o_proj, block.mlp.down_proj):
                nn.init.normal_(linear.weight, std=0.02 / (2 * self.config.layers) ** 0.5)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    @property
    def mask_token_id(self) -> int:
        return self.config.mask_token_id

    @property
    def eos_token_id(self) -> int:
        return self.config.eos_token_id

    @property
    def shift(self) -> int:
        return 0

    @property
    def blocks(self) -> list[Any]:
        return list(self.layers)

    def embed(self, tokens: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch rows width"]:
        return self.embedding(tokens)

    def logits(
        self, hidden: Float[Tensor, "batch rows width"]
    ) -> Float[Tensor, "batch rows vocabulary"]:
        return self.head(self.norm(hidden))

    def forward(
        self, tokens: Int[Tensor, "batch sequence"]
    ) -> Float[Tensor, "batch sequence vocabulary"]:
        """Logits of every token given all the others, masks included."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden = self.embed(tokens)
        for block in self.layers:
            hidden = block(hidden, positions)
        return self.logits(hidden)

    def fit(
        self, draw: Callable[[int, int], Samples] = mixed_samples, **settings: Any
    ) -> list[float]:
        """Trains on `draw(count, seed)` samples, strings and prose by default; see `training.fit` for the settings."""
        from regard.models.language.training import fit

        return fit(self, draw, **settings)

    def generate(
        self,
        prompts: Sequence[str],
        cache: DiffusionCache | None = None,
        *,
        length: int = LENGTH,
        threshold: float = 0.9,
        before_step: Any = None,
        after_step: Any = None,
    ) -> Generation:
        """Answers to prompts over `char_tasks.CHARACTERS`, decoded together.

        Args:
            prompts: texts; each is followed by masks up to `length` tokens.
            cache: a policy of `regard.cache.diffusion`; None recomputes everything in every step.

        Returns:
            A `Generation`; `answers(generation, prompts)` gives the texts.

        Raises:
            InputError: a prompt that is empty, too long, or has a character outside the vocabulary.
        """
        return generate(
            self,
            self.canvas(prompts, length),
            cache,
            threshold=threshold,
            before_step=before_step,
            after_step=after_step,
        )

    def canvas(self, prompts: Sequence[str], length: int = LENGTH) -> Int[Tensor, "batch sequence"]:
        """Token ids of prompts, each followed by masks up to `length`."""
        tokens = torch.full((len(prompts), length), self.mask_token_id)
        for row, prompt in enumerate(prompts):
            ids = encode(prompt)
            if not 0 < len(ids) < length:
                raise InputError.of(
                    "prompt", given=prompt, expected=f"of 1 to {length - 1} characters"
                )
            tokens[row, : len(ids)] = torch.tensor(ids)
        return tokens.to(self.head.weight.device)

    def evaluate(
        self, prompts: Sequence[str], cache: DiffusionCache | None = None, *, threshold: float = 0.9
    ) -> dict[str, float]:
        """Exact answers to task prompts and what they cost.

        Returns:
            `exact` (share of answers that are right), `parts` (share of their three parts), `characters` (share of right
            characters), `steps` (mean), `rows` (share of rows projected, 1 without a cache).
        """
        generation = self.generate(prompts, cache, threshold=threshold)
        right, parts, same, total = 0, 0.0, 0, 0
        for prompt, given in zip(prompts, answers(generation, prompts), strict=True):
            wanted = answer(prompt)
            right += given == wanted
            parts += right_parts(given, prompt)
            same += sum(a == b for a, b in zip(given, wanted, strict=False))
            total += max(len(given), len(wanted))
        return {
            "exact": right / len(prompts),
            "parts": parts / len(prompts),
            "characters": same / total,
            "steps": float(generation.steps.float().mean()),
            "rows": generation.rows_fraction,
        }

    def save(self, directory: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Writes `config.json` and `model.safetensors`, each in one step; `dtype` rounds the weights (float16)."""
        from safetensors.torch import save_file

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: tensor.detach().to(dtype or tensor.dtype)
            for name, tensor in self.state_dict().items()
        }
        staged = folder / ".model.safetensors.partial"
        save_file(weights, staged, metadata={"format": "pt"})
        os.chmod(staged, 0o644)
        os.replace(staged, folder / "model.safetensors")
        staged = folder / ".config.json.partial"
        staged.write_text(json.dumps(dataclasses.asdict(self.config), indent=1) + "\n")
        os.replace(staged, folder / "config.json")

    @classmethod
    def from_pretrained(cls, directory: str | Path = SHIPPED) -> MaskedDiffusionLM:
        """The model saved in a directory (the shipped one by default), in float32 and eval mode.

        Raises:
            ModelError: the directory lacks a file, or the weights do not fit the configuration.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(directory)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise ModelError(
                    f"{folder} has no {name}; save a model there with MaskedDiffusionLM.save"
                )
        try:
            config = MaskedDiffusionConfig(**json.loads((folder / "config.json").read_text()))
            weights = load_file(folder / "model.safetensors")
        except (TypeError, ValueError, SafetensorError) as error:
            raise ModelError(f"{folder} does not hold a masked-diffusion model: {error}") from error
        model = cls(config)
        try:
            model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        except RuntimeError as error:
            raise ModelError(
                f"the weights in {folder} do not fit its config.json: {error}"
            ) from error
        return model.eval()


def answers(generation: Generation, prompts: Sequence[str]) -> list[str]:
    """What was decoded behind each prompt, as text."""
    return [
        decode(tokens[len(prompt) :])
        for tokens, prompt in zip(generation.tokens, prompts, strict=True)
    ]
