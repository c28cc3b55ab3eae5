"""The accumulator contract, held by every instrument that reads attention rows."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from instruments.reference import observe_call, random_call, tiny, token_batch, uniform
from regard._errors import InputError
from regard.attach import attach
from regard.engine import AttentionCall, Block, Method, Pipeline, attend
from regard.instruments import (
    WAAD,
    Distance,
    Entropy,
    FutureInfluence,
    Instrument,
    PatternProfile,
    PooledMaps,
    RowInstrument,
    SeriesInstrument,
    SinkMass,
    Sinks,
)

MAKE = {
    "entropy": Entropy,
    "distance": Distance,
    "sink mass": functools.partial(SinkMass, 3),
    "profile": functools.partial(PatternProfile, 3, 8),
    "waad": functools.partial(WAAD, 4),
    "fai": functools.partial(FutureInfluence, 3),
    "fai near": functools.partial(FutureInfluence, 2, 6),
    "sinks": Sinks,
    "maps": functools.partial(PooledMaps, 4),
}
every = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())
ROWS = ("entropy", "distance", "sink mass", "profile")
SERIES = ("waad", "fai", "fai near", "sinks")


def make_all(names: tuple[str, ...] = ROWS + SERIES) -> dict[str, Instrument]:
    return {name: MAKE[name]() for name in names}


def numbers(instrument: Instrument) -> dict[Any, list[Tensor]]:
    """Every number an instrument gives, by site."""
    if isinstance(instrument, SeriesInstrument):
        return dict(instrument.tokens().values)
    if isinstance(instrument, PooledMaps):
        return {key: [value] for key, value in instrument.compute().items()}
    found: dict[Any, list[Tensor]] = {}
    for measure in instrument.compute().values():
        for key, value in measure.values.items():
            found.setdefault(key, []).append(value)
    return found


def same(one: Instrument, other: Instrument, atol: float = 1e-6) -> None:
    left, right = numbers(one), numbers(other)
    assert left.keys() == right.keys() and left
    for key, values in left.items():
        assert len(values) == len(right[key])
        for a, b in zip(values, right[key], strict=True):
            torch.testing.assert_close(
                a.double(), b.double(), rtol=0, atol=atol, equal_nan=True, msg=f"{one} {key}"
            )


def read(model: Any, instruments: dict[str, Instrument], **inputs: Any) -> None:
    with torch.no_grad(), attach(model, *instruments.values()):
        model(**inputs)


def alone(model: Any, texts: list[Tensor]) -> list[dict[str, Instrument]]:
    """Each text read by itself."""
    found = []
    for ids in texts:
        instruments = make_all()
        read(model, instruments, input_ids=ids[None])
        found.append(instruments)
    return found


def same_as_alone(
    seen: dict[str, Instrument],
    apart: list[dict[str, Instrument]],
    spans: list[tuple[int, int, int]],
    atol: float = 2e-5,
) -> None:
    """`spans`: (row of the batch, first slot, slot after the last) of each text."""
    for name in ROWS:
        same(seen[name], functools.reduce(lambda a, b: a.merge(b), [a[name] for a in apart]), atol)
    for name in SERIES:
        table = numbers(seen[name])
        for one, (row, start, stop) in zip(apart, spans, strict=True):
            for key, values in numbers(one[name]).items():
                torch.testing.assert_close(
                    table[key][-1][row, :, start:stop].double(),
                    values[-1][0].double(),
                    rtol=0,
                    atol=atol,
                    equal_nan=True,
                    msg=f"{name} {key} row {row}",
                )


LENGTHS = (24, 15, 19)


@pytest.fixture
def texts() -> list[Tensor]:
    whole = token_batch(len(LENGTHS), max(LENGTHS))
    return [row[:length] for row, length in zip(whole, LENGTHS, strict=True)]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_row_of_a_padded_batch_is_as_if_alone(
    family: str, side: str, texts: list[Tensor], blocks: int
) -> None:
    model = tiny(family)
    ids = torch.zeros(len(texts), max(LENGTHS), dtype=torch.long)
    mask, spans = torch.zeros_like(ids), []
    for row, text in enumerate(texts):
        start = max(LENGTHS) - len(text) if side == "left" else 0
        ids[row, start : start + len(text)] = text
        mask[row, start : start + len(text)] = 1
        spans.append((row, start, start + len(text)))
    seen = make_all()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    read(model, seen, input_ids=ids, attention_mask=mask, position_ids=positions)
    same_as_alone(seen, alone(model, texts), spans)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_each_document_of_a_packed_row_is_as_if_alone(
    family: str, texts: list[Tensor], blocks: int
) -> None:
    model = tiny(family)
    ids = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    seen = make_all()
    read(model, seen, input_ids=ids, position_ids=positions, use_cache=False)
    ends = torch.tensor(LENGTHS).cumsum(0).tolist()
    spans = [(0, end - length, end) for end, length in zip(ends, LENGTHS, strict=True)]
    same_as_alone(seen, alone(model, texts), spans)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("prompt", [3, 10])
def test_generating_reads_what_one_pass_over_the_text_reads(
    family: str, prompt: int, blocks: int
) -> None:
    model, ids = tiny(family), token_batch(2, prompt)
    seen, whole = make_all(), make_all()
    with torch.no_grad(), attach(model, *seen.values()):
        text = model.generate(ids, do_sample=False, max_new_tokens=12, min_new_tokens=12)
    read(model, whole, input_ids=text[:, :-1])
    for name in ROWS + SERIES:
        same(seen[name], whole[name], 5e-5)
    for name in SERIES:  # one open sequence each, as long as the text
        assert [v.shape[-1] for v in numbers(seen[name])["", 0]] == [prompt + 11]


def test_generating_in_a_left_padded_batch(blocks: int) -> None:
    model, ids = tiny("llama"), token_batch(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    seen, whole = make_all(), make_all()
    with torch.no_grad(), attach(model, *seen.values()):
        text = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=6, min_new_tokens=6
        )
    mask = torch.nn.functional.pad(mask, (0, 5), value=1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    read(model, whole, input_ids=text[:, :-1], attention_mask=mask, position_ids=positions)
    for name in ROWS + SERIES:
        same(seen[name], whole[name], 5e-5)


@every
def test_two_halves_merge_to_the_whole(make: Any) -> None:
    batches = [token_batch(2, 24, seed) for seed in range(4)]
    model = tiny("llama")
    whole, first, second = make(), make(), make()
    for part, ids in zip((first, first, second, second), batches, strict=True):
        with torch.no_grad(), attach(model, whole, part):
            model(input_ids=ids)
    before = numbers(second)
    same(first.merge(second), whole)
    for key, values in numbers(second).items():
        assert all(torch.equal(a, b) for a, b in zip(values, before[key], strict=True))


@every
def test_a_batch_is_the_merge_of_its_rows(make: Any) -> None:
    model, ids = tiny("llama"), token_batch(4)
    whole, parts = make(), [make() for _ in ids]
    with torch.no_grad(), attach(model, whole):
        model(input_ids=ids)
    for row, part in zip(ids, parts, strict=True):
        with torch.no_grad(), attach(model, part):
            model(input_ids=row[None])
    merged = functools.reduce(lambda a, b: a.merge(b), parts)
    if isinstance(whole, SeriesInstrument):
        for key, values in numbers(whole).items():
            torch.testing.assert_close(
                torch.cat(numbers(merged)[key]), values[0], rtol=0, atol=1e-5, equal_nan=True
            )
    else:
        same(merged, whole, 1e-5)


def test_only_the_same_settings_merge() -> None:
    with pytest.raises(InputError, match="same kind and settings"):
        WAAD(10).merge(WAAD(5))
    with pytest.raises(InputError, match="same kind and settings"):
        Entropy().merge(Distance())  # type: ignore[arg-type]


@every
def test_reset_forgets_everything(make: Any) -> None:
    used, fresh = make(), make()
    observe_call(used, random_call(seed=1))
    used.reset()
    assert all(not table for table in used.state.values())
    for instrument in (used, fresh):
        observe_call(instrument, random_call(seed=2))
    same(used, fresh, 0)


def tensors(value: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that an object holds on to."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, AttentionCall):
        yield from (value.query, value.key, value.value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item, seen)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from tensors(item, seen)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value), seen)


@every
@pytest.mark.parametrize("rows", [None, 1 / 8])
def test_memory_grows_with_the_text_not_with_its_square(make: Any, rows: float | None) -> None:
    heads, held = 2, {}
    for tokens in (256, 512):
        instrument = observe_call(make(), random_call(1, heads, tokens), rows)
        held[tokens] = sum(t.untyped_storage().nbytes() for t in tensors(instrument))
        assert all(t.numel() < tokens * tokens for t in tensors(instrument))
    assert held[512] <= 2 * held[256] + 4096


@every
def test_a_finished_call_is_let_go(make: Any) -> None:
    """A kept call would keep the layer's queries, keys and values."""
    call, instrument = random_call(), make()
    observe_call(instrument, call)
    mine = {call.query.untyped_storage().data_ptr(), call.key.untyped_storage().data_ptr()}
    assert not mine & {t.untyped_storage().data_ptr() for t in tensors(instrument)}


class Fails(Method):
    """Raises in the middle of the second layer, once."""

    reads_only = True
    armed = True

    def weights(self, block: Block) -> None:
        if self.armed and block.site.layer == 1 and int(block.rows[0]) > 0:
            self.armed = False
            raise KeyboardInterrupt


@every
@pytest.mark.parametrize("again", ["same session", "new session"])
def test_an_interrupted_pass_leaves_a_usable_instrument(
    make: Any, again: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regard.engine import blockwise

    monkeypatch.setattr(blockwise, "block_size", lambda call, rows=None: 5)
    model, ids = tiny("llama"), token_batch(1)
    used, fresh, fails = make(), make(), Fails()
    with torch.no_grad(), attach(model, used, fails):
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=token_batch(1, seed=5))
        if again == "same session":
            used.compute()
            used.reset()
            model(input_ids=ids)
    if again == "new session":
        used.compute()
        used.reset()
        with torch.no_grad(), attach(model, used):
            model(input_ids=ids)
    with torch.no_grad(), attach(model, fresh):
        model(input_ids=ids)
    same(used, fresh, 1e-9)


@pytest.mark.parametrize("name", SERIES)
def test_a_series_goes_on_after_an_interruption_without_reset(name: str) -> None:
    model, ids = tiny("llama"), token_batch(1)
    used, fresh = MAKE[name](), MAKE[name]()
    with torch.no_grad(), attach(model, used, Fails()):
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=token_batch(1, 30, seed=5))
            model(input_ids=token_batch(1, 300, seed=5))
        model(input_ids=ids)
    with torch.no_grad(), attach(model, fresh):
        model(input_ids=ids)
    for key, values in numbers(fresh).items():
        torch.testing.assert_close(numbers(used)[key][-1], values[-1], equal_nan=True)


@every
def test_reading_in_inference_mode_and_then_without_it(make: Any) -> None:
    model, instrument, whole = tiny("llama"), make(), make()
    ids = token_batch(1, 12)
    with attach(model, instrument):
        with torch.inference_mode():
            first = model(input_ids=ids[:, :8], use_cache=True)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    with attach(model, whole), torch.no_grad():
        model(input_ids=ids[:, :8])
        model(input_ids=ids)
    same(instrument, whole, 1e-9)
    assert first.logits.is_inference()


@every
def test_reading_while_gradients_flow(make: Any) -> None:
    model, instrument, plain = tiny("llama"), make(), make()
    ids = token_batch()
    with attach(model, instrument):
        model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert not any(t.requires_grad for t in tensors(instrument))
    with torch.no_grad(), attach(model, plain):
        model(input_ids=ids)
    same(instrument, plain, 1e-5)


# ---- sampled rows ---------------------------------------------------------------------------------------------------


def sampled(make: Any, call: AttentionCall, seeds: range, rows: float) -> list[Instrument]:
    return [observe_call(make(), call, rows, seed) for seed in seeds]


# Shares of the first or the last keys fall like 1 / t on random weights, so a few early rows carry them: mean and error are
# right on average over draws, but the band of one draw covers less than a normal distribution would.
@pytest.mark.parametrize("name", ["entropy", "distance", "sink mass", "profile"])
@pytest.mark.parametrize("tokens", [256, 250])
def test_sampled_means_are_unbiased_and_their_errors_honest(name: str, tokens: int) -> None:
    call = random_call(2, 3, tokens)
    call.valid = torch.ones(2, tokens, dtype=torch.bool)
    call.valid[1, 100:180] = False
    exact = observe_call(MAKE[name](), call).compute()
    runs = [one.compute() for one in sampled(MAKE[name], call, range(120), 1 / 16)]
    for measure in MAKE[name].func.quantities if name in ("sink mass", "profile") else exact:
        means = torch.stack([run[measure].values["", 0] for run in runs]).double()
        errors = torch.stack([run[measure].error["", 0] for run in runs]).double()
        truth = exact[measure].values["", 0].double()
        assert exact[measure].error == {}
        spread = means.std(0)
        off = (means.mean(0) - truth).abs()
        edge = 0.02 * truth.abs() if tokens % 16 else 0  # the last stratum is shorter
        assert (off <= 4 * spread / len(runs) ** 0.5 + edge + 1e-9).all(), measure
        assert (errors.square().mean(0).sqrt() >= 0.8 * spread).all(), measure
        if name in ("entropy", "distance"):
            inside = ((means - truth).abs() <= 3 * errors + 1e-9).double().mean()
            assert inside >= 0.95, (measure, inside)


def test_sequences_that_share_their_rows_do_not_shrink_the_error() -> None:
    one = random_call(1, 2, 256)
    four = AttentionCall.make(*(t.expand(4, -1, -1, -1) for t in (one.query, one.key, one.value)))
    few, many = (observe_call(Entropy(), call, 1 / 16).compute() for call in (one, four))
    for name in few:
        torch.testing.assert_close(few[name].values, many[name].values)
        torch.testing.assert_close(few[name].error, many[name].error)


def test_texts_add_up_and_shrink_the_error() -> None:
    once, often = Entropy(), Entropy()
    observe_call(once, random_call(1, 2, 256), 1 / 16)
    for seed in range(9):
        observe_call(often, random_call(1, 2, 256, seed), 1 / 16, seed)
    ratio = once.compute()["entropy"].error["", 0] / often.compute()["entropy"].error["", 0]
    assert 1.8 < float(ratio.mean()) < 5


def test_sampled_and_exact_calls_weigh_by_the_rows_they_stand_for() -> None:
    """A sampled prompt and exact decode steps: a step is one row, not sixteen."""
    mixed, exact = Distance(), Distance()
    long, short = random_call(1, 2, 1024, 1), random_call(1, 2, 16, 2)
    observe_call(mixed, long, 1 / 16)
    observe_call(mixed, short)
    for call in (long, short):
        observe_call(exact, call)
    got, want = mixed.compute()["distance"], exact.compute()["distance"]
    assert float(mixed.state["distance.rows"]["", 0]) == 1040
    off = (got.values["", 0] - want.values["", 0]).abs()
    assert (off <= 4 * got.error["", 0]).all()


def test_one_sampled_row_has_an_unknown_error() -> None:
    found = observe_call(Entropy(), random_call(1, 2, 12), 1 / 16).compute()["entropy"]
    assert found.error["", 0].isnan().all() and found.values["", 0].isfinite().all()


def test_sampled_series_are_unbiased() -> None:
    call = random_call(1, 2, 128)
    exact = observe_call(Sinks(), call).mass().values["", 0][0]
    runs = torch.stack(
        [one.mass().values["", 0][0] for one in sampled(Sinks, call, range(150), 1 / 16)]
    )
    off = (runs.mean(0) - exact).abs()
    assert (off <= 5 * runs.std(0) / len(runs) ** 0.5 + 1e-9).all()
    near = observe_call(WAAD(4), call).compute().tensor()
    found = observe_call(WAAD(4), call, 1 / 16).compute().tensor()
    known = ~found.isnan()
    assert int(known[0, 0].sum()) == 8
    torch.testing.assert_close(found[known], near[known])


# ---- processes, tables and pictures -----------------------------------------------------------------------------------

WORKER = """
import sys
import torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[3:]
from instruments.reference import observe_call, random_call
from regard.instruments import Entropy, Sinks
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
entropy, sinks = Entropy(), Sinks()
for instrument in (entropy, sinks):
    observe_call(instrument, random_call(2, 3, 30, rank))
    instrument.gather()
torch.save((entropy.state, sinks.state), f"{store}.{rank}")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_gather_the_whole(tmp_path: Path) -> None:
    store = tmp_path / "store"
    tests = Path(__file__).parents[1]
    command = [sys.executable, "-c", WORKER]
    rest = [str(store), str(tests), str(tests.parent / "src")]
    workers = [subprocess.Popen([*command, str(rank), *rest]) for rank in range(2)]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    whole = Entropy(), Sinks()
    for rank in range(2):
        for instrument in whole:
            observe_call(instrument, random_call(2, 3, 30, rank))
    for rank in range(2):
        gathered = Entropy(), Sinks()
        for instrument, state in zip(gathered, torch.load(f"{store}.{rank}"), strict=True):
            instrument.state = state
        for one, other in zip(gathered, whole, strict=True):
            same(one, other, 0)


def test_gather_without_processes_changes_nothing() -> None:
    entropy = observe_call(Entropy(), random_call())
    state = entropy.state
    assert entropy.gather() is entropy and entropy.state is state


@every
def test_every_instrument_tabulates_and_draws_itself(make: Any) -> None:
    import matplotlib.pyplot as plt

    instrument = make()
    observe_call(instrument, random_call(2, 3, 20))
    observe_call(instrument, random_call(1, 3, 12))
    table = instrument.to_frame()
    assert {"stack", "layer", "head", "value"} <= set(table.columns)
    assert instrument.plot() is not None
    assert repr(instrument).endswith("[1 sites observed]")
    if isinstance(instrument, SeriesInstrument):
        assert table.height == 3 * (2 * 20 + 12)
        picked = table.filter(head=2, sequence=0, row=1)["value"].to_torch()
        torch.testing.assert_close(
            picked.double(), numbers(instrument)["", 0][0][1, 2], equal_nan=True, atol=1e-6, rtol=0
        )
        ax = instrument.plot(heads=["L0H1", "L0H2"], sequence=0)
        assert [line.get_label() for line in ax.lines] == ["L0H1", "L0H2"]
        assert ax.get_xlabel() == "token" and len(ax.lines[0].get_ydata()) == 20
    plt.close("all")


@pytest.mark.parametrize("name", SERIES)
def test_a_table_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="has not observed anything yet"):
        MAKE[name]().to_frame()


class Halved(RowInstrument):
    """A reader that hands over a view of the weights, as a newcomer might."""

    quantities = {"last": ("share", "weight on the newest key")}

    def weights(self, block: Block) -> None:
        self.add_rows(block, last=block.weights[..., -1])


def test_a_view_of_the_weights_is_copied(blocks: int) -> None:
    tokens = 40
    full = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
    call = random_call(1, 2, tokens, mask=full)
    scores = torch.einsum("bhqd,bhkd->bhqk", call.query, call.key) * call.scaling
    expected = torch.softmax(scores, -1)[..., -1].mean((0, 2))
    found = observe_call(Halved(), call).compute()["last"].values["", 0]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_an_instrument_without_results_says_so() -> None:
    class Empty(Instrument):
        def compute(self) -> dict[str, Any]:
            return {}

    with pytest.raises(InputError, match="Empty has no per-head result to tabulate"):
        Empty().to_frame()
    with pytest.raises(TypeError, match="does not define compute"):
        Instrument().compute()
    attend(uniform(1, 4), Pipeline([Empty()]))
