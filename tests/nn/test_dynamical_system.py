"""Every mixer from its native code, its transfer matrix and the scan of its system."""

from __future__ import annotations

import pytest
import torch

from regard._errors import InputError
from regard.nn import (
    QLSTM,
    S6,
    SSD,
    DeltaRule,
    LinearAttention,
    NormalisedAttention,
    ReversedQLSTM,
    SoftmaxAttention,
    as_dynamical_system,
    softmax_system,
)
from regard.ops import system_scan, transfer_matrix

WIDTH, HEADS, TOKENS = 8, 2, 32
CLOSE = {"atol": 1e-10, "rtol": 1e-10}
MATRIX = {
    "linear": lambda: LinearAttention(WIDTH, HEADS),
    **{
        f"normalised {name}": lambda n=name: NormalisedAttention(
            WIDTH, HEADS, state_size=4, normaliser=n
        )
        for name in ("exp", "softplus", "sigmoid")
    },
    "S6": lambda: S6(WIDTH, HEADS, state_size=4),
    "SSD": lambda: SSD(WIDTH, HEADS, state_size=4),
}


def hidden(width: int = WIDTH) -> torch.Tensor:
    return torch.randn(
        2, TOKENS, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def made(make) -> torch.nn.Module:
    torch.manual_seed(0)
    mixer = make().double().eval()
    for parameter in mixer.parameters():
        if parameter.ndim < 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return mixer


def applied(system, inputs):
    return torch.einsum("bijou,bju->bio", transfer_matrix(system), inputs)


@pytest.mark.parametrize("name", MATRIX)
def test_native_code_transfer_matrix_and_scan_agree(name):
    mixer, inputs = made(MATRIX[name]), hidden()
    native, system = mixer(inputs), as_dynamical_system(mixer, inputs)
    torch.testing.assert_close(applied(system, inputs), native, **CLOSE)
    torch.testing.assert_close(system_scan(system, inputs)[0], native, **CLOSE)


@pytest.mark.parametrize("kind", [QLSTM, ReversedQLSTM])
def test_the_recurrence_of_a_quasi_lstm_too(kind):
    mixer, inputs = made(lambda: kind(WIDTH, HEADS)), hidden(2 * WIDTH)
    native, cell = mixer.recur(inputs)
    system = as_dynamical_system(mixer, inputs)
    torch.testing.assert_close(applied(system, inputs), native, **CLOSE)
    found, state = system_scan(system, inputs)
    torch.testing.assert_close(found, native, **CLOSE)
    torch.testing.assert_close(state, cell, **CLOSE)


def test_attention_only_rescales_its_state_and_a_state_space_model_fades():
    inputs = hidden()
    mixer = made(MATRIX["normalised exp"])
    system, eta = as_dynamical_system(mixer, inputs), mixer.eta(inputs)
    products = system.A[:, 1:].prod(1).view(2, HEADS, -1)
    torch.testing.assert_close(products, (eta[..., :1] / eta[..., -1:]).expand_as(products))
    fading = as_dynamical_system(made(MATRIX["S6"]), inputs).A
    assert bool(((fading > 0) & (fading < 1)).all())


def test_more_state_comes_nearer_to_softmax():
    torch.manual_seed(0)
    mixer, inputs = SoftmaxAttention(WIDTH, 4).double(), hidden()[:, :12]
    native = mixer(inputs)
    errors = [
        float(
            (applied(softmax_system(mixer, inputs, order), inputs) - native).norm() / native.norm()
        )
        for order in (0, 2, 4, 6, 8, 10)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4 < errors[0]


def test_reversing_the_gate_is_negating_it_until_alpha_moves():
    torch.manual_seed(0)
    plain, reverse = QLSTM(WIDTH, HEADS).double(), ReversedQLSTM(WIDTH, HEADS).double()
    with torch.no_grad():
        reverse.load_state_dict(plain.state_dict(), strict=False)
        inner = 2 * WIDTH
        reverse.gates_proj.weight[:inner] *= -1
        reverse.gates_proj.bias[:inner] *= -1
    torch.testing.assert_close(reverse(hidden()), plain(hidden()), **CLOSE)
    with torch.no_grad():
        reverse.alpha.fill_(-1)
    keep, _, _ = reverse.gates(hidden(inner))
    assert bool((keep == 1).all())


def test_s6_with_equal_steps_and_rates_is_ssd():
    torch.manual_seed(0)
    wide_one, narrow = (
        S6(WIDTH, HEADS, state_size=4).double(),
        SSD(WIDTH, HEADS, state_size=4).double(),
    )
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(wide_one, name).weight.copy_(getattr(narrow, name).weight)
        repeat = WIDTH // HEADS
        wide_one.step_proj.weight.copy_(narrow.step_proj.weight.repeat_interleave(repeat, 0))
        wide_one.step_proj.bias.copy_(narrow.step_proj.bias.repeat_interleave(repeat))
        wide_one.log_rate.copy_(narrow.log_rate.expand_as(wide_one.log_rate))
        wide_one.skip.copy_(narrow.skip)
    torch.testing.assert_close(wide_one(hidden()), narrow(hidden()), **CLOSE)


def test_what_has_no_such_form_is_named():
    with pytest.raises(InputError, match=r"got 'SoftmaxAttention'; softmax_system"):
        as_dynamical_system(SoftmaxAttention(WIDTH, HEADS), hidden().float())
    with pytest.raises(InputError, match="got 'DeltaRule'"):
        as_dynamical_system(DeltaRule(WIDTH, HEADS), hidden().float())
    with pytest.raises(InputError, match="window 4"):
        softmax_system(SoftmaxAttention(WIDTH, HEADS, window=4), hidden().float(), 2)
    with pytest.raises(InputError, match="did you mean exp"):
        NormalisedAttention(WIDTH, HEADS, normaliser="expo")
    with pytest.raises(InputError, match="state_size must be 1 or more, got 0"):
        S6(WIDTH, HEADS, state_size=0)
