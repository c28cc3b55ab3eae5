"""The selective scan of Mamba: a memory whose decay and input share one step that the token chooses.

    h_t = e^{Delta_t a} h_{t-1} + (Delta_t x_t) B_t^T,      y_t = h_t C_t,      h [channels, state],  a < 0

Every channel has its own step Delta, every entry of its state its own rate a; B and C are the same for all channels.

Tokens are cut into blocks. All blocks run side by side from empty states, one token of each at a time; what they leave is joined
by `linear_recurrence`; and the state before each block then fades through it, again one token of each block at a time. Decays
are multiplied and never divided, so that one that underflows does no harm.

Source: Gu and Dao 2023, "Mamba", arXiv 2312.00752.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from regard._errors import InputError
from regard.ops.linear_recurrence import linear_recurrence

BLOCK = 16
"""Tokens of a block; any number gives the same outputs."""
ROOM = 1 << 17
"""Numbers of the states that are worked on together: few enough to stay in the processor's cache."""


def selective_scan(
    inputs: Float[Tensor, "batch tokens channels"],
    step: Float[Tensor, "batch tokens channels"],
    rate: Float[Tensor, "*rows channels state"],
    write: Float[Tensor, "batch tokens state"],
    read: Float[Tensor, "batch tokens state"],
    initial: Float[Tensor, "batch channels state"] | None = None,
) -> tuple[Float[Tensor, "batch tokens channels"], Float[Tensor, "batch channels state"]]:
    """The outputs, and the state after the last token.

    Args:
        inputs: x.
        step: Delta; a step of 0 neither fades nor writes.
        rate: a, the same for the whole batch or one for each of its rows.
        write: B.
        read: C.
        initial: the state before the first token, zeros by default.

    Cost: about 8 multiplications and an exponential for each of the channels x state numbers of a token's state. Beside inputs
    and outputs, the decays of `BLOCK` x `ROOM` numbers are held; decays and states of all tokens when differentiated.

    Raises:
        InputError: no tokens.

    >>> ones = torch.ones(1, 3, 1)
    >>> outputs, state = selective_scan(ones, ones, -torch.ones(1, 1), ones, ones)  # 1, then 1 + 1/e, ...
    >>> [round(y, 3) for y in outputs.flatten().tolist()], state.shape
    ([1.0, 1.368, 1.503], torch.Size([1, 1, 1]))
    """
    batch, tokens, channels = inputs.shape
    if tokens == 0:
        raise InputError.of("inputs", given=tuple(inputs.shape), expected="of 1 or more tokens")
    block = min(BLOCK, tokens)
    state = rate.shape[-1]
    together = block * max(1, ROOM // (batch * channels * state))
    # powers of 2 take half the time of powers of e; [batch or 1, 1, state, channels]
    doubling = (rate * math.log2(math.e)).mT.reshape(-1, 1, state, channels)
    last = inputs.new_zeros(batch, state, channels) if initial is None else initial.mT
    outputs = []
    for parts in zip(
        *(part.split(together, 1) for part in (step * inputs, step, write, read)), strict=True
    ):
        output, last = _blocks(*parts, rate=doubling, before=last, block=block)
        outputs.append(output)
    return torch.cat(outputs, 1), last.mT


def _blocks(
    given: Tensor,
    step: Tensor,
    write: Tensor,
    read: Tensor,
    *,
    rate: Tensor,
    before: Tensor,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Some blocks at once, the last filled up with steps of 0; states are `[batch, blocks, state, channels]`."""
    tokens = given.shape[1]
    given, step, write, read = (
        pad(part, (0, 0, 0, -tokens % block)).unflatten(1, (-1, block))
        for part in (given, step, write, read)
    )  # [batch, blocks, place in the block, ...]
    state, fades, own = None, [], []
    for i in range(block):
        fade = (step[:, :, i, None] * rate).exp2()
        written = write[:, :, i, :, None] * given[:, :, i, None]
        state = written if state is None else torch.addcmul(written, fade, state)
        fades.append(fade)
        own.append(read[:, :, i, None] @ state)
    assert state is not None
    whole = (step.sum(2)[:, :, None] * rate).exp2()
    ends = linear_recurrence(whole.flatten(2), state.flatten(2), before.flatten(1)).view_as(state)
    carried, outputs = torch.cat([before[:, None], ends[:, :-1]], 1), []
    for i in range(block):
        carried = fades[i] * carried
        outputs.append(own[i] + read[:, :, i, None] @ carried)
    return torch.cat(outputs, 2).flatten(1, 2)[:, :tokens], ends[:, -1]
