"""Shares, bands and reach against eager maps and hand-built heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from instruments.reference import (
    eager_maps,
    entropy_rows,
    fixed_map,
    observe_call,
    tiny,
    token_batch,
    uniform,
)
from regard._errors import InputError
from regard.attach import attach
from regard.instruments import PatternProfile

pytestmark = pytest.mark.usefixtures("blocks")


def shares(maps: Tensor, window: int, width: int) -> dict[str, Tensor]:
    """Everything of the profile by loops over one map `[batch, heads, tokens, tokens]`."""
    batch, heads, tokens, _ = maps.shape
    seen = maps[0, 0] > 0
    rows = {
        name: torch.zeros(batch, heads, tokens, dtype=maps.dtype)
        for name in ("sink share", "local share", "global share")
    }
    bands = torch.zeros(batch, heads, width, dtype=maps.dtype)
    beyond = torch.zeros_like(bands)
    for t in range(tokens):
        first = int(seen[t].to(torch.uint8).argmax())
        for s in range(first, t + 1):
            weight, local = maps[..., t, s], t - s < window
            sink = s == first and not local
            name = "sink share" if sink else "local share" if local else "global share"
            rows[name][..., t] += weight
            if t - s < width:
                bands[..., t - s] += weight / tokens
                beyond[..., t - s] += 0 if sink else weight / tokens
    found = {name: value.mean((0, 2)) for name, value in rows.items()}
    keys = seen.sum(-1) + (maps[0, 0].sum(-1) < 0.999).to(maps.dtype)
    found["uniformity"] = (entropy_rows(maps).exp() / keys).mean((0, 2))
    found["bands"] = bands.mean(0)
    wanted = 0.9 * (found["local share"] + found["global share"])
    inside = beyond.mean(0).cumsum(-1) >= wanted[:, None] - 1e-9
    found["reach"] = torch.where(inside.any(-1), inside.to(torch.uint8).argmax(-1), width).double()
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "gpt2"])
@pytest.mark.parametrize(("window", "width"), [(3, 8), (4, 64)])
def test_the_profile_is_that_of_eager_maps(family: str, window: int, width: int) -> None:
    model, ids = tiny(family), token_batch()
    profile = PatternProfile(window, width)
    with torch.no_grad(), attach(model, profile):
        model(input_ids=ids)
    found, bands = profile.compute(), profile.bands()
    for key, full in eager_maps(model, input_ids=ids).items():
        expected = shares(full, window, width)
        for name in ("sink share", "local share", "global share", "uniformity", "reach"):
            torch.testing.assert_close(
                found[name].values[key].double(), expected[name], rtol=0, atol=3e-5, msg=name
            )
        torch.testing.assert_close(bands[key].double(), expected["bands"], rtol=0, atol=3e-5)


def test_hand_built_heads_are_told_apart() -> None:
    tokens = 60
    maps = torch.zeros(3, tokens, tokens)
    for t in range(tokens):
        maps[0, t, 0] = 1  # a sink head,
        maps[1, t, max(t - 2, 0)] = 1  # one that looks two tokens back,
        maps[2, t, : t + 1] = 1 / (t + 1)  # one that looks everywhere
    found = observe_call(PatternProfile(4, 32), fixed_map(maps)).compute()
    sink, local, wide = (
        found[name].values["", 0] for name in ("sink share", "local share", "global share")
    )
    assert float(sink[0]) == pytest.approx((tokens - 4) / tokens, abs=1e-6)
    assert float(local[1]) == pytest.approx(1, abs=1e-6)
    assert wide[2] > 0.7 and found["uniformity"]["L0H2"] == pytest.approx(1, abs=1e-5)
    assert found["reach"].values["", 0].tolist() == [3, 2, 32]
    torch.testing.assert_close(sink + local + wide, torch.ones(3))


def test_shares_of_uniform_rows_follow_the_window() -> None:
    tokens, window = 20, 5
    found = observe_call(PatternProfile(window, 10), uniform(1, tokens)).compute()
    local = sum(min(window, t + 1) / (t + 1) for t in range(tokens)) / tokens
    sink = sum(1 / (t + 1) for t in range(window, tokens)) / tokens
    assert found["local share"]["L0H0"] == pytest.approx(local, rel=1e-6)
    assert found["sink share"]["L0H0"] == pytest.approx(sink, rel=1e-6)


def test_encoders_and_cross_attention_have_no_profile() -> None:
    model = tiny("t5", "T5ForConditionalGeneration")
    profile = PatternProfile(3, 8)
    with torch.no_grad(), attach(model, profile):
        model(input_ids=token_batch(), decoder_input_ids=token_batch())
    assert {stack for stack, _ in profile.compute()["reach"].values} == {""}


@pytest.mark.parametrize(("window", "width"), [(0, 8), (9, 8), (16, 513)])
def test_widths_that_do_not_fit_are_refused(window: int, width: int) -> None:
    with pytest.raises(InputError, match="1 <= window <= width <= 512"):
        PatternProfile(window, width)
