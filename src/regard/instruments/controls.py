"""Random sets of heads to compare named heads with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from regard._errors import InputError
from regard.coordinates import Head
from regard.instruments.results import SiteKey


def layer_matched_draws(
    heads: Sequence[Head], grid: Mapping[SiteKey, int], draws: int, seed: int = 0
) -> list[tuple[Head, ...]]:
    """Random sets of heads with as many heads in each layer as `heads` has, and none of `heads`.

    Where a layer has too few other heads, the missing ones come from the nearest layers of the same stack.

    >>> layer_matched_draws([Head(0, 0), Head(0, 1), Head(1, 0)], {("", 0): 3, ("", 1): 3}, draws=1)
    [(L0H2, L1H1, L1H2)]

    Raises:
        InputError: the stack has fewer other heads than named ones.
    """
    generator = torch.Generator().manual_seed(seed)
    return [_one_draw(heads, grid, generator) for _ in range(draws)]


def _one_draw(
    heads: Sequence[Head], grid: Mapping[SiteKey, int], generator: torch.Generator
) -> tuple[Head, ...]:
    free = {key: [Head(key[1], h, key[0]) for h in range(count)] for key, count in grid.items()}
    for head in heads:
        free[head.key].remove(head)
    wanted = Counter(head.key for head in heads)
    drawn: list[Head] = []
    short: list[SiteKey] = []
    for key, count in wanted.items():
        order = torch.randperm(len(free[key]), generator=generator).tolist()[:count]
        drawn += [free[key][i] for i in order]
        free[key] = [head for i, head in enumerate(free[key]) if i not in order]
        short += [key] * (count - len(order))
    for stack, layer in short:
        near = sorted(
            (k for k in free if k[0] == stack and free[k]), key=lambda k: abs(k[1] - layer)
        )
        if not near:
            raise InputError(
                f"{len(heads)} heads are named, more than the {len(heads) - len(short)} others that could be drawn "
                "as controls; name fewer heads"
            )
        pick = int(torch.randint(len(free[near[0]]), (1,), generator=generator))
        drawn.append(free[near[0]].pop(pick))
    return tuple(sorted(drawn))


def free_draws(
    heads: Sequence[Head], grid: Mapping[SiteKey, int], draws: int, seed: int = 0
) -> list[tuple[Head, ...]]:
    """Random sets of as many heads from anywhere in the model, none of `heads`."""
    others = [Head(n, h, s) for (s, n), count in grid.items() for h in range(count)]
    others = [head for head in others if head not in set(heads)]
    if len(others) < len(heads):
        raise InputError(
            f"{len(heads)} heads are named, but only {len(others)} others could be drawn as controls"
        )
    generator = torch.Generator().manual_seed(seed)
    return [
        tuple(
            sorted(
                others[i]
                for i in torch.randperm(len(others), generator=generator)[: len(heads)].tolist()
            )
        )
        for _ in range(draws)
    ]
