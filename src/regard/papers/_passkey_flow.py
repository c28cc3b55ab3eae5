"""A passkey task whose answer has to travel: small decoders trained from scratch under a sparse pattern, and probes of them.

A text is noise symbols with one key symbol at a random place; at every later token the model has to name the key. What a
token can know is bounded by the pattern's reach, so accuracy by distance shows how far information really travels. Losses at
all later tokens (not the last alone) teach the relays on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from regard.attach import attach
from regard.sparse import Pattern

KEYS, NOISE = 16, 32


@dataclass(frozen=True)
class Setting:
    """One training run: `tokens` in blocks of `block`, `layers` deep."""

    tokens: int = 64
    block: int = 2
    layers: int = 5
    width: int = 64
    heads: int = 4
    batch: int = 32
    steps: int = 300
    rate: float = 2e-3
    samples: int = 4096

    @property
    def blocks(self) -> int:
        return self.tokens // self.block


def texts(
    setting: Setting, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """`[count, tokens]` symbols, and the place and the symbol of each key; the last token is never the key."""
    ids = torch.randint(KEYS, KEYS + NOISE, (count, setting.tokens), generator=generator)
    place = torch.randint(0, setting.tokens - 1, (count,), generator=generator)
    key = torch.randint(0, KEYS, (count,), generator=generator)
    ids[torch.arange(count), place] = key
    return ids, place, key


def decoder(setting: Setting) -> Any:
    """A small Llama with rotary positions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=KEYS + NOISE,
        hidden_size=setting.width,
        intermediate_size=2 * setting.width,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.heads,
        max_position_embeddings=setting.tokens,
    )
    return LlamaForCausalLM(config)


def train(setting: Setting, patterns: Sequence[Pattern], seed: int) -> dict[str, Any]:
    """Trains one model and returns its loss by step, its accuracy by block distance and its probes by layer and distance."""
    torch.manual_seed(seed)
    model, generator = decoder(setting), torch.Generator().manual_seed(seed + 1)
    optimiser = torch.optim.AdamW(model.parameters(), lr=setting.rate, weight_decay=0.01)
    column, losses = torch.arange(setting.tokens), []
    with attach(model, *patterns):
        for step in range(setting.steps):
            warm = min(1.0, (step + 1) / 50)
            optimiser.param_groups[0]["lr"] = setting.rate * warm * (1 - step / setting.steps)
            ids, place, key = texts(setting, setting.batch, generator)
            logits = model(ids).logits[..., :KEYS]
            asked = column >= place[:, None]
            loss = cross_entropy(logits[asked], key[:, None].expand(asked.shape)[asked])
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.item())
        model.eval()
        return {"losses": losses, **evaluate(model, setting, seed)}


@torch.no_grad()
def evaluate(model: Any, setting: Setting, seed: int) -> dict[str, Any]:
    """Accuracy at the last token by block distance, and of a linear probe on it after each layer (half to fit, half to test)."""
    ids, place, key = texts(setting, setting.samples, torch.Generator().manual_seed(seed + 2))
    hidden, right = [], []
    for part in ids.split(256):
        output = model(part, output_hidden_states=True)
        hidden.append(torch.stack([state[:, -1] for state in output.hidden_states], 1))
        right.append(output.logits[:, -1, :KEYS].argmax(-1))
    distance = setting.blocks - 1 - place // setting.block
    accuracy = by_distance((torch.cat(right) == key).double(), distance, setting.blocks)
    half = len(ids) // 2
    probes = []
    for state in torch.cat(hidden).double().unbind(1):
        guessed = linear_probe(state[:half], key[:half], state[half:])
        probes.append(
            by_distance((guessed == key[half:]).double(), distance[half:], setting.blocks)
        )
    return {"accuracy": accuracy.tolist(), "probes": [row.tolist() for row in probes]}


def linear_probe(states: Tensor, key: Tensor, others: Tensor, ridge: float = 1e-2) -> Tensor:
    """Keys guessed from `others` by ridge regression of one-hot keys on `states`."""
    mean, scale = states.mean(0), states.std(0) + 1e-6
    known = torch.nn.functional.pad((states - mean) / scale, (0, 1), value=1.0)
    asked = torch.nn.functional.pad((others - mean) / scale, (0, 1), value=1.0)
    gram = known.T @ known + ridge * len(known) * torch.eye(known.shape[1], dtype=known.dtype)
    return (asked @ torch.linalg.solve(gram, known.T @ one_hot(key, KEYS).to(known.dtype))).argmax(
        -1
    )


def by_distance(values: Tensor, distance: Tensor, count: int) -> Tensor:
    """The mean value at each distance 0 .. count - 1 (0 where there is none)."""
    sums = torch.zeros(count, dtype=values.dtype).index_add_(0, distance, values)
    return sums / torch.bincount(distance, minlength=count).clamp_min(1)
