"""How many associations a Hebbian memory holds: cross-talk, chains of memories, and redundant heads, on random codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize


def random_codes(*shape: int, generator: torch.Generator) -> Tensor:
    """Random directions of norm 1 along the last axis, in float64."""
    return normalize(torch.randn(*shape, generator=generator).double(), dim=-1)


@dataclass(frozen=True, slots=True)
class CrossTalk:
    """Reading back n associations, a number a draw.

    Attributes:
        error: mean squared error of a reading.
        accuracy: share of readings whose nearest stored value is the right one.
    """

    error: Float[Tensor, " draws"]
    accuracy: Float[Tensor, " draws"]


def cross_talk(
    items: int, dimension: int, draws: int, *, heads: int = 1, generator: torch.Generator
) -> CrossTalk:
    """Stores n random pairs in `heads` memories, each with its own random keys, and reads the average of the heads.

    Cost: O(draws x heads x items^2 x dimension).
    """
    values = random_codes(draws, items, dimension, generator=generator)
    read = torch.zeros_like(values)
    for _ in range(heads):
        keys = random_codes(draws, items, dimension, generator=generator)
        read += keys @ (keys.mT @ values) / heads  # row i: M k_i with M = sum_j v_j k_j^T
    return _graded(read, values)


def redundant_heads(
    items: int, dimension: int, draws: int, heads: int, *, generator: torch.Generator
) -> tuple[Float[Tensor, " draws"], Float[Tensor, " draws"]]:
    """How often one head's clean-up fails, and how often more than half of the heads fail on the same item."""
    values = random_codes(draws, items, dimension, generator=generator)
    wrong = torch.zeros(draws, items)
    for _ in range(heads):
        keys = random_codes(draws, items, dimension, generator=generator)
        wrong += nearest(keys @ (keys.mT @ values), values) != torch.arange(items)
    return (wrong / heads).mean(1), (wrong > heads / 2).double().mean(1)


def projected_heads(
    items: int, dimension: int, draws: int, heads: int, *, generator: torch.Generator
) -> CrossTalk:
    """As `cross_talk`, but every head sees a random projection of the same keys."""
    values = random_codes(draws, items, dimension, generator=generator)
    keys = random_codes(draws, items, dimension, generator=generator)
    read = torch.zeros_like(values)
    for _ in range(heads):
        random = torch.randn(draws, dimension, dimension, generator=generator).double()
        seen = keys @ random.mT / dimension**0.5
        read += seen @ (seen.mT @ values) / heads
    return _graded(read, values)


def first_overload(
    dimension: int, draws: int, *, generator: torch.Generator
) -> Float[Tensor, " draws"]:
    """The first n at which some item's cross-talk could reach its signal: `max_i sum_{j != i} |k_i . k_j| >= 1`.

    Cost: O(draws x dimension^2), since about sqrt(dimension) keys are enough.
    """
    most = int(4 * dimension**0.5) + 8
    keys = random_codes(draws, most, dimension, generator=generator)
    overlaps = (keys @ keys.mT).abs()
    overlaps.diagonal(dim1=-2, dim2=-1).zero_()
    sums = overlaps.cumsum(-1)  # [draws, i, n]: cross-talk of item i when items 0 .. n are stored
    stored = torch.ones(most, most, dtype=torch.bool).triu()  # i <= n
    reached = (sums.masked_fill(~stored, 0).amax(1) >= 1).double()
    return 1 + reached.argmax(-1).double()


def chain_errors(
    items: int, dimension: int, depth: int, draws: int, *, generator: torch.Generator
) -> Float[Tensor, "draws depths"]:
    """Mean squared error after each memory of a chain v^(0) -> v^(1) -> ..., each read with what the last one gave."""
    now = random_codes(draws, items, dimension, generator=generator)
    read, errors = now, []
    for _ in range(depth):
        after = random_codes(draws, items, dimension, generator=generator)
        read = read @ (now.mT @ after)
        errors.append((read - after).square().sum(-1).mean(-1))
        now = after
    return torch.stack(errors, -1)


def cleaned_chain(
    items: int, dimension: int, depth: int, draws: int, *, generator: torch.Generator
) -> Float[Tensor, "draws depths"]:
    """Share of items still right after each memory, when every reading is replaced by the nearest stored value."""
    now = random_codes(draws, items, dimension, generator=generator)
    at = torch.arange(items).expand(draws, -1)
    right = []
    for _ in range(depth):
        after = random_codes(draws, items, dimension, generator=generator)
        read = now.gather(1, at[..., None].expand(-1, -1, dimension)) @ (now.mT @ after)
        at = nearest(read, after)
        right.append((at == torch.arange(items)).double().mean(-1))
        now = after
    return torch.stack(right, -1)


def nearest(
    read: Float[Tensor, "draws items dim"], values: Float[Tensor, "draws stored dim"]
) -> Tensor:
    """The stored value (of norm 1) that each reading is nearest to."""
    return (read @ values.mT).argmax(-1)


def _graded(read: Tensor, values: Tensor) -> CrossTalk:
    right = nearest(read, values) == torch.arange(values.shape[1])
    return CrossTalk((read - values).square().sum(-1).mean(-1), right.double().mean(-1))
