"""The chunked form of fast weights against a loop over tokens with automatic gradients, and against closed forms."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize, silu

from regard._errors import InputError
from regard.ops import (
    FastWeights,
    delta_rule,
    fast_weight_scan,
    inner_gradient,
    read_memory,
    soft_clamp,
)
from regard.ops.fast_weights import decay_products

DIM, OUT = 4, 3


def layers(depth: int, heads: int = 2) -> list[Tensor]:
    sizes = [DIM, *[6] * (depth - 1), OUT]
    return [torch.randn(heads, b, a).double() / a**0.5 for a, b in pairwise(sizes)]


def tokens(count: int = 11, batch: int = 2, heads: int = 2) -> dict[str, Tensor]:
    query, key = normalize(torch.randn(2, batch, heads, count, DIM).double(), dim=-1).unbind()
    step, momentum, decay = torch.rand(3, batch, heads, count).double().unbind()
    return {
        "query": query,
        "key": key,
        "value": torch.randn(batch, heads, count, OUT).double(),
        "step": step / 2,
        "momentum": momentum,
        "decay": decay / 4,
    }


def ask(weights: list[Tensor], query: Tensor) -> Tensor:
    for weight in weights[:-1]:
        query = silu(weight @ query)
    return weights[-1] @ query


def by_the_token(
    told: dict[str, Tensor], initial: list[Tensor], chunk: int, clip: float | None = None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One row and head at a time, one token at a time, gradients by automatic differentiation."""
    batch, heads, count, _ = told["key"].shape
    read = torch.zeros(batch, heads, count, OUT).double()
    final: list[list[Tensor]] = [[], []]
    for b in range(batch):
        for h in range(heads):
            weights = [w[h].clone() for w in initial]
            surprise = [torch.zeros_like(w) for w in weights]
            start = weights
            for t in range(count):
                if t % chunk == 0:
                    start = weights
                key, value = told["key"][b, h, t], told["value"][b, h, t]
                leaves = [w.detach().requires_grad_() for w in start]
                loss = (ask(leaves, key) - value).square().sum()
                gradient = list(torch.autograd.grad(loss, leaves))
                if clip is not None:
                    norm = torch.cat([g.flatten() for g in gradient]).norm()
                    gradient = [g * clip * torch.tanh(norm / clip) / norm for g in gradient]
                eta = told["momentum"][b, h, t] if "momentum" in told else 0
                alpha = told["decay"][b, h, t] if "decay" in told else 0
                surprise = [
                    eta * s - told["step"][b, h, t] * g
                    for s, g in zip(surprise, gradient, strict=True)
                ]
                weights = [(1 - alpha) * w + s for w, s in zip(weights, surprise, strict=True)]
                read[b, h, t] = ask(weights, told["query"][b, h, t])
            final[0].append(torch.cat([w.flatten() for w in weights]))
            final[1].append(torch.cat([s.flatten() for s in surprise]))
    return read, *final


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 16])
def test_chunks_equal_the_loop(depth: int, chunk: int) -> None:
    told, initial = tokens(), layers(depth)
    read, memory = fast_weight_scan(memory=FastWeights.begin(initial, 2), chunk=chunk, **told)
    expected, weights, surprise = by_the_token(told, initial, chunk)
    torch.testing.assert_close(read, expected, atol=1e-12, rtol=1e-12)
    for found, wanted in ((memory.weights, weights), (memory.surprise, surprise)):
        rows = torch.cat([part.flatten(2) for part in found], -1).flatten(0, 1)
        torch.testing.assert_close(rows, torch.stack(wanted), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("without", [{"momentum"}, {"decay"}, {"momentum", "decay"}])
def test_chunks_equal_the_loop_without_gates(without: set[str]) -> None:
    told = {name: part for name, part in tokens().items() if name not in without}
    initial = layers(2)
    read, _ = fast_weight_scan(memory=FastWeights.begin(initial, 2), chunk=4, **told)
    torch.testing.assert_close(read, by_the_token(told, initial, 4)[0], atol=1e-12, rtol=1e-12)


def test_chunks_equal_the_loop_when_clipped() -> None:
    told, initial = tokens(), layers(2)
    read, _ = fast_weight_scan(memory=FastWeights.begin(initial, 2), chunk=4, clip=0.5, **told)
    torch.testing.assert_close(read, by_the_token(told, initial, 4, 0.5)[0], atol=1e-10, rtol=1e-10)
    free, _ = fast_weight_scan(memory=FastWeights.begin(initial, 2), chunk=4, **told)
    assert (read - free).abs().max() > 1e-2


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_split_and_any_padding_give_the_same(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 14))
    chunk = data.draw(st.integers(1, 6))
    mask = data.draw(
        st.lists(st.lists(st.booleans(), min_size=count, max_size=count), min_size=2, max_size=2)
    )
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, count - 1)), max_size=4)))
    torch.manual_seed(count)
    told, initial, valid = tokens(count), layers(2), torch.tensor(mask)
    noisy = {
        name: torch.where(valid[:, None, :, None] if part.ndim == 4 else valid[:, None], part, 0.9)
        for name, part in told.items()
    }
    memory, read = FastWeights.begin(initial, 2), []
    for first, last in zip([0, *cuts], [*cuts, count], strict=True):
        if first == last:
            continue
        some = {name: part[:, :, first:last] for name, part in noisy.items()}
        out, memory = fast_weight_scan(
            memory=memory, chunk=chunk, valid=valid[:, first:last], **some
        )
        read.append(out)
    whole = torch.cat(read, 2)
    for row in range(2):
        real = valid[row]
        assert not whole[row, :, ~real].any()
        alone = {name: part[row : row + 1, :, real] for name, part in told.items()}
        if not real.any():
            continue
        expected, end = fast_weight_scan(memory=FastWeights.begin(initial, 1), chunk=chunk, **alone)
        torch.testing.assert_close(whole[row, :, real], expected[0], atol=1e-11, rtol=1e-11)
        assert int(memory.count[row]) == int(real.sum()) % chunk
        for found, wanted in zip(memory.weights, end.weights, strict=True):
            torch.testing.assert_close(found[row], wanted[0], atol=1e-11, rtol=1e-11)


def test_the_delta_rule_is_a_special_case() -> None:
    told = tokens(20)
    matrix = [torch.randn(2, OUT, DIM).double()]
    some = {name: told[name] for name in ("query", "key", "value", "step")}
    read, memory = fast_weight_scan(memory=FastWeights.begin(matrix, 2), chunk=1, **some)
    state = matrix[0].expand(2, -1, -1, -1)
    expected, state = delta_rule(told["query"], told["key"], told["value"], 2 * told["step"], state)
    torch.testing.assert_close(read, expected, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(memory.weights[0], state, atol=1e-13, rtol=1e-12)


def test_linear_attention_is_a_special_case() -> None:
    told = tokens(20)
    some = {name: told[name] for name in ("query", "key", "value", "step")}
    nothing = FastWeights.begin([torch.zeros(2, OUT, DIM).double()], 2)
    read, _ = fast_weight_scan(memory=nothing, chunk=20, **some)
    scores = (told["query"] @ told["key"].mT * 2 * told["step"][:, :, None]).tril()
    torch.testing.assert_close(read, scores @ told["value"], atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_forgetting_follows_its_closed_form(momentum: float) -> None:
    count, alpha = 12, 0.1
    key = torch.eye(count).double().view(1, 1, count, count)
    value = torch.randn(1, 1, count, OUT).double()
    full = torch.ones(1, 1, count).double()
    memory = FastWeights.begin([torch.zeros(1, OUT, count).double()], 1)
    _, memory = fast_weight_scan(
        key, key, value, full / 2, memory, momentum=momentum * full, decay=alpha * full, chunk=1
    )
    recalled = read_memory(memory.weights, key)
    kept = [
        sum((1 - alpha) ** (age - lag) * momentum**lag for lag in range(age + 1))
        for age in range(count - 1, -1, -1)
    ]
    expected = torch.tensor(kept).double().view(1, 1, -1, 1) * value
    torch.testing.assert_close(recalled, expected, atol=1e-6, rtol=1e-6)


def test_a_matrix_holds_as_many_orthogonal_keys_as_it_has_columns() -> None:
    count = 8
    first = torch.eye(count).double()
    second = torch.linalg.qr(torch.randn(count, count).double()).Q.T
    key = torch.cat([first, second]).view(1, 1, 2 * count, count)
    value = torch.randn(1, 1, 2 * count, OUT).double()
    step = torch.full((1, 1, 2 * count), 0.5).double()
    memory = FastWeights.begin([torch.zeros(1, OUT, count).double()], 1)
    _, half = fast_weight_scan(
        key[:, :, :count],
        key[:, :, :count],
        value[:, :, :count],
        step[:, :, :count],
        memory,
        chunk=1,
    )
    torch.testing.assert_close(read_memory(half.weights, key[:, :, :count]), value[:, :, :count])
    _, memory = fast_weight_scan(key, key, value, step, memory, chunk=1)
    recalled = read_memory(memory.weights, key)
    torch.testing.assert_close(recalled[:, :, count:], value[:, :, count:])
    # a second basis leaves nothing of the first: what its keys give is read off the second's
    torch.testing.assert_close(recalled[0, 0, :count], first @ second.T @ value[0, 0, count:])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_inner_gradients_are_the_automatic_ones(depth: int) -> None:
    told, initial = tokens(5), layers(depth)
    weights = [w.expand(2, *w.shape) for w in initial]
    found = inner_gradient(weights, told["key"], told["value"])
    for b, h, t in ((0, 0, 0), (1, 1, 4)):
        leaves = [w[h].clone().requires_grad_() for w in initial]
        loss = (ask(leaves, told["key"][b, h, t]) - told["value"][b, h, t]).square().sum()
        for (error, before), wanted in zip(found, torch.autograd.grad(loss, leaves), strict=True):
            torch.testing.assert_close(torch.outer(error[b, h, t], before[b, h, t]), wanted)


def test_gradients_pass_through_the_inner_gradients() -> None:
    told, initial = tokens(7, 1, 1), layers(2, 1)
    names = list(told)
    leaves = [part.requires_grad_() for part in (*told.values(), *initial)]

    def scan(*parts: Tensor) -> Tensor:
        memory = FastWeights.begin(parts[len(names) :], 1)
        return fast_weight_scan(
            memory=memory, chunk=3, clip=2.0, **dict(zip(names, parts[: len(names)], strict=True))
        )[0]

    assert torch.autograd.gradcheck(scan, leaves)


def test_the_future_changes_nothing() -> None:
    told, initial = tokens(), layers(2)
    before, _ = fast_weight_scan(memory=FastWeights.begin(initial, 2), chunk=4, **told)
    other = {
        name: torch.cat([part[:, :, :6], part[:, :, 6:].flip(2)], 2) for name, part in told.items()
    }
    after, _ = fast_weight_scan(memory=FastWeights.begin(initial, 2), chunk=4, **other)
    torch.testing.assert_close(after[:, :, :6], before[:, :, :6])
    assert (after - before)[:, :, 6:].abs().max() > 1e-3


def test_clipping_keeps_a_memory_bounded_where_keys_repeat() -> None:
    count = 800
    key = normalize(torch.ones(1, 1, count, DIM).double(), dim=-1)
    value = torch.ones(1, 1, count, DIM).double()
    rest = {
        "step": torch.full((1, 1, count), 0.5).double(),
        "decay": torch.full((1, 1, count), 0.02).double(),
    }
    begun = FastWeights.begin([torch.zeros(1, DIM, DIM).double()], 1)
    free, _ = fast_weight_scan(key, key, value, memory=begun, chunk=16, **rest)
    clipped, _ = fast_weight_scan(key, key, value, memory=begun, chunk=16, clip=1.0, **rest)
    assert not free.abs().max() < 1e6
    assert clipped.norm(dim=-1).max() <= 0.5 / 0.02 + 1e-9


def test_decay_products_are_exact_at_zero() -> None:
    gates = torch.tensor([0.5, 0.0, 0.25, 1.0], dtype=torch.float64)
    expected = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0.25, 1, 0], [0, 0.25, 1, 1]]).double()
    assert torch.equal(decay_products(gates), expected)


def test_soft_clamp_leaves_small_gradients() -> None:
    gradient = [(torch.randn(5, 3).double() * 1e-3, torch.randn(5, 4).double())]
    torch.testing.assert_close(soft_clamp(gradient, 10.0)[0][0], gradient[0][0], rtol=1e-5, atol=0)


def test_bad_input_is_named() -> None:
    told, initial = tokens(), layers(2)
    begun = FastWeights.begin(initial, 2)
    with pytest.raises(InputError, match="chunk must be 1 or more"):
        fast_weight_scan(memory=begun, chunk=0, **told)
    with pytest.raises(InputError, match="clip must be above 0"):
        fast_weight_scan(memory=begun, clip=0.0, **told)
    with pytest.raises(InputError, match=r"keys of 4 to values of 3.*\(3, 6\)"):
        fast_weight_scan(memory=FastWeights.begin(initial[1:], 2), **told)
    _, later = fast_weight_scan(memory=begun, chunk=8, **told)
    with pytest.raises(InputError, match="above the 3 tokens begun"):
        fast_weight_scan(memory=later, chunk=3, **told)
