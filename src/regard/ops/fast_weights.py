"""Fast weights: a memory whose weights are what it remembers, written by gradient steps while a sequence is read.

The memory is an MLP without biases, M(k) = W_L s(W_{L-1} .. s(W_1 k)) with s = SiLU; one layer is a matrix. With a step size
theta, a momentum eta and a decay alpha for each token t,

    u_t = gradient of |M(k_t) - v_t|^2 in W, at the weights at the start of t's chunk
    S_t = eta_t S_{t-1} - theta_t u_t                       surprise, which lasts
    W_t = (1 - alpha_t) W_{t-1} + S_t                       forgetting
    y_t = M(q_t) with the weights W_t                       reading comes after writing

The loss is a sum over dimensions and its factor 2 stays. In every layer u_t is an outer product e_t h_t^T (error behind it,
input before it) and the recurrences are linear, so a chunk is a few matrix products, with no weights of single tokens:

    W_t = A_t W_0 + B_t S_0 - sum_{s <= t} C_ts e_s h_s^T,        C = T(1 - alpha) T(eta) diag(theta),
    T(g)_ts = prod_{s < r <= t} g_r,    A_t = prod_{r <= t} (1 - alpha_r),    B = T(1 - alpha) prod_{r <= t} eta_r.

Source: Behrouz, Zhong and Mirrokni 2025, "Titans: Learning to Memorize at Test Time" (arXiv 2501.00663), sections 3.1 and 3.2.
Products of outer products instead of scans over weights: the dual form of Sun et al. 2024 (arXiv 2407.04620), with momentum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import silu

from regard._errors import InputError, at_least_one
from regard.ops._slots import lay_out

Factors = list[tuple[Tensor, Tensor]]
"""For each layer the error behind it and the input before it; a token's gradient is their outer product."""


@dataclass(frozen=True, slots=True)
class FastWeights:
    """What the memory is after the tokens so far; every tensor has the batch first.

    Attributes:
        weights: of each layer, `[batch, heads, out, in]`.
        surprise: the momentum S of each layer, of the same shapes; not kept by calls without momentum.
        start: the weights at the start of the unfinished chunk.
        count: tokens of each row in that chunk, `[batch]`.
    """

    weights: tuple[Tensor, ...]
    surprise: tuple[Tensor, ...]
    start: tuple[Tensor, ...]
    count: Int[Tensor, "batch"]

    @classmethod
    def begin(cls, weights: Sequence[Float[Tensor, "heads _ _"]], batch: int) -> FastWeights:
        """The memory before the first token, the same in all rows."""
        mine = tuple(weight.expand(batch, *weight.shape) for weight in weights)
        nothing = tuple(torch.zeros_like(weight) for weight in mine)
        count = torch.zeros(batch, dtype=torch.long, device=weights[0].device)
        return cls(mine, nothing, mine, count)


def fast_weight_scan(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
    step: Float[Tensor, "batch heads tokens"],
    memory: FastWeights,
    *,
    momentum: Float[Tensor, "batch heads tokens"] | None = None,
    decay: Float[Tensor, "batch heads tokens"] | None = None,
    chunk: int = 16,
    clip: float | None = None,
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Float[Tensor, "batch heads tokens value_dim"], FastWeights]:
    """Writes and reads the tokens in order; what was read, and the memory afterwards.

    Args:
        query: asked of the memory once its own token is written.
        key: and `value`: what is written.
        step: theta, 0 or more. With keys of norm 1, a matrix and a chunk of 1, the memory diverges at 1 and above.
        memory: of earlier tokens. Any split of a sequence into calls gives the same.
        momentum: eta in [0, 1]; None for none.
        decay: alpha in [0, 1]; None for none.
        chunk: tokens whose gradients are taken at the same weights.
        clip: a bound on a token's gradient, see `soft_clamp`.
        valid: False at tokens that are skipped: they change nothing and read zeros.

    Cost: for each token about 8 multiplications a weight, and 3 chunk x (in + out) a layer; memory of one set of weights a chunk.

    Raises:
        InputError: layers that do not fit each other or the tokens; a chunk or clip out of range.

    >>> memory = FastWeights.begin([torch.zeros(1, 3, 3)], batch=1)
    >>> key = torch.eye(3).view(1, 1, 3, 3)
    >>> read, memory = fast_weight_scan(key, key, 2 * key, torch.full((1, 1, 3), 0.5), memory)
    >>> read[0, 0].diagonal()  # a step of 1/2 writes a key of norm 1 at once
    tensor([2., 2., 2.])
    """
    _check(key, value, memory, chunk, clip)
    tokens = key.shape[2]
    phase = torch.zeros_like(memory.count) if tokens == 1 else memory.count
    slots = lay_out(valid, phase, chunk, tokens)
    query, key, value, step = (slots.gather(part, 2) for part in (query, key, value, step))
    momentum = None if momentum is None else slots.gather(momentum, 2)
    decay = None if decay is None else slots.gather(decay, 2)
    sizes = [last - first for first, last in slots.parts]

    def parts(states: Tensor | None) -> Sequence[Tensor | None]:
        """One view a part: slices in the loop would each cost a gradient of the whole length."""
        return [None] * len(sizes) if states is None else states.split(sizes, 2)

    filled = parts(None if slots.filled is None else slots.filled[:, None])
    read = []
    for asked, held, wanted, rate, kept, forgotten, here in zip(
        *(query.split(sizes, 2), key.split(sizes, 2), value.split(sizes, 2), step.split(sizes, 2)),
        *(parts(momentum), parts(decay), filled),
        strict=True,
    ):
        gradient = inner_gradient(memory.start, held, wanted)
        if clip is not None:
            gradient = soft_clamp(gradient, clip)
        recurrence = _recurrence(rate, kept, forgotten, here)
        out, weights, surprise = _chunk(memory, asked, gradient, recurrence)
        added = held.shape[2] if here is None else here[:, 0].sum(1)
        memory = _advance(memory, weights, surprise, memory.count + added, chunk)
        read.append(out)
    out = slots.scatter(torch.cat(read, 2), 2)
    return out if valid is None else out * valid[:, None, :, None], memory


def read_memory(
    weights: Sequence[Float[Tensor, "batch heads _ _"]],
    query: Float[Tensor, "batch heads tokens dim"],
) -> Float[Tensor, "batch heads tokens _"]:
    """M(q), the same weights for all tokens of a row and head.

    >>> read_memory([2 * torch.eye(3).view(1, 1, 3, 3)], torch.ones(1, 1, 1, 3))
    tensor([[[[2., 2., 2.]]]])
    """
    hidden = query
    for weight in weights[:-1]:
        hidden = silu(hidden @ weight.mT)
    return hidden @ weights[-1].mT


def inner_gradient(
    weights: Sequence[Float[Tensor, "batch heads _ _"]],
    key: Float[Tensor, "batch heads tokens dim"],
    value: Float[Tensor, "batch heads tokens value_dim"],
) -> Factors:
    """Each token's gradient of |M(k) - v|^2, layer by layer, as the error and the input whose outer product it is.

    Written out, so that an outer loss differentiates through it once more.

    Cost: 4 multiplications a weight and token.

    >>> (error, before), = inner_gradient([torch.zeros(1, 1, 2, 2)], torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    >>> error, before
    (tensor([[[[-2., -2.]]]]), tensor([[[[1., 1.]]]]))
    """
    inputs, sums = [key], []
    for weight in weights[:-1]:
        sums.append(inputs[-1] @ weight.mT)
        inputs.append(silu(sums[-1]))
    error = 2 * (inputs[-1] @ weights[-1].mT - value)
    factors = [(error, inputs[-1])]
    for layer in range(len(weights) - 2, -1, -1):
        gate = torch.sigmoid(sums[layer])
        slope = gate * (1 + sums[layer] * (1 - gate))
        error = (error @ weights[layer + 1]) * slope
        factors.append((error, inputs[layer]))
    return factors[::-1]


def soft_clamp(gradient: Factors, most: float) -> Factors:
    """Each token's gradient shortened from norm n to `most` tanh(n / most), over all layers together.

    Small gradients stay as they are; a memory with decay then stays bounded whatever it is told.

    >>> (error, _), = soft_clamp([(torch.tensor([[30.0, 40.0]]), torch.tensor([[1.0, 0.0]]))], 5.0)
    >>> error
    tensor([[3., 4.]])
    """
    squares = [error.square().sum(-1) * before.square().sum(-1) for error, before in gradient]
    norm = (torch.stack(squares).sum(0) + 1e-12).sqrt()[..., None]
    factor = most * torch.tanh(norm / most) / norm
    return [(error * factor, before) for error, before in gradient]


def decay_products(
    gates: Float[Tensor, "*batch tokens"],
) -> Float[Tensor, "*batch tokens tokens"]:
    """T_ts = prod of gates r with s < r <= t, 1 on the diagonal and 0 above it; exact where gates are 0.

    >>> decay_products(torch.tensor([0.5, 0.5, 0.2]))
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 1.0000, 0.0000],
            [0.1000, 0.2000, 1.0000]])
    """
    tokens = gates.shape[-1]
    below = torch.ones(tokens, tokens, dtype=torch.bool, device=gates.device).tril(-1)
    return torch.where(below, gates[..., :, None], 1).cumprod(-2).tril()


@dataclass(frozen=True, slots=True)
class _Recurrence:
    """The coefficients of a chunk: A, C and B of the module's equations, and what S is at its end."""

    kept: Tensor
    mixed: Tensor
    moved: Tensor | None = None
    surprise_kept: Tensor | None = None
    surprise_added: Tensor | None = None


def _recurrence(
    step: Tensor, momentum: Tensor | None, decay: Tensor | None, filled: Tensor | None
) -> _Recurrence:
    """Tokens that are not `filled` pass on both the weights and the surprise, and do not add the one to the other."""
    if filled is not None:
        step = step * filled
        momentum = None if momentum is None else torch.where(filled, momentum, 1)
        decay = None if decay is None else decay * filled
    remaining = torch.ones_like(step) if decay is None else 1 - decay
    forget = decay_products(remaining)
    if momentum is None:
        return _Recurrence(remaining.cumprod(-1), forget * step[..., None, :])
    last = decay_products(momentum)
    lasting = momentum.cumprod(-1)
    if filled is not None:
        forget = forget * filled[..., None, :]
    return _Recurrence(
        remaining.cumprod(-1),
        (forget @ last) * step[..., None, :],
        (forget @ lasting[..., None])[..., 0],
        lasting[..., -1],
        last[..., -1, :] * step,
    )


def _chunk(
    memory: FastWeights, query: Tensor, gradient: Factors, by: _Recurrence
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    hidden, weights, surprises = query, [], []
    layers = zip(memory.weights, memory.surprise, gradient, strict=True)
    for layer, (weight, surprise, (error, before)) in enumerate(layers):
        if layer:
            hidden = silu(hidden)
        within = (by.mixed * (hidden @ before.mT)) @ error
        last = (by.mixed[..., -1, :, None] * error).mT @ before
        kept = by.kept[..., None]
        out = kept * (hidden @ weight.mT) - within
        new = kept[..., -1:, :] * weight - last
        if by.moved is not None and by.surprise_kept is not None and by.surprise_added is not None:
            out = out + by.moved[..., None] * (hidden @ surprise.mT)
            new = new + by.moved[..., -1:, None] * surprise
            added = (by.surprise_added[..., None] * error).mT @ before
            surprise = by.surprise_kept[..., None, None] * surprise - added
        hidden = out
        weights.append(new)
        surprises.append(surprise)
    return hidden, weights, surprises


def _advance(
    memory: FastWeights, weights: list[Tensor], surprise: list[Tensor], count: Tensor, chunk: int
) -> FastWeights:
    """The memory after a chunk or a part of one; where a chunk is full, the next begins."""
    full = count == chunk
    if bool(full.all()):
        return FastWeights(tuple(weights), tuple(surprise), tuple(weights), torch.zeros_like(count))
    start = memory.start
    if bool(full.any()):
        mine = full[:, None, None, None]
        start = tuple(torch.where(mine, w, s) for w, s in zip(weights, start, strict=True))
        count = count.masked_fill(full, 0)
    return FastWeights(tuple(weights), tuple(surprise), start, count)


def _check(key: Tensor, value: Tensor, memory: FastWeights, chunk: int, clip: float | None) -> None:
    sizes = [key.shape[-1]]
    for weight in memory.weights:
        if weight.shape[-1] != sizes[-1]:
            break
        sizes.append(weight.shape[-2])
    if len(sizes) != len(memory.weights) + 1 or sizes[-1] != value.shape[-1]:
        shapes = [tuple(weight.shape[-2:]) for weight in memory.weights]
        raise InputError(
            f"layers must lead from keys of {key.shape[-1]} to values of {value.shape[-1]}, got weights [out, in] {shapes}"
        )
    at_least_one(chunk=chunk)
    if int(memory.count.max()) >= chunk:
        raise InputError.of(
            "chunk", given=chunk, expected=f"above the {int(memory.count.max())} tokens begun"
        )
    if clip is not None and clip <= 0:
        raise InputError.of("clip", given=clip, expected="above 0, or None")
