"""Mixture of heads against multi-head attention, where the gates say that they are the same."""

from __future__ import annotations

import pytest
import torch

from regard._errors import InputError
from regard.nn import (
    LanguageModel,
    LanguageModelConfig,
    MixtureOfHeads,
    SoftmaxAttention,
    make_mixer,
)


def pair(**options: int) -> tuple[MixtureOfHeads, SoftmaxAttention]:
    """A mixture whose routers are 0, and multi-head attention with its weights."""
    torch.manual_seed(0)
    mixture = MixtureOfHeads(32, 4, **options).double()
    for router in (mixture.shared_router, mixture.routed_router, mixture.split_router):
        if router is not None:
            torch.nn.init.zeros_(router.weight)
    plain = SoftmaxAttention(32, 4, kv_heads=options.get("kv_heads")).double()
    plain.load_state_dict({k: v for k, v in mixture.state_dict().items() if "router" not in k})
    return mixture, plain


@pytest.mark.parametrize(
    "options",
    [
        {"shared": 4, "active": 0},
        {"shared": 0, "active": 4},
        {"shared": 1, "active": 3},
        {"shared": 2, "active": 2, "kv_heads": 2},
    ],
)
def test_even_gates_over_all_heads_are_multi_head_attention(options: dict[str, int]) -> None:
    mixture, plain = pair(**options)
    hidden = torch.randn(2, 9, 32).double()
    torch.testing.assert_close(mixture(hidden), plain(hidden), atol=1e-12, rtol=1e-12)


def test_output_is_the_sum_of_gated_heads() -> None:
    torch.manual_seed(1)
    mixture = MixtureOfHeads(32, 4, shared=1, active=2).double()
    _, plain = pair(shared=1, active=2)
    plain.load_state_dict({k: v for k, v in mixture.state_dict().items() if "router" not in k})
    hidden = torch.randn(2, 9, 32).double()
    gates, total = mixture.gates(hidden), torch.zeros(2, 9, 32).double()
    whole = plain.o_proj.weight.detach().clone()
    for head in range(4):
        alone = torch.zeros_like(whole)
        alone[:, 8 * head : 8 * head + 8] = whole[:, 8 * head : 8 * head + 8]
        plain.o_proj.weight = torch.nn.Parameter(alone)
        total = total + gates[..., head, None] * plain(hidden)
    torch.testing.assert_close(mixture(hidden), total, atol=1e-12, rtol=1e-12)
    assert ((gates > 0).sum(-1) == 3).all()


def test_balance_is_a_loss_of_training_alone() -> None:
    mixture, hidden = MixtureOfHeads(32, 4, shared=1, active=2), torch.randn(2, 9, 32)
    mixture(hidden)
    assert 0.019 < mixture.losses["load_balance"].item() < 0.031  # 0.01 x (2 when even, 3 at most)
    mixture.eval()(hidden)
    assert mixture.losses == {}
    assert MixtureOfHeads(32, 4, shared=4, active=0)(hidden) is not None


def test_a_model_adds_the_balance_to_its_loss() -> None:
    torch.manual_seed(0)
    config = LanguageModelConfig(vocab_size=20, hidden_size=32, num_hidden_layers=2, mixers=["moh"])
    model, ids = LanguageModel(config), torch.randint(20, (2, 12))
    training = model(ids, labels=ids).loss
    balance = sum(float(mixer.losses["load_balance"].detach()) for mixer in model.mixers) / 2
    assert float(training - model.eval()(ids, labels=ids).loss) == pytest.approx(balance, abs=1e-5)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="shared"):
        make_mixer("moh", 32, 4, shared=5)
    with pytest.raises(InputError, match=r"active.*1 \.\. 3"):
        make_mixer("moh", 32, 4, shared=1, active=0)
    with pytest.raises(InputError, match=r"active.*0 \.\. 0"):
        make_mixer("moh", 32, 4, shared=4, active=1)
    with pytest.raises(InputError, match="kv_heads"):
        make_mixer("moh", 32, 4, kv_heads=3)
