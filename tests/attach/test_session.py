"""Attaching and leaving: whatever happens in between, the model is as it was."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard.attach as room
from regard._errors import AttachError, InputError
from regard.attach import HookedAttention, PartialAttachWarning, Session, attach, session
from regard.engine import AttentionCall, Block, Method, State


class Reader(Method):
    """Reads everything there is to read."""

    reads_only = True

    def __init__(self) -> None:
        self.rows = 0
        self.parts: list[str] = []
        self.calls: list[AttentionCall] = []
        self.stopped = 0

    def weights(self, block: Block) -> None:
        self.rows += len(block.rows)

    def after(self, call: AttentionCall) -> None:
        self.calls.append(call)

    def residual(self, state: State) -> None:
        self.parts.append(f"{state.part}{state.layer}")

    def neurons(self, state: State) -> None:
        self.parts.append(f"neurons{state.layer}")

    def stop(self) -> None:
        self.stopped += 1


class Silence(Method):
    """Zeroes every head."""

    def heads(self, call: AttentionCall, output: Tensor) -> Tensor:
        return torch.zeros_like(output)


def fingerprint(model: nn.Module) -> list[Any]:
    """Everything that attaching touches."""
    return [
        (
            m.config._attn_implementation if hasattr(m, "config") else None,
            list(m._forward_hooks),
            list(m._forward_pre_hooks),
            sorted(vars(m)),
        )
        for m in model.modules()
    ]


@pytest.fixture(autouse=True)
def nothing_left() -> Any:
    yield
    gc.collect()
    assert len(session._SESSIONS) == 0
    assert session._ORIGINALS == {}


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("end", [None, ValueError, KeyboardInterrupt])
def test_the_model_is_restored_however_it_ends(
    llama: Any, ids: Tensor, end: type[BaseException] | None
) -> None:
    before, plain = fingerprint(llama), logits(llama, input_ids=ids)
    reader = Reader()
    try:
        with attach(llama, reader, Silence()):
            assert not torch.equal(logits(llama, input_ids=ids), plain)
            if end is not None:
                raise end
    except (ValueError, KeyboardInterrupt):
        pass
    assert fingerprint(llama) == before
    assert torch.equal(logits(llama, input_ids=ids), plain)
    assert reader.stopped == 1


@pytest.mark.parametrize("hook", ["weights", "heads", "residual", "neurons", "start", "stop"])
def test_an_error_inside_a_method_leaves_nothing_behind(llama: Any, ids: Tensor, hook: str) -> None:
    before = fingerprint(llama)
    other, failing = Reader(), Method()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt(hook)

    setattr(failing, hook, fail)
    with pytest.raises(KeyboardInterrupt, match=hook), attach(llama, other, failing):
        logits(llama, input_ids=ids)
    assert fingerprint(llama) == before
    assert other.stopped == 1
    assert logits(llama, input_ids=ids).isfinite().all()


def test_methods_that_read_change_nothing_and_see_every_place(
    llama: Any, left_padded: dict[str, Tensor]
) -> None:
    plain = logits(llama, **left_padded)
    reader = Reader()
    with attach(llama, reader) as attached:
        found = logits(llama, **left_padded)
    valid = left_padded["attention_mask"].bool()
    torch.testing.assert_close(found[valid], plain[valid], atol=1e-5, rtol=1e-5)
    assert [str(site) for site in attached.sites.values()] == ["L0", "L1"]
    assert all(site.causal and site.kind == "self" for site in attached.sites.values())
    assert reader.rows == 2 * 12
    assert reader.parts == [
        "embed0",
        "attention0",
        "neurons0",
        "mlp0",
        "block0",
        "attention1",
        "neurons1",
        "mlp1",
        "block1",
    ]
    assert attached.additive == {"": True}
    assert all(torch.equal(call.valid, valid) for call in reader.calls)


def test_without_methods_the_kernels_are_the_same(
    llama: Any, left_padded: dict[str, Tensor]
) -> None:
    plain = logits(llama, **left_padded)
    before = fingerprint(llama)
    with attach(llama):
        assert fingerprint(llama) == before
        assert torch.equal(logits(llama, **left_padded), plain)


def test_stream_only_methods_leave_attention_alone(llama: Any, ids: Tensor) -> None:
    plain = logits(llama, input_ids=ids)

    class Stream(Method):
        def residual(self, state: State) -> None:
            return None

    with attach(llama, Stream()):
        assert llama.config._attn_implementation == "sdpa"
        assert torch.equal(logits(llama, input_ids=ids), plain)


def test_nested_sessions_stack_and_leave_in_any_order(llama: Any, ids: Tensor) -> None:
    before, plain = fingerprint(llama), logits(llama, input_ids=ids)
    outer, inner = Reader(), Reader()
    first = attach(llama, outer).__enter__()
    second = attach(llama, inner, Silence()).__enter__()
    silent = logits(llama, input_ids=ids)
    assert outer.rows == inner.rows == 24
    first.close()
    assert torch.equal(logits(llama, input_ids=ids), silent)
    assert (outer.rows, inner.rows) == (24, 48)
    second.close()
    second.close()
    assert fingerprint(llama) == before
    assert torch.equal(logits(llama, input_ids=ids), plain)


def test_a_session_can_be_used_again_but_not_twice_at_once(llama: Any, ids: Tensor) -> None:
    reader = Reader()
    attached = attach(llama, reader)
    for count in (1, 2):
        with attached:
            logits(llama, input_ids=ids)
            with pytest.raises(InputError, match="open already"):
                attached.__enter__()
        assert reader.rows == 24 * count


def test_nested_sessions_must_sample_alike(llama: Any, ids: Tensor) -> None:
    with (
        attach(llama, Reader()),
        attach(llama, Reader(), rows=1 / 4),
        pytest.raises(AttachError, match="must sample the same rows"),
    ):
        logits(llama, input_ids=ids)


def test_a_thousand_cycles_leak_nothing(ids: Tensor) -> None:
    import tiny_models

    llama = tiny_models.build("llama", num_hidden_layers=1)
    logits(llama, input_ids=ids)
    before = fingerprint(llama)

    def cycle(count: int) -> list[weakref.ref[Any]]:
        kept = []
        for i in range(count):
            reader = Reader()
            with attach(llama, reader) as attached:
                if i % 100 == 0:
                    logits(llama, input_ids=ids)
            kept += [weakref.ref(reader), weakref.ref(attached)]
        return kept

    gc.collect()
    cycle(5)
    gc.collect()
    objects = len(gc.get_objects())
    kept = cycle(1000)
    gc.collect()
    assert all(ref() is None for ref in kept)
    assert len(gc.get_objects()) - objects < 2500, "2,000 of these are the weak references above"
    assert fingerprint(llama) == before


def test_a_copy_made_while_attached_computes_the_same_and_is_not_observed(
    llama: Any, ids: Tensor
) -> None:
    plain = logits(llama, input_ids=ids)
    reader = Reader()
    with attach(llama, reader, Silence()):
        copied = copy.deepcopy(llama)
        torch.testing.assert_close(logits(copied, input_ids=ids), plain, atol=1e-5, rtol=1e-5)
        assert reader.rows == 0 and reader.parts == []
    torch.testing.assert_close(logits(copied, input_ids=ids), plain, atol=1e-5, rtol=1e-5)
    with attach(copied, Silence()):
        assert not torch.allclose(logits(copied, input_ids=ids), plain)
    torch.testing.assert_close(logits(copied, input_ids=ids), plain, atol=1e-5, rtol=1e-5)


def test_two_models_at_once_keep_apart(llama: Any, gemma2: Any, ids: Tensor) -> None:
    plain = logits(gemma2, input_ids=ids)
    left, right = Reader(), Reader()
    with attach(llama, left, Silence()), attach(gemma2, right):
        torch.testing.assert_close(logits(gemma2, input_ids=ids), plain, atol=1e-5, rtol=1e-5)
        assert (left.rows, right.rows) == (0, 24)
        logits(llama, input_ids=ids)
        assert (left.rows, right.rows) == (24, 24)


def test_a_method_may_run_another_attached_model_inside_its_hook(
    llama: Any, gemma2: Any, ids: Tensor
) -> None:
    plain, teacher = logits(llama, input_ids=ids), logits(gemma2, input_ids=ids)

    class Teacher(Method):
        def weights(self, block: Block) -> Tensor:
            torch.testing.assert_close(logits(gemma2, input_ids=ids), teacher, atol=1e-5, rtol=1e-5)
            return block.weights

    with attach(gemma2, Reader()), attach(llama, Teacher()):
        torch.testing.assert_close(logits(llama, input_ids=ids), plain, atol=1e-5, rtol=1e-5)


def test_threads_with_a_model_each(llama: Any, ids: Tensor) -> None:
    models = [copy.deepcopy(llama) for _ in range(4)]
    plain, failures = logits(llama, input_ids=ids), []

    def work(model: Any) -> None:
        for _ in range(20):
            reader = Reader()
            with attach(model, reader):
                found = logits(model, input_ids=ids)
            if reader.rows != 24 or not torch.allclose(found, plain, atol=1e-5):
                failures.append(reader.rows)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_what_cannot_be_attached_says_why(llama: Any) -> None:
    import tiny_models

    with pytest.raises(AttachError, match="MambaForCausalLM has no attention layers"):
        attach(tiny_models.build("mamba"), Reader()).__enter__()
    with pytest.raises(
        AttachError,
        match=r"BloomForCausalLM computes attention inside transformer.h.0.self_attention \(Bloom",
    ):
        attach(tiny_models.build("bloom"), Reader()).__enter__()
    with pytest.raises(AttachError, match="Linear has no attention layers"):
        attach(nn.Linear(2, 2), Reader()).__enter__()
    with pytest.raises(InputError, match=r"rows must be None .* got 1.5"):
        attach(llama, Reader(), rows=1.5)


def test_attention_out_of_reach_is_named_in_a_warning(ids: Tensor) -> None:
    import tiny_models

    model = tiny_models.randomise(tiny_models.build("got_ocr2"), 0)
    with (
        pytest.warns(PartialAttachWarning, match=r"vision_tower.*GotOcr2VisionAttention"),
        attach(model, Reader()) as attached,
    ):
        pass
    assert len(attached.unhooked) == 2 and not attached.mixers


def test_linear_attention_is_a_mixer_and_no_cause_for_a_warning() -> None:
    import tiny_models

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(tiny_models.build("minimax"), Reader()) as attached:
            pass
    assert attached.unhooked == []
    assert attached.mixers == ["model.layers.1.self_attn (MiniMaxLightningAttention)"]


def test_a_model_that_runs_without_attention_says_so(llama: Any, ids: Tensor) -> None:
    llama.model.layers = nn.ModuleList()
    llama.config.num_hidden_layers = 0
    with pytest.raises(AttachError, match="no attention layers"):
        attach(llama, Reader()).__enter__()


class Plain(HookedAttention):
    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        heads = hidden.unflatten(-1, (2, 4)).transpose(1, 2)
        return self.o_proj(self.attend(heads, heads, heads).transpose(1, 2).flatten(-2))


def test_modules_written_for_regard_have_the_same_hooks() -> None:
    model = nn.Sequential(Plain(), Plain())
    blocks = nn.Module()
    blocks.layers = nn.ModuleList(model)
    blocks.forward = lambda hidden: model(hidden)  # type: ignore[method-assign]
    reader = Reader()
    hidden = torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = blocks(hidden)
        with attach(blocks, reader) as attached:
            torch.testing.assert_close(blocks(hidden), plain, atol=1e-6, rtol=1e-5)
    assert reader.rows == 10
    assert [site.causal for site in attached.sites.values()] == [True, True]


def test_the_room_is_callable(llama: Any) -> None:
    assert isinstance(room(llama), Session)  # type: ignore[operator]
