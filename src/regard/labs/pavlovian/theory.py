"""Closed forms of capacity and conditioning; the setting is in `regard.labs.pavlovian`."""

from __future__ import annotations

import math

Number = float | int


def cross_talk_error(items: int, dimension: Number) -> float:
    """Mean squared error of reading one of n random associations: `(n - 1) / d_k`, keys and values of norm 1.

    The reading is `v_i + sum_{j != i} (k_j . k_i) v_j`, and `E (k_j . k_i)^2 = 1 / d_k`.
    """
    return (items - 1) / dimension


def worst_case_count(dimension: Number) -> float:
    """The n at which cross-talk that all adds up reaches the signal: `(n - 1) sqrt(2 / (pi d_k)) = 1`, so n = O(sqrt(d_k)).

    It is the count for an average item; the worst of all items gets there earlier, with the same power of d_k.
    """
    return 1 + math.sqrt(math.pi * dimension / 2)


def chain_error(items: int, dimension: Number, depth: int) -> float:
    """Mean squared error after D memories v^(l) -> v^(l+1), read one into the next: `(1 + (n - 1) / d)^D - 1`.

    The noise lies in the span of the stored values, so the next memory amplifies it as it amplifies the signal.

    >>> round(chain_error(32, 256, 5), 2)
    0.77
    """
    return (1 + cross_talk_error(items, dimension)) ** depth - 1


def chain_success(failure: float, depth: int) -> float:
    """Share of chains without an error when each hop is cleaned up to the nearest stored value: `(1 - p)^D`."""
    return (1 - failure) ** depth


def majority_failure(failure: float, heads: int) -> float:
    """How often more than half of R independent heads fail: `sum_{k > R/2} C(R, k) p^k (1 - p)^(R - k)`.

    >>> round(majority_failure(0.1, 3), 3)
    0.028
    """
    return sum(
        math.comb(heads, k) * failure**k * (1 - failure) ** (heads - k)
        for k in range(heads // 2 + 1, heads + 1)
    )


def delta_acquisition(rate: float, trials: int) -> float:
    """V_A of Rescorla-Wagner after n trials with outcome 1: `1 - (1 - b)^n`. Hebb has b n."""
    return 1 - (1 - rate) ** trials


def decay_acquisition(rate: float, keep: float, trials: int) -> float:
    """V_A with a decaying trace: `b (1 - g^n) / (1 - g)`."""
    return rate * (1 - keep**trials) / (1 - keep)


def oja_acquisition(rate: float, trials: int) -> float:
    """V_A of Oja's rule with outcome 1: as Rescorla-Wagner's, but each cue on its own, so that nothing is blocked."""
    return 1 - (1 - rate) ** trials


def blocked_response(rate: float, first: int, second: int) -> float:
    """V_B of Rescorla-Wagner after n1 trials of A and n2 of A and B together: `1/2 (1 - V_A(n1)) (1 - (1 - 2 b)^n2)`.

    Hebb has b n2 whatever came first.

    >>> round(blocked_response(0.1, 15, 20), 6)
    0.101759
    """
    return 0.5 * (1 - delta_acquisition(rate, first)) * (1 - (1 - 2 * rate) ** second)


def overshadowed_response(rate: float, own: Number, other: Number, trials: int) -> float:
    """Response to a cue of salience s trained beside one of salience o, Rescorla-Wagner: it tends to `s^2 / (s^2 + o^2)`.

    Saliences scale the keys. Hebb has b n s^2 whatever the partner.

    >>> round(overshadowed_response(0.1, 1.0, 0.5, 1000), 6)
    0.8
    """
    whole = own**2 + other**2
    return own**2 / whole * (1 - (1 - rate * whole) ** trials)
