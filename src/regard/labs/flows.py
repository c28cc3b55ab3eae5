"""Gradient flow, integrated, and gradient descent with small steps, on batches of runs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from regard._errors import InputError

State = tuple[np.ndarray, ...]


def flow(
    velocity: Callable[..., State],
    start: State,
    times: Float[np.ndarray, " times"],
    *,
    accuracy: float = 1e-9,
) -> State:
    """The solution of d state / dt = velocity(*state) at `times` by SciPy's DOP853; a new first axis is time.

    `state` is a tuple of arrays of any shapes, so a whole batch of runs is one system. `times` begins with the start.

    Raises:
        InputError: SciPy is missing, or the solution cannot be continued (it diverges, say).
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise InputError("gradient flow needs scipy; pip install 'regard[experiments]'") from error
    shapes = [part.shape for part in start]
    cuts = np.cumsum([part.size for part in start])[:-1]

    def unpack(flat: np.ndarray) -> State:
        return tuple(p.reshape(s) for p, s in zip(np.split(flat, cuts), shapes, strict=True))

    def pack(state: State) -> np.ndarray:
        return np.concatenate([np.ravel(part) for part in state])

    found = solve_ivp(
        lambda _, flat: pack(velocity(*unpack(flat))),
        (times[0], times[-1]),
        pack(start).astype(float),
        method="DOP853",
        t_eval=times,
        rtol=accuracy,
        atol=accuracy * 1e-3,
    )
    if not found.success:
        raise InputError(f"the flow cannot be integrated to time {times[-1]:g}: {found.message}")
    states = [unpack(flat) for flat in found.y.T]
    return tuple(np.stack(parts) for parts in zip(*states, strict=True))


def descend(
    velocity: Callable[..., State], start: State, times: Float[np.ndarray, " times"], step: float
) -> State:
    """Gradient descent with step size `step`: Euler's method, read off at the steps nearest to `times`."""
    wanted = np.rint(np.asarray(times) / step).astype(int)
    state, done, kept = tuple(np.array(part, float) for part in start), 0, []
    for target in wanted:
        for _ in range(int(target) - done):
            moves = zip(state, velocity(*state), strict=True)
            state = tuple(np.asarray(p + step * v) for p, v in moves)
        done = int(target)
        kept.append(state)
    return tuple(np.stack(parts) for parts in zip(*kept, strict=True))
