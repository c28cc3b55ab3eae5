"""The experiment: linear sequences, the layer, its training on all entries, and the step of descent it should become."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from regard._errors import InputError
from regard.labs.mesa_optimization.theory import STARTS

Number = float | int
Sequences = Complex[Tensor, "*batch length d"]
Value = Complex[Tensor, "seeds starts d rows"]
Key = Complex[Tensor, "seeds starts rows rows"]


def draw(
    start: str,
    d: int,
    length: int,
    batch: tuple[int, ...],
    generator: torch.Generator,
    *,
    scale: Number = 1.0,
    share: Number = 1.0,
    kind: torch.dtype = torch.complex64,
) -> Sequences:
    """`batch` sequences x_t = W^{t-1} x_1, each with its own W; for `start` see `theory.start_moments`."""
    real = {"dtype": torch.float64, "generator": generator}
    if start not in STARTS:
        raise InputError.of("start", given=start, expected=f"one of {', '.join(STARTS)}")
    if start == "gaussian":
        first = torch.randn(*batch, d, **real)
    elif start == "ones":
        first = torch.ones(*batch, d, dtype=torch.float64)
    else:
        first = torch.sign(torch.rand(*batch, d, **real) - 0.5)
        if start == "signs":
            first = first * (torch.rand(*batch, d, **real) < share)
        else:
            chosen = torch.randint(d, (*batch, 1), generator=generator)
            first = first * torch.zeros_like(first).scatter(-1, chosen, 1.0)
    angles = 2 * math.pi * torch.rand(*batch, 1, d, **real)
    phases = angles * torch.arange(length, dtype=torch.float64)[:, None]
    return (scale * first[..., None, :] * torch.polar(torch.ones_like(phases), phases)).to(kind)


def _context(
    x: Sequences,
) -> tuple[Complex[Tensor, "*batch positions rows rows"], Complex[Tensor, "*batch positions rows"]]:
    """`E_t E_t^* / (t - 1)` by prefix sums, and e_t, for t = 2 .. T - 1."""
    before = torch.cat([torch.zeros_like(x[..., :1, :]), x[..., :-1, :]], -2)
    tokens = torch.cat([x, before], -1)
    sums = (tokens[..., :, None] * tokens[..., None, :].conj()).cumsum(-3)
    transitions = torch.arange(1, x.shape[-2] - 1, dtype=x.real.dtype)
    return sums[..., 1:-1, :, :] / transitions[:, None, None], tokens[..., 1:-1, :]


def linear_causal_attention(
    value: Value, key: Key, x: Complex[Tensor, "seeds batch length d"]
) -> Complex[Tensor, "seeds starts batch positions d"]:
    """`y_t = W_PV E_t E_t^* W_KQ e_t / (t - 1)` for t = 2 .. T - 1; all starts of one seed read the same sequences.

    Cost: O(seeds x batch x T x d^2) memory, times the starts in operations: prefix sums, no T x T matrix.
    """
    sums, tokens = _context(x)
    read = torch.einsum("skpq,sbtq->sbtpk", key, tokens)
    return torch.einsum("skjp,sbtpk->skbtj", value, sums @ read)


def one_step_ols_gd(x: Sequences, eta: Number) -> Complex[Tensor, "*batch positions d"]:
    """What one step of descent predicts: `W_t x_t`, `W_t = (eta / (t - 1)) sum_{i<t} x_{i+1} x_i^*`, for t = 2 .. T - 1.

    W_t is a step of size eta from 0 on `1 / (2 (t - 1)) sum_{i<t} ||x_{i+1} - W x_i||^2`.
    """
    pairs = x[..., 1:, :, None] * x[..., :-1, None, :].conj()
    transitions = torch.arange(1, x.shape[-2] - 1, dtype=x.real.dtype)
    weights = eta * pairs.cumsum(-3)[..., :-1, :, :] / transitions[:, None, None]
    return (weights @ x[..., 1:-1, :, None])[..., 0]


def begin(a: tuple[float, ...], b: tuple[float, ...], d: int, seeds: int) -> tuple[Value, Key]:
    """The paper's start for each pair a0, b0: W_PV = [b0 I, 0], W_KQ = a0 I in the block from x_t to x_{t-1}."""
    in_value, in_key = (mask.to(torch.complex64) for mask in diagonal_part(d))
    value, key = (
        torch.stack([size * mask for size in sizes]) for sizes, mask in ((b, in_value), (a, in_key))
    )
    return value.expand(seeds, -1, -1, -1).clone(), key.expand(seeds, -1, -1, -1).clone()


def diagonal_part(d: int) -> tuple[Bool[Tensor, "d rows"], Bool[Tensor, "rows rows"]]:
    """Which entries of W_PV and W_KQ the theorem's form has."""
    eye, none = torch.eye(d, dtype=torch.bool), torch.zeros(d, d, dtype=torch.bool)
    return torch.cat([eye, none], 1), torch.cat(
        [torch.cat([none, none], 1), torch.cat([eye, none], 1)]
    )


@dataclass(frozen=True, slots=True)
class Trained:
    """Weights after training, and at logged steps what the theorem speaks of, each `[logs, seeds, starts]`.

    Attributes:
        value, key: W_PV and W_KQ at the end.
        steps: `[logs]`.
        time: the sum of step sizes so far, the time of the flow.
        product: mean over coordinates of Re a_j b_j.
        balance: mean over coordinates of |a_j|^2 - |b_j|^2.
        stray: Frobenius norm of all other entries over that of the diagonal ones.
        loss: on that step's sequences.
    """

    value: Value
    key: Key
    steps: np.ndarray
    time: Float[np.ndarray, "logs seeds starts"]
    product: Float[np.ndarray, "logs seeds starts"]
    balance: Float[np.ndarray, "logs seeds starts"]
    stray: Float[np.ndarray, "logs seeds starts"]
    loss: Float[np.ndarray, "logs seeds starts"]

    def diagonal(self) -> tuple[Value, Key]:
        """The weights without the entries that the theorem keeps at zero."""
        in_value, in_key = diagonal_part(self.value.shape[-2])
        return self.value * in_value, self.key * in_key


def form(value: Value, key: Key) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Product, balance and stray of weights, as in `Trained`."""
    in_value, in_key = diagonal_part(value.shape[-2])
    b, a = value[..., in_value], key[..., in_key]
    inside = a.abs().square().sum(-1) + b.abs().square().sum(-1)
    outside = value[..., ~in_value].abs().square().sum(-1)
    outside = outside + key[..., ~in_key].abs().square().sum(-1)
    stray = (outside / inside).sqrt()
    balance = (a.abs().square() - b.abs().square()).mean(-1)
    return (a * b).real.mean(-1).numpy(), balance.numpy(), stray.numpy()


def train(
    sequences: Callable[[torch.Generator], Complex[Tensor, "seeds batch length d"]],
    start: tuple[Value, Key],
    *,
    rate: float,
    curvature: float,
    limit: float,
    steps: int,
    seed: int,
    masked: bool = False,
    logs: int = 40,
) -> Trained:
    """Gradient descent on all entries of both matrices, every seed and start at once, on fresh sequences at every step.

    The step size is `rate` over the curvature along a b, `curvature * max(||W_KQ||^2 + ||W_PV||^2, 2 d limit) / d`, so one
    rate serves all laws, lengths and starts: it changes when a point of the flow is reached, not the flow. For the last half
    of the steps it falls to a twentieth, so that the noise of the batches settles. With `masked`, entries that the theorem keeps
    at zero get no gradient.

    Cost: O(steps x seeds x batch x T x d^2 x starts).
    """
    value, key = (part.clone().requires_grad_() for part in start)
    d, generator = value.shape[-2], torch.Generator().manual_seed(seed)
    masks = diagonal_part(d) if masked else (torch.tensor(True), torch.tensor(True))
    marks = set(np.unique(np.rint(np.geomspace(1, steps, logs)).astype(int)).tolist())
    time, kept = torch.zeros(value.shape[:2]), []
    for step in range(steps + 1):
        x = sequences(generator)
        wrong = linear_causal_attention(value, key, x) - x[:, None, :, 2:]
        loss = wrong.abs().square().sum((-2, -1)).mean(-1) / 2
        if step in marks or step == 0:
            kept.append(
                (time.numpy().copy(), *form(value.detach(), key.detach()), loss.detach().numpy())
            )
        if step == steps:
            break
        gradients = torch.autograd.grad(loss.sum(), (value, key))
        late = max(0.0, 2 * step / steps - 1)
        with torch.no_grad():
            size = value.abs().square().sum((-2, -1)) + key.abs().square().sum((-2, -1))
            now = rate * 0.05**late / (curvature * (size / d).clamp(min=2 * limit))
            for part, gradient, mask in zip((value, key), gradients, masks, strict=True):
                part -= now[..., None, None] * gradient * mask
        time = time + now
    logged = (np.stack(part) for part in zip(*kept, strict=True))
    return Trained(value.detach(), key.detach(), np.array([0, *sorted(marks)]), *logged)
