"""The softmax over scores of keys alone against a masked softmax over rows."""

from __future__ import annotations

import torch
from torch.nn.functional import silu

from regard.ops.position_softmax import position_softmax, self_gate


def draw(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, tokens, generator=generator, dtype=torch.float64)
    return scores, torch.randn(2, 3, tokens, 4, generator=generator, dtype=torch.float64)


def masked(scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    tokens = scores.shape[-1]
    rows = scores[..., None, :].expand(*scores.shape, tokens)
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return rows.masked_fill(hidden, -torch.inf).softmax(-1) @ value


def test_it_is_a_masked_softmax() -> None:
    scores, value = draw(300)
    torch.testing.assert_close(position_softmax(scores, value)[0], masked(scores, value))


def test_scores_of_a_thousand_are_safe() -> None:
    scores, value = draw(40)
    scores = 1e3 * scores
    torch.testing.assert_close(position_softmax(scores, value)[0], masked(scores, value))


def test_goes_on_from_a_state() -> None:
    scores, value = draw(20)
    state, parts = None, []
    for s, v in zip(scores.split([1, 12, 7], 2), value.split([1, 12, 7], 2), strict=True):
        part, state = position_softmax(s, v, state=state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 2), position_softmax(scores, value)[0])


def test_padding_is_as_if_it_were_not_there() -> None:
    scores, value = draw(9)
    valid = torch.arange(9).expand(2, 9) >= 3
    noisy = torch.where(valid[:, None, :, None], value, torch.inf)
    found, _ = position_softmax(scores + 99.0 * ~valid[:, None], noisy, valid=valid)
    torch.testing.assert_close(
        found[:, :, 3:], position_softmax(scores[..., 3:], value[:, :, 3:])[0]
    )
    assert found[:, :, :3].abs().max() == 0


def test_a_token_meets_itself_alone() -> None:
    query, key = torch.randn(2, 2, 3, 5, 8, dtype=torch.float64).unbind()
    pairs = silu(query) @ key.mT / 8**0.5
    torch.testing.assert_close(self_gate(query, key), pairs.diagonal(dim1=-2, dim2=-1))


def test_gradients() -> None:
    scores, value = (one[:1, :1, :5].requires_grad_() for one in draw(5))
    assert torch.autograd.gradcheck(lambda s, v: position_softmax(s, v)[0], (scores, value))
