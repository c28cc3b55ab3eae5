"""Attached models at work: generation, caches, padding, packing, training, 16 bit, wrappers, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regard.attach import attach, equality
from regard.engine import AttentionCall, Block, Method, State


class Reader(Method):
    reads_only = True

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []
        self.entropy: list[Tensor] = []
        self.visible: list[Tensor] = []

    def weights(self, block: Block) -> None:
        self.entropy.append(block.entropy)
        self.visible.append(block.counts)

    def after(self, call: AttentionCall) -> None:
        self.calls.append(call)

    def residual(self, state: State) -> None:
        return None


class Scale(Method):
    """Scales one head; changes what is generated, so that equality is not trivial."""

    def heads(self, call: AttentionCall, output: Tensor) -> Tensor:
        return output * torch.linspace(0, 3, call.heads)[:, None, None]


@pytest.fixture(params=["llama", "gemma2"])
def model(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_with_left_padding(model: Any, left_padded: dict[str, Tensor], beams: int) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "num_beams": beams,
        "do_sample": False,
    }
    plain = model.generate(**left_padded, **settings)
    reader = Reader()
    with attach(model, reader):
        found = model.generate(**left_padded, **settings)
    assert torch.equal(found, plain)
    decoding = [call for call in reader.calls if call.phase == "decode"]
    assert len(decoding) >= 2 * 4 and {call.queries for call in decoding} == {1}
    last = decoding[-1]
    assert last.query_offset + 1 == last.keys or model.config.model_type == "gemma2"
    assert last.key_valid is not None and int((~last.key_valid).sum()) in (0, 4 * beams)


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_method_that_changes_heads_changes_prefill_and_decoding_alike(
    llama: Any, left_padded: dict[str, Tensor], cache: str | None
) -> None:
    """Teacher-forced logits over the whole sequence equal those of generate() step by step."""
    with attach(llama, Scale()):
        out = llama.generate(
            **left_padded, max_new_tokens=5, min_new_tokens=5, do_sample=False, cache_implementation=cache,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        mask = torch.cat([left_padded["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            whole = llama(
                input_ids=out.sequences, attention_mask=mask, position_ids=positions
            ).logits
    for step, logits in enumerate(out.logits):
        close(logits, whole[:, 11 + step])


def test_a_static_cache_shows_only_the_slots_in_use(model: Any, ids: Tensor) -> None:
    from transformers import StaticCache

    def run() -> list[Tensor]:
        cache = StaticCache(config=model.config, max_cache_len=32)
        mask = torch.ones(2, 12, dtype=torch.long)
        found = []
        with torch.no_grad():
            for start, end in ((0, 7), (7, 11), (11, 12)):
                given = ids[:, start:end]
                found.append(
                    model(
                        input_ids=given,
                        attention_mask=mask[:, :end],
                        position_ids=torch.arange(start, end)[None],
                        past_key_values=cache,
                    ).logits
                )
        return found

    plain = run()
    reader = Reader()
    with attach(model, reader):
        found = run()
    for left, right in zip(found, plain, strict=True):
        close(left, right)
    full = reader.calls[1::2]  # gemma2's first layer has a window
    assert [call.query_offset for call in full] == [0, 7, 11]
    assert reader.visible[-1].max() == 12 and full[-1].keys == 32


def test_chunked_prefill_equals_one_prefill(model: Any, left_padded: dict[str, Tensor]) -> None:
    ids, mask = left_padded["input_ids"], left_padded["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        reader = Reader()
        with attach(model, reader):
            first = model(
                input_ids=ids[:, :5],
                attention_mask=mask[:, :5],
                position_ids=positions[:, :5],
                use_cache=True,
            )
            second = model(
                input_ids=ids[:, 5:], attention_mask=mask, position_ids=positions[:, 5:],
                past_key_values=first.past_key_values,
            )  # fmt: skip
    valid = mask.bool()
    close(first.logits[valid[:, :5]], whole[:, :5][valid[:, :5]])
    close(second.logits[valid[:, 5:]], whole[:, 5:][valid[:, 5:]])
    assert reader.calls[-1].query_offset + reader.calls[-1].queries == reader.calls[-1].keys


def test_packed_sequences_do_not_see_each_other(model: Any, ids: Tensor) -> None:
    packed = ids[:1]
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with torch.no_grad():
        plain = model(input_ids=packed, position_ids=positions, use_cache=False).logits
        reader = Reader()
        with attach(model, reader):
            found = model(input_ids=packed, position_ids=positions, use_cache=False).logits
            alone = model(input_ids=packed[:, 5:]).logits
    close(found, plain)
    close(found[:, 5:], alone)
    counts = reader.visible[1 if model.config.model_type == "gemma2" else 0][0]
    assert counts.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 6, 7]


def test_a_mask_with_four_dimensions_is_taken_as_it_is(llama: Any, ids: Tensor) -> None:
    visible = (torch.rand(2, 1, 12, 12) > 0.4).tril() | torch.eye(12).bool()
    with torch.no_grad():
        plain = llama(input_ids=ids, attention_mask=visible).logits
        reader = Reader()
        with attach(llama, reader):
            found = llama(input_ids=ids, attention_mask=visible).logits
    close(found, plain)
    assert torch.equal(reader.visible[0], visible.sum(-1)[:, 0].float())


def test_the_padding_mask_is_found_however_it_is_passed(
    llama: Any, left_padded: dict[str, Tensor]
) -> None:
    reader = Reader()
    with attach(llama, reader), torch.no_grad():
        llama(left_padded["input_ids"], left_padded["attention_mask"])
    assert torch.equal(reader.calls[0].valid, left_padded["attention_mask"].bool())


def test_sampled_rows_leave_the_output_and_cost_fewer_rows(
    llama: Any, left_padded: dict[str, Tensor]
) -> None:
    with torch.no_grad():
        plain = llama(**left_padded).logits
        reader = Reader()
        with attach(llama, reader, rows=1 / 4, seed=3):
            found = llama(**left_padded).logits
        again = Reader()
        with attach(llama, again, rows=1 / 4, seed=3):
            llama(**left_padded)
    close(found[left_padded["attention_mask"].bool()], plain[left_padded["attention_mask"].bool()])
    assert [tuple(e.shape) for e in reader.entropy] == [(2, 4, 3)] * 2
    assert all(torch.equal(a, b) for a, b in zip(reader.entropy, again.entropy, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(model: Any, left_padded: dict[str, Tensor], dtype: torch.dtype) -> None:
    model, given = model.to(dtype), left_padded
    if (
        dtype == torch.float64
    ):  # with padding, eager Gemma 2 itself gives NaN: its softmax is in float32
        given = {"input_ids": left_padded["input_ids"]}
    result = equality(model, given, tolerance=1e-6 if dtype == torch.float64 else None)
    assert result.holds and result.scale > 0.1


def test_training_through_an_attached_model_gives_the_same_gradients(
    model: Any, left_padded: dict[str, Tensor]
) -> None:
    model.train()
    valid = left_padded["attention_mask"].bool()
    predicted = valid & valid.roll(1, -1)  # the token before is no padding either
    labels = left_padded["input_ids"].masked_fill(~predicted, -100)

    def gradients(*methods: Method) -> list[Tensor]:
        model.zero_grad()
        with attach(model, *methods):
            model(**left_padded, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    plain, reader = gradients(), Reader()
    for expected, found in zip(plain, gradients(reader), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not any(entropy.requires_grad for entropy in reader.entropy)


def test_gradient_checkpointing_runs_the_methods_again(llama: Any, ids: Tensor) -> None:
    llama.train()
    llama.gradient_checkpointing_enable()
    with attach(llama, Scale()):
        llama(input_ids=ids, labels=ids).loss.backward()
    checkpointed = [p.grad.clone() for p in llama.parameters()]
    llama.gradient_checkpointing_disable()
    llama.zero_grad()
    with attach(llama, Scale()):
        llama(input_ids=ids, labels=ids).loss.backward()
    for found, expected in zip(checkpointed, llama.parameters(), strict=True):
        torch.testing.assert_close(found, expected.grad, atol=1e-5, rtol=1e-4)


def test_a_parameter_of_a_method_can_be_trained(llama: Any, ids: Tensor) -> None:
    gate = torch.nn.Parameter(torch.ones(4, 1, 1))

    class Gate(Method):
        def weights(self, block: Block) -> Tensor:
            return block.weights * gate

    for parameter in llama.parameters():
        parameter.requires_grad_(False)
    with attach(llama, Gate()):
        llama(input_ids=ids, labels=ids).loss.backward()
    assert gate.grad is not None and gate.grad.abs().min() > 0


def test_torch_compile_gives_the_same_numbers_before_and_after(llama: Any, ids: Tensor) -> None:
    compiled = torch.compile(llama, backend="eager")
    with torch.no_grad():
        plain = llama(input_ids=ids).logits
        close(compiled(input_ids=ids).logits, plain)
        reader = Reader()
        with attach(llama, reader):
            close(compiled(input_ids=ids).logits, plain)
        assert len(reader.calls) == 2
        with attach(llama, Scale()):
            assert not torch.allclose(compiled(input_ids=ids).logits, plain, atol=1e-3)
        close(compiled(input_ids=ids).logits, plain)


def test_adapters_by_peft(llama: Any, left_padded: dict[str, Tensor]) -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        llama, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).eval()
    with torch.no_grad():
        plain = wrapped(**left_padded).logits
        reader = Reader()
        with attach(wrapped, reader) as attached:
            found = wrapped(**left_padded).logits
    valid = left_padded["attention_mask"].bool()
    close(found[valid], plain[valid])
    assert [str(site) for site in attached.sites.values()] == ["L0", "L1"]


def test_a_decoder_with_cross_attention_names_its_stacks() -> None:
    import tiny_models

    model = tiny_models.randomise(tiny_models.build("t5", "T5ForConditionalGeneration"), 0)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 5:] = 0
    given = {
        "input_ids": torch.randint(10, 90, (2, 9)),
        "attention_mask": mask,
        "decoder_input_ids": torch.randint(10, 90, (2, 4)),
    }
    parts: list[tuple[str, str]] = []

    class Stream(Reader):
        def residual(self, state: State) -> None:
            parts.append((state.stack, state.part))

    reader = Stream()
    with torch.no_grad(), attach(model, reader) as attached:
        model(**given)
    assert {
        str(site): (site.kind, site.causal) for site in attached.sites.values() if site.layer == 0
    } == {
        "encoder.L0": ("self", False),
        "L0": ("self", True),
        "cross.L0": ("cross", False),
    }
    assert ("", "cross") in parts and ("encoder", "cross") not in parts
    assert attached.additive == {"encoder": True, "": True}
    encoder = next(call for call in reader.calls if call.site.stack == "encoder")
    assert torch.equal(encoder.valid, mask.bool())
    crossing = next(call for call in reader.calls if call.site.kind == "cross")
    assert crossing.valid is None and torch.equal(crossing.key_valid, mask.bool())


def test_blocks_that_share_an_attention_module_are_told_apart(ids: Tensor) -> None:
    import tiny_models

    layers = ["hybrid", "linear_attention", "hybrid"]
    model = tiny_models.build(
        "zamba2", layers_block_type=layers, num_hidden_layers=3, num_mem_blocks=1
    )
    places: list[tuple[str, int]] = []

    class Places(Method):
        def residual(self, state: State) -> None:
            places.append((state.part, state.layer))

        def after(self, call: AttentionCall) -> None:
            places.append(("site", call.site.layer))

    with torch.no_grad(), attach(tiny_models.randomise(model, 0), Places()):
        model(input_ids=ids)
    assert [layer for part, layer in places if part == "site"] == [0, 2]
    assert [layer for part, layer in places if part == "attention"] == [0, 2]


def test_a_key_mask_without_padded_queries_is_not_mistaken_for_one(llama: Any, ids: Tensor) -> None:
    reader = Reader()
    with attach(llama, reader), torch.no_grad():
        llama(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert reader.calls[0].valid is None and reader.calls[0].key_valid is None
