"""The common form against the loop it stands for, and the three consequences drawn from it."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.special import lambertw

from regard._errors import InputError
from regard.ops import (
    DynamicalSystem,
    decayed_linear_attention,
    equivalent_normalisers,
    gated_system,
    memory_horizon,
    selective_system,
    separable_system,
    state_products,
    system_scan,
    transfer_matrix,
)

CLOSE = {"atol": 1e-10, "rtol": 1e-10}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def some_system(tokens: int = 9) -> DynamicalSystem:
    return DynamicalSystem(
        normal(2, tokens, 6, seed=1).tanh(),
        normal(2, tokens, 6, 3, seed=2),
        normal(2, tokens, 4, 6, seed=3),
        normal(2, tokens, 4, 3, seed=4),
    )


def by_the_token(system: DynamicalSystem, inputs, state):
    outputs = []
    for t in range(inputs.shape[1]):
        one = inputs[:, t, :, None]
        state = system.A[:, t] * state + (system.B[:, t] @ one)[..., 0]
        outputs.append((system.C[:, t] @ state[..., None] + system.D[:, t] @ one)[..., 0])
    return torch.stack(outputs, 1), state


def applied(phi, inputs):
    return torch.einsum("...ijou,...ju->...io", phi, inputs)


def test_scan_and_transfer_matrix_are_the_loop():
    system, inputs, first = some_system(), normal(2, 9, 3), normal(2, 6, seed=5)
    expected, last = by_the_token(system, inputs, first)
    found, state = system_scan(system, inputs, first)
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(state, last, **CLOSE)
    rest, _ = by_the_token(system, inputs, 0 * first)
    torch.testing.assert_close(applied(transfer_matrix(system), inputs), rest, **CLOSE)


def test_every_entry_of_the_transfer_matrix():
    system = some_system(5)
    phi = transfer_matrix(system)
    for i in range(5):
        for j in range(5):
            expected = torch.zeros(2, 4, 3, dtype=torch.float64)
            if j <= i:
                kept = system.A[:, j + 1 : i + 1].prod(1)
                expected = (system.C[:, i] * kept[:, None]) @ system.B[:, j]
            if i == j:
                expected = expected + system.D[:, i]
            torch.testing.assert_close(phi[:, i, j], expected, **CLOSE)


def test_products_survive_a_state_that_is_cleared():
    A = torch.rand(6, 2, dtype=torch.float64)
    A[3] = 0
    found = state_products(A)
    assert not found[3:, :3].any() and bool((found.diagonal(dim1=0, dim2=1) == 1).all())
    assert float(found[5, 3, 1]) == pytest.approx(float(A[4, 1] * A[5, 1]))


def test_the_horizon_counts_tokens_above_a_share():
    A = torch.tensor([[0.1, 1.0], [0.9, 1.0], [0.9, 1.0], [0.8, 0.0]])
    # what is left of tokens 0, 1, 2 at the last: 0.648, 0.72, 0.8
    assert memory_horizon(A, share=0.7).tolist() == [2, 0]
    assert memory_horizon(A, share=0.5).tolist() == [3, 0]


def test_separable_attention_telescopes():
    heads, tokens, features, values, inputs = 2, 7, 5, 3, 4
    query, key = (normal(1, heads, tokens, features, seed=s) for s in (1, 2))
    eta = normal(1, heads, tokens, seed=3).exp()
    into, out = normal(heads, values, inputs, seed=4), normal(6, heads, values, seed=5)
    phi = transfer_matrix(separable_system(query, key, eta, into, out))
    weights = (query @ key.mT / eta[..., None]).tril()
    expected = torch.einsum("ohv,bhij,hvu->bijou", out, weights, into)
    torch.testing.assert_close(phi, expected, **CLOSE)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_selective_model_forgets_by_the_sum_of_its_steps(channels):
    heads, tokens, features, values = 2, 6, 4, 3
    query, key = (normal(heads, tokens, features, seed=s) for s in (1, 2))
    step = normal(heads, tokens, channels, seed=3).exp()
    rate = -normal(heads, channels, features if channels > 1 else 1, seed=4).exp()
    into, skip = normal(heads, values, 5, seed=5), normal(heads, values, seed=6)
    out = normal(2, heads, values, seed=7)
    phi = transfer_matrix(selective_system(query, key, step, rate, into, out, skip))
    full_step = step.expand(heads, tokens, values)
    full_rate = rate.expand(heads, values, features)
    for i in range(tokens):
        for j in range(i + 1):
            since = full_step[:, j + 1 : i + 1].sum(1)[..., None]
            kept = (full_rate * since).exp()
            gain = torch.einsum("hn,hvn,hn->hv", query[:, i], kept, key[:, j]) * full_step[:, j]
            expected = torch.einsum("ohv,hv,hvu->ou", out, gain + (i == j) * skip, into)
            torch.testing.assert_close(phi[i, j], expected, **CLOSE)


def test_a_gated_recurrence_is_diagonal():
    forget, write, read = (torch.sigmoid(normal(1, 5, 4, seed=s)) for s in (1, 2, 3))
    inputs = normal(1, 5, 4)
    found, _ = system_scan(gated_system(forget, write, read), inputs)
    state, outputs = torch.zeros(1, 4, dtype=torch.float64), []
    for t in range(5):
        state = forget[:, t] * state + write[:, t] * inputs[:, t]
        outputs.append(read[:, t] * state)
    torch.testing.assert_close(found, torch.stack(outputs, 1), **CLOSE)


@pytest.mark.parametrize(("first", "rate"), [(1.0, -1.0), (0.3, -0.05), (20, -7)])
def test_the_normalisers_of_equivalence_solve_their_equation(first, rate):
    eta = equivalent_normalisers(first, rate, 50)
    assert float(eta[0]) == first
    torch.testing.assert_close(eta[1:] * (rate / eta[1:]).exp(), eta[:-1], **CLOSE)
    expected = [-rate / lambertw(-rate / one).real for one in eta[:-1].tolist()]
    torch.testing.assert_close(eta[1:], torch.tensor(expected, dtype=torch.float64), **CLOSE)
    growth = (eta[-1] - eta[-2]) / -rate
    assert 0.9 < float(growth) < 1  # e^x > 1 + x: always less than |rate|


def test_ssd_is_separable_attention_for_these_normalisers_only():
    tokens, rate = 32, -0.4
    query, key = (normal(1, 1, tokens, 4, seed=s) for s in (1, 2))
    value = normal(1, 1, tokens, 8, seed=3)

    def both(eta):
        step = 1 / eta.view(1, 1, tokens, 1)
        ssd, _ = decayed_linear_attention(query, key, step * value, rate * step[..., 0])
        return ssd, (query @ key.mT).tril() @ value * step

    torch.testing.assert_close(*both(equivalent_normalisers(2.0, rate, tokens)), **CLOSE)
    ssd, separable = both(equivalent_normalisers(2.0, 2 * rate, tokens))
    assert float((ssd - separable).abs().max()) > 0.01


def test_the_decay_of_s6_is_a_reversed_sigmoid_to_a_power():
    x = torch.linspace(-30, 30, 101, dtype=torch.float64)
    for power in (0.5, 1.0, 3.0):
        decay = (-power * torch.nn.functional.softplus(x)).exp()
        torch.testing.assert_close(decay, torch.sigmoid(-x) ** power, atol=1e-14, rtol=1e-9)


def test_gradients():
    system = DynamicalSystem(*(part[:1, :4].requires_grad_() for part in some_system()))
    inputs = normal(1, 4, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b, c, d, u: system_scan(DynamicalSystem(a, b, c, d), u), (*system, inputs)
    )
    assert torch.autograd.gradcheck(
        lambda a, b, c, d: transfer_matrix(DynamicalSystem(a, b, c, d)), tuple(system)
    )


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match="first must be above 0"):
        equivalent_normalisers(0, -1, 3)
    with pytest.raises(InputError, match="rate must be below 0"):
        equivalent_normalisers(1, 1, 3)
    query, into, out = normal(1, 4, 2), normal(1, 3, 5), normal(5, 1, 3)
    with pytest.raises(InputError, match="1 or 3 a token"):
        selective_system(query, query, normal(1, 4, 2), -torch.ones(1, 1, 1), into, out)


def test_the_horizon_of_a_constant_decay():
    keep = 0.9
    found = memory_horizon(torch.full((50, 1), keep, dtype=torch.float64))
    assert float(found) == math.floor(-1 / math.log(keep))
