"""Hydra: its paths side by side, and the language model with shared memories."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from regard._errors import InputError
from regard.nn import Hydra, HydraLanguageModel, LanguageModelConfig, hydra_mixers

SMALL = {
    "attention": {"window": 5, "stride": 8},
    "experts": {"chunk": 4, "inner": 16},
    "mamba": {"state_size": 4},
}


def model(**options: object) -> HydraLanguageModel:
    torch.manual_seed(0)
    memories = {"workspace": {"chunk": 4, "rank": 8}, "product_keys": {"keys": 8, "half": 8}}
    config = LanguageModelConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=4,
        mixers=hydra_mixers(4, **SMALL),
        intermediate_size=0,
        **{**memories, **options},  # type: ignore[arg-type]
    )
    return HydraLanguageModel(config).eval()


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(2))


def test_the_paths_add_up() -> None:
    mixer, hidden = Hydra(32, 4, **SMALL), torch.randn(2, 21, 32)  # type: ignore[arg-type]
    assert [round(gain.item(), 3) for gain in mixer.gains] == [0.8, 0.2, 0.5]
    parts = [
        gain * path(hidden) for gain, path in zip(mixer.gains, mixer.paths.values(), strict=True)
    ]
    torch.testing.assert_close(mixer(hidden), sum(parts))
    assert Hydra(32, 4, paths=["experts"]).positional is False


def test_the_paper_s_layout() -> None:
    paths = [options["paths"] for _, options in hydra_mixers(8)]
    assert [layer for layer, names in enumerate(paths) if "attention" in names] == [3, 7]
    assert [layer for layer, names in enumerate(paths) if "experts" in names] == [0, 2, 4, 6]
    assert all("mamba" in names for names in paths)
    assert all(
        options["paths"] == ["mamba"]
        for _, options in hydra_mixers(4, attention_every=0, experts_every=0)
    )


def test_the_future_changes_no_logit() -> None:
    double, text = model().double(), ids(2, 40)
    other = text.clone()
    other[:, 25:] = (other[:, 25:] + 7) % 50
    before, after = double(text).logits, double(other).logits
    torch.testing.assert_close(after[:, :25], before[:, :25], atol=1e-12, rtol=0)
    assert not torch.allclose(after[:, 25:], before[:, 25:])


def test_step_by_step_is_at_once_and_padding_says_nothing() -> None:
    double, text = model().double(), ids(2, 30)
    whole, states = double(text).logits, double.states()
    steps = [double(one, past_key_values=states).logits for one in text.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-10, rtol=0)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :13] = 0
    padded = double(text, attention_mask=mask).logits
    torch.testing.assert_close(padded[:1, 13:], double(text[:1, 13:]).logits, atol=1e-10, rtol=0)
    torch.testing.assert_close(padded[1], whole[1], atol=1e-10, rtol=0)


def test_memories_are_shared_and_matter() -> None:
    with_both = model()
    names = [
        name for name, _ in with_both.named_parameters() if "slots" in name or "values" in name
    ]
    assert names == ["memories.workspace.slots", "memories.product_keys.values"]
    for name in ("workspace", "product_keys"):
        torch.manual_seed(0)
        plain = model(**{name: None})
        assert name not in plain.memories
        full = {n: t for n, t in with_both.state_dict().items() if f"memories.{name}" not in n}
        plain.load_state_dict(full)
        text = ids(1, 20)
        assert not torch.equal(plain(text).logits, with_both(text).logits)
    twin = copy.deepcopy(with_both)
    with torch.no_grad():
        twin.memories["product_keys"].values.zero_()  # type: ignore[union-attr, operator]
    assert not torch.equal(twin(ids(1, 9)).logits, with_both(ids(1, 9)).logits)


def test_generates_saves_and_loads(tmp_path: Path) -> None:
    first, text = model(), ids(2, 9)
    found = first.generate(text, max_new_tokens=8, do_sample=False)
    plain = text
    for _ in range(8):
        plain = torch.cat([plain, first(plain).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, plain)
    first.save_pretrained(tmp_path)
    again = HydraLanguageModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(text).logits, first(text).logits)


def test_everything_learns() -> None:
    trained, text = model().train(), ids(8, 24)
    loss = trained(text, labels=text).loss
    loss.backward()
    idle = [n for n, p in trained.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []
    balance = [mixer.losses["balance"] for mixer in trained.mixers if "balance" in mixer.losses]
    assert len(balance) == 2
    plain = trained.eval()(text, labels=text).loss
    torch.testing.assert_close(loss, plain + sum(balance) / 4)


def test_bad_options_are_named() -> None:
    with pytest.raises(InputError, match="did you mean experts"):
        Hydra(32, 4, paths=["expert"])
    with pytest.raises(InputError, match="paths"):
        Hydra(32, 4, paths=[])
    with pytest.raises(InputError, match="slots"):
        model(workspace={"slots": 0})
