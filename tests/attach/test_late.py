"""Decode steps that are read late count as if each had been read in its step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import regard
from regard.attach.cache_names import takes
from regard.engine import Block, Method, late
from regard.instruments import Distance, Entropy, PatternProfile, PreviousToken, SinkMass
from regard.instruments.base import RowInstrument

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GREEDY = {"do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def instruments(*, reads_late: bool) -> list[RowInstrument]:
    made: list[RowInstrument] = [
        Entropy(),
        Distance(),
        SinkMass(from_query=2),
        PatternProfile(window=4, width=8),
        PreviousToken(),
    ]
    for one in made:
        one.reads_late = reads_late
    return made


def numbers(made: list[RowInstrument]) -> dict[str, torch.Tensor]:
    return {name: found.matrix("") for one in made for name, found in one.compute().items()} | {
        f"{type(one).__name__} rows": one.state[f"{next(iter(one.quantities))}.rows"]["", 0]
        for one in made
    }


def both(model: Any, run: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    found = []
    for reads_late in (True, False):
        made = instruments(reads_late=reads_late)
        with regard.attach(model, *made):
            run()
        found.append(numbers(made))
    return found[0], found[1]


def same(found: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]) -> None:
    for name, expected in found[1].items():
        torch.testing.assert_close(found[0][name], expected, atol=1e-5, rtol=1e-5, msg=name)


class Watch(Method):
    """Notes how many rows each block had."""

    reads_only = reads_late = True

    def __init__(self) -> None:
        self.rows: list[int] = []

    def weights(self, block: Block) -> None:
        if block.site.layer == 0:
            self.rows.append(len(block.rows))


@pytest.mark.parametrize("rows", [3, 128])
def test_generation_counts_the_same(
    model: LlamaForCausalLM, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late, "ROWS", rows)
    ids = torch.randint(1, 64, (2, 9))
    same(both(model, lambda: model.generate(ids, max_new_tokens=10, **GREEDY)))


def test_many_steps_make_one_block(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late, "ROWS", 4)
    watch = Watch()
    with regard.attach(model, watch):
        model.generate(torch.randint(1, 64, (1, 5)), max_new_tokens=11, min_new_tokens=11, **GREEDY)
    assert watch.rows == [5, 4, 4, 2]


def test_several_prompts_and_a_second_turn(model: LlamaForCausalLM) -> None:
    first, second = torch.randint(1, 64, (1, 7)), torch.randint(1, 64, (3, 4))

    def run() -> None:
        out = model.generate(first, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
        model.generate(second, max_new_tokens=6, **GREEDY)
        cache = out.past_key_values if hasattr(out, "past_key_values") else out.cache
        longer = torch.cat([out.sequences, first[:, :3]], 1)
        name = "cache" if takes(model, "cache") else "past_key_values"
        model.generate(longer, max_new_tokens=4, **{name: cache}, **GREEDY)

    same(both(model, run))


def test_beams_that_change_places(model: LlamaForCausalLM) -> None:
    ids = torch.randint(1, 64, (2, 6))
    same(both(model, lambda: model.generate(ids, num_beams=3, max_new_tokens=9, **GREEDY)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts(model: LlamaForCausalLM, side: str) -> None:
    ids, mask = torch.randint(1, 64, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[0, : 2 if side == "left" else 0] = 0
    if side == "right":
        mask[0, 4:] = 0
    run = lambda: model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)  # noqa: E731
    same(both(model, run))


def test_a_sliding_window_is_read_in_its_step() -> None:
    torch.manual_seed(1)
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)).eval()
    watch = Watch()
    with regard.attach(model, watch):
        model.generate(torch.randint(1, 64, (1, 4)), max_new_tokens=8, min_new_tokens=8, **GREEDY)
    assert watch.rows == [4] + [1] * 7
    ids = torch.randint(1, 64, (1, 4))
    same(both(model, lambda: model.generate(ids, max_new_tokens=8, **GREEDY)))


def test_a_result_asked_for_between_steps_is_complete(model: LlamaForCausalLM) -> None:
    entropy = Entropy()
    with regard.attach(model, entropy):
        model.generate(torch.randint(1, 64, (1, 5)), max_new_tokens=4, min_new_tokens=4, **GREEDY)
        entropy.compute()
        assert float(entropy.state["entropy.rows"]["", 1]) == 5 + 3
        entropy.reset()
        model.generate(torch.randint(1, 64, (1, 3)), max_new_tokens=3, min_new_tokens=3, **GREEDY)
    entropy.compute()
    assert float(entropy.state["entropy.rows"]["", 1]) == 3 + 2


def test_a_cropped_cache_starts_again(model: LlamaForCausalLM) -> None:
    from transformers import DynamicCache

    ids = torch.randint(1, 64, (1, 8))

    def step(cache: Any, tokens: torch.Tensor) -> None:
        name = "cache" if takes(model, "cache") else "past_key_values"
        model(input_ids=tokens, use_cache=True, **{name: cache})

    def run() -> None:
        with torch.no_grad():
            cache = DynamicCache()
            step(cache, ids[:, :4])
            for at in (4, 5, 6):
                step(cache, ids[:, at : at + 1])
            cache.crop(-2)
            for at in (2, 3, 1):
                step(cache, ids[:, at : at + 1])

    same(both(model, run))


def test_rows_wait_for_nothing_when_the_model_fails(model: LlamaForCausalLM) -> None:
    entropy = Entropy()

    def run() -> None:
        with regard.attach(model, entropy):
            model.generate(
                torch.randint(1, 64, (1, 5)), max_new_tokens=4, min_new_tokens=4, **GREEDY
            )
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    entropy.compute()
    assert float(entropy.state["entropy.rows"]["", 0]) == 5 + 3


def test_rows_of_a_batch_that_change_places_after_the_same_token(model: LlamaForCausalLM) -> None:
    """In the first layer the newest keys are then equal, although those before them are not."""
    from transformers import DynamicCache

    first, second = torch.tensor([[7, 3, 9, 4], [2, 8, 1, 6]]), torch.tensor([[5, 11], [12, 11]])
    name = "cache" if takes(model, "cache") else "past_key_values"

    def run() -> None:
        with torch.no_grad():
            cache = DynamicCache()
            for tokens in (first, second[:, :1], second[:, 1:]):
                model(input_ids=tokens, use_cache=True, **{name: cache})
            cache.reorder_cache(torch.tensor([1, 0]))
            for token in (13, 14):
                model(input_ids=torch.full((2, 1), token), use_cache=True, **{name: cache})

    same(both(model, run))
