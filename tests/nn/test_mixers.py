"""What every mixer promises: causal, deaf to padding, and the same whether it sees a text at once, in parts or token by token."""

from __future__ import annotations

import pytest
import torch

from regard._errors import InputError
from regard.nn import MIXERS, ProductKeyMemory, make_mixer
from regard.nn.deconstructed import FixedQKAttention, GivenQKAttention, NoMixing
from regard.nn.mixer import Mixer

WIDTH, HEADS, TOKENS = 32, 4, 37
OPTIONS: dict[str, dict[str, object]] = {
    "chunk_moe": {"chunk": 4, "inner": 16},
    "dma": {"window": 8, "kv_heads": 2, "local": 3},
    "dma-linear": {"window": 8},
    "hydra": {"attention": {"window": 8, "stride": 8}, "experts": {"chunk": 4, "inner": 16}},
    "memory": {"chunk": 4},
    "memory_as_context": {"segment": 8, "chunk": 4},
    "memory_as_gate": {"window": 8, "chunk": 4},
    "memory_as_layer": {"window": 8, "chunk": 4},
    "moh": {"shared": 2, "active": 1},
    "product_keys": {"keys": 8},
    "routing": {"clusters": 3, "window": 12, "local_window": 8},
    "sliding": {"window": 8},
    "sparse_global": {"window": 8, "stride": 8},
    "workspace": {"chunk": 4},
}
NAMES = sorted(MIXERS)


@pytest.fixture(params=NAMES)
def mixer(request: pytest.FixtureRequest) -> Mixer:
    torch.manual_seed(0)
    made = make_mixer(request.param, WIDTH, HEADS, **OPTIONS.get(request.param, {}))
    for parameter in made.parameters():  # what starts at zero would hide mistakes
        if parameter.ndim < 2 or not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    if isinstance(made, GivenQKAttention):
        made.register_forward_pre_hook(_give_source)
    return made.double().eval()


def _give_source(mixer: GivenQKAttention, given: tuple[torch.Tensor]) -> None:
    """What the model does for mixers whose queries and keys are not made of their input."""
    hidden = given[0]
    noise = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mixer.source = noise.to(hidden.dtype) if isinstance(mixer, FixedQKAttention) else hidden


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(
        3, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def test_the_future_changes_nothing(mixer: Mixer, hidden: torch.Tensor) -> None:
    before = mixer(hidden)
    assert before.shape == hidden.shape
    assert before.isfinite().all()
    for cut in (1, 20):
        other = hidden.clone()
        other[:, cut:] = torch.randn_like(other[:, cut:])
        torch.testing.assert_close(mixer(other)[:, :cut], before[:, :cut], atol=1e-9, rtol=1e-9)


def test_the_past_matters(mixer: Mixer, hidden: torch.Tensor) -> None:
    other = hidden.clone()
    other[:, TOKENS - 3] += 1
    change = (mixer(other) - mixer(hidden))[:, -1].abs().max()
    if isinstance(mixer, NoMixing | ProductKeyMemory):  # the two that look at their own token alone
        assert change == 0
    else:
        assert change > 1e-6


@pytest.mark.parametrize("sizes", [[1] * TOKENS, [20, 17], [5, 1, 30, 1], [TOKENS]])
def test_goes_on_where_it_was(mixer: Mixer, hidden: torch.Tensor, sizes: list[int]) -> None:
    state: dict[str, torch.Tensor] = {}
    parts = [mixer(part, state=state) for part in hidden.split(sizes, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), mixer(hidden), atol=1e-8, rtol=1e-8)
    assert all(len(tensor) == 3 for tensor in state.values()), "every state has the batch first"


@pytest.mark.parametrize("stepwise", [False, True])
def test_padding_on_the_left_changes_nothing(
    mixer: Mixer, hidden: torch.Tensor, stepwise: bool
) -> None:
    lengths = (TOKENS, TOKENS - 9, 5)
    valid = torch.stack([torch.arange(TOKENS) >= TOKENS - length for length in lengths])
    noisy = torch.where(valid[..., None], hidden, 100 * torch.randn_like(hidden))
    state: dict[str, torch.Tensor] = {}
    if stepwise:
        pairs = zip(noisy.split(1, 1), valid.split(1, 1), strict=True)
        padded = torch.cat([mixer(one, valid=real, state=state) for one, real in pairs], 1)
    else:
        padded = mixer(noisy, valid=valid)
    for row, length in enumerate(lengths):
        alone = mixer(hidden[row : row + 1, TOKENS - length :])
        torch.testing.assert_close(padded[row, TOKENS - length :], alone[0], atol=1e-8, rtol=1e-8)


def test_padding_on_the_right_changes_nothing(mixer: Mixer, hidden: torch.Tensor) -> None:
    lengths = (TOKENS, TOKENS - 9, 5)
    valid = torch.stack([torch.arange(TOKENS) < length for length in lengths])
    padded = mixer(torch.where(valid[..., None], hidden, 100.0), valid=valid)
    for row, length in enumerate(lengths):
        alone = mixer(hidden[row : row + 1, :length])
        torch.testing.assert_close(padded[row, :length], alone[0], atol=1e-8, rtol=1e-8)


def test_every_parameter_learns(mixer: Mixer, hidden: torch.Tensor) -> None:
    mixer.train()
    loss = mixer(hidden).square().mean() + sum(mixer.losses.values())
    loss.backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_half_precision_is_near(mixer: Mixer, hidden: torch.Tensor) -> None:
    whole = mixer(hidden)
    half = mixer.bfloat16()(hidden.bfloat16())
    assert half.dtype == torch.bfloat16
    assert (half.double() - whole).norm() / whole.norm() < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_named(name: str) -> None:
    with pytest.raises(InputError, match=r"heads"):
        make_mixer(name, 30, 4)


def test_unknown_names_and_options() -> None:
    with pytest.raises(InputError, match="did you mean softmax"):
        make_mixer("sofmax", 32, 4)
    with pytest.raises(InputError, match="speed"):
        make_mixer("softmax", 32, 4, speed=3)
