"""`regard.report`: run a model over a text, measure, and put everything into one `ReportData`."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import regard
from regard._errors import AttachError, InputError, ModelError
from regard._progress import progress
from regard.attach import equality
from regard.instruments.observe import context_length, model_inputs, token_ids
from regard.pretrained import load, provenance, tokenizer_of
from regard.report import measuring
from regard.report.budget import budget
from regard.report.document import Report
from regard.report.files import check_writable
from regard.report.findings import write_findings
from regard.report.measuring import Measured
from regard.report.reading import Reading, read, stacks
from regard.report.schema import Header, Intervention, ReportData, Stack

EXACT_UP_TO = 4096
"""Tokens up to which every query row is read by default."""
SAMPLED = 1 / 16
DEFAULT_TOKENS = 2048


def report(
    model: nn.Module | str = "smollm2",
    text: str | Tensor | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    rows: float | None = None,
    seed: int = 0,
    tokens: int | None = None,
    quick: bool = False,
    tokenizer: Any = None,
) -> Report:
    """Where a model's attention goes on a text, what is wasted, and what could be saved.

    Args:
        model: a live transformers model, or a name or path that `regard.load` takes.
        text: the text, or token ids `[tokens]`; about 2,000 tokens of English when None.
        out: where to write the page; the data goes beside it as .json and .parquet. None writes nothing.
        rows: None reads every query row up to 4,096 tokens and one in 16 above; 1.0 forces exact, 1/16 forces sampled.
        tokens: read at most this many tokens.
        quick: leave out what needs more than one pass (ablation, needle task, probes, domains, doses).

    Returns:
        a `Report`: `.data`, `.save(path)`, `.show()`; in a notebook it draws itself.

    Raises:
        InputError: an empty or overlong text, or bad settings.
        OutputError: `out` cannot be written (found out before any work).
        ModelError, AttachError: the model cannot be read or hooked.

    Cost: with SmolLM2 (135 M) and 2,048 tokens about a minute quick and a few minutes in full on two cores.
    """
    target = None if out is None else check_writable(out)
    began = time.perf_counter()
    if tokens is not None and tokens < 2:
        raise InputError.of("tokens", given=tokens, expected="at least 2")
    if rows is not None and not 0 < rows <= 1:
        raise InputError.of("rows", given=rows, expected="None or a share in (0, 1]")
    named = model if isinstance(model, str) else None
    subject = load(model) if isinstance(model, str) else model
    if subject.training:
        raise InputError(
            "the model is in training mode, where dropout blurs attention; call model.eval() first"
        )
    tokenizer = tokenizer_of(subject, tokenizer)
    ids, source = _tokens(subject, text, tokens, tokenizer)
    if rows is None:
        rows = 1.0 if ids.shape[1] <= EXACT_UP_TO else SAMPLED
    command = _command(named, text, ids.shape[1], rows, seed, quick)
    data = collect(subject, ids, rows, seed, quick, tokenizer, command, source)
    data.header.seconds = time.perf_counter() - began
    result = Report(data)
    if target is not None:
        result.save(target)
    return result


def _tokens(
    model: nn.Module, text: str | Tensor | None, tokens: int | None, tokenizer: Any
) -> tuple[Tensor, str]:
    limit = context_length(model)
    given: str | Tensor
    if text is None:
        from regard.texts import default_text

        tokens = min(tokens or DEFAULT_TOKENS, limit or DEFAULT_TOKENS)
        given, source = default_text(tokenizer, tokens), "English prose from Python's documentation"
    else:
        given, source = text, "token ids" if isinstance(text, Tensor) else "the given text"
    if tokens is not None:
        if isinstance(given, str):
            if not given.strip():
                raise InputError("the text is empty; give at least one word")
            given = torch.tensor(tokenizer(given, verbose=False)["input_ids"])
        given = given[..., :tokens]
    ids = token_ids(model, given, tokenizer)["input_ids"]
    if ids.shape[0] != 1:
        raise InputError(f"a report reads one text, got a batch of {ids.shape[0]}")
    return ids, source


def _command(
    name: str | None, text: str | Tensor | None, tokens: int, rows: float, seed: int, quick: bool
) -> str:
    words = ["regard", "report", shlex.quote(name or "MODEL")]
    words += ["--tokens", str(tokens)] if text is None else ["--text", "FILE"]
    words += ["--rows", "exact" if rows >= 1 else f"1/{round(1 / rows)}", "--seed", str(seed)]
    return " ".join(words + (["--quick"] if quick else []))


def collect(
    model: nn.Module,
    ids: Tensor,
    rows: float,
    seed: int,
    quick: bool,
    tokenizer: Any,
    command: str,
    source: str,
) -> ReportData:
    """Everything the page shows. Sections that a model cannot have are left out and named under limits."""
    limits: list[str] = []
    pieces = [tokenizer.decode([token]) for token in ids[0].tolist()]
    measured = Measured()
    steps = 2 if quick else 9
    with progress(steps, "Comparing with the untouched model") as advance:
        equal = equality(model, model_inputs(model, ids[:, :256]))
        advance(
            1, "Reading every attention row" if rows >= 1 else "Reading a sample of attention rows"
        )
        reading = read(model, ids, None if rows >= 1 else rows, seed)
        found = stacks(reading, pieces)
        main = found[0]
        advance(1)
        _static(model, ids, reading, main, limits)
        if not quick:
            _causal(model, ids, reading, main, measured, seed, limits, advance)
    header = _header(model, ids, rows, seed, command, source, reading, tokenizer)
    header.equality, header.equality_tolerance = (
        equal.difference,
        equal.tolerance * max(equal.scale, 1.0),
    )
    _tag(main)
    return ReportData(
        header,
        write_findings(main, measured, command),
        found,
        _interventions(measured, command),
        limits + _limits(rows),
    )


def _optional(limits: list[str], what: str, section: Callable[[], None]) -> None:
    """Runs a section; what a model cannot have is noted instead of failing the report."""
    try:
        section()
    except (AttachError, InputError, ModelError, NotImplementedError, ValueError) as error:
        limits.append(f"{what}: not measured ({error}).")


def _static(
    model: nn.Module, ids: Tensor, reading: Reading, main: Stack, limits: list[str]
) -> None:
    def peaks() -> None:
        found = reading.instruments["ResidualPeaks"].compute()
        if main.name in found:
            measuring.skyline(found[main.name], main)

    _optional(limits, "Peaks of the residual stream", peaks)
    if main.causal and generates(model):

        def section() -> None:
            sinks: Any = reading.instruments["Sinks"]
            mass = sinks.mass().tensor(main.name)[..., : ids.shape[1]].nan_to_num().numpy()
            main.budget = budget(model, ids, mass)
            fifth = next(level for level in main.budget.levels if level.fraction == 0.2)
            if main.sequence is not None:
                main.sequence.kept = fifth.kept[fifth.kept.any(1)].mean(0)

        _optional(limits, "Key-value budget", section)


def generates(model: nn.Module) -> bool:
    """Whether the model is a decoder that predicts the next token of its own input."""
    config: Any = getattr(model, "config", None)
    return (
        "CausalLM" in type(model).__name__
        or (
            hasattr(model, "generate")
            and not getattr(config, "is_encoder_decoder", False)
            and "ConditionalGeneration" in type(model).__name__
        )
        or type(model).__name__.endswith("LMHeadModel")
    )


def _causal(
    model: nn.Module,
    ids: Tensor,
    reading: Reading,
    main: Stack,
    measured: Measured,
    seed: int,
    limits: list[str],
    advance: Any,
) -> None:
    if not (main.causal and generates(model)):
        limits.append(
            "Ablation, probes, needle task and doses need a causal language model; they were left out."
        )
        return
    sink = reading.measures["sink mass"]
    relative = reading.measures["relative write norm"]
    sections: list[tuple[str, Callable[[], None]]] = [
        ("Silencing heads one at a time", lambda: measuring.ablation(model, main, measured, 256)),
        ("Silencing parked heads", lambda: _parked(model, sink, measured, seed)),
        ("Probing with repeated tokens", lambda: measuring.probes(model, main, measured, seed)),
        ("Looking for needles", lambda: measuring.retrieval(model, main, measured, seed)),
        ("Comparing kinds of text", lambda: measuring.domains(model, main, measured, seed)),
        (
            "Capping massive activations",
            lambda: measuring.massive(model, ids, main, measured, seed),
        ),
        (
            "Comparing definitions of dormant",
            lambda: measuring.dormant(main, measured, sink, relative),
        ),
    ]
    for what, section in sections:
        advance(0, what)
        if what.startswith("Comparing definitions") and measured.importance is None:
            continue
        _optional(limits, what, section)
        advance(1)


def _parked(model: nn.Module, sink: Any, measured: Measured, seed: int) -> None:
    measuring.parked(model, sink, measured, seed)


def _tag(stack: Stack) -> None:
    """Words on the head cards for what a head does most clearly."""
    rules = (
        ("sink", 0.8, "parked on the first token"),
        ("previous_token", 0.3, "previous token"),
        ("duplicate_token", 0.3, "duplicate token"),
        ("induction", 0.3, "induction"),
        ("retrieval", 0.1, "retrieval"),
        ("local", 0.8, "local"),
    )
    values = {m.key: m.values for m in stack.measures}
    for card in stack.cards:
        layer, head = (int(part) for part in card.head.rsplit("L", 1)[-1].split("H"))
        for key, edge, word in rules:
            if key in values and values[key][layer, head] > edge:
                card.tags.append(word)


def _interventions(measured: Measured, command: str) -> list[Intervention]:
    names = {
        "parked": ("Heads parked on the first token silenced", "loss on held-out text"),
        "previous_token": ("Best previous-token heads silenced", "loss on repeated tokens"),
        "duplicate_token": ("Best duplicate-token heads silenced", "loss on repeated tokens"),
        "induction": ("Best induction heads silenced", "loss on repeated tokens"),
        "retrieval": ("Retrieval heads silenced", "loss of the answer on held-out needles"),
    }
    rows = []
    for key, (name, metric) in names.items():
        twin = measured.twins.get(key)
        if twin is not None:
            low, high = (twin.base + edge for edge in twin.interval)
            controls = [twin.base + value for value in twin.controls.tolist()]
            rows.append(
                Intervention(
                    name,
                    metric,
                    "nats",
                    twin.base,
                    twin.base + twin.effect,
                    low,
                    high,
                    controls,
                    measuring.CONTROL,
                    command,
                )
            )
    if measured.dose is not None:
        zero = measured.dose[0.0].nll
        base = measured.dose.nll
        rows.append(
            Intervention(
                "Massive activations set to 0",
                "loss on held-out text",
                "nats",
                base,
                base + zero.mean,
                base + zero.low,
                base + zero.high,
                [base + value for value in measured.dose.controls],
                "random dimensions of the same tokens set to 0",
                command,
            )
        )
    return rows


def _header(
    model: nn.Module,
    ids: Tensor,
    rows: float,
    seed: int,
    command: str,
    source: str,
    reading: Reading,
    tokenizer: Any,
) -> Header:
    import transformers

    facts = provenance(model, tokenizer)
    threads = torch.get_num_threads()
    return Header(
        model=str(facts["name"]),
        dtype=str(facts["dtype"]),
        tokens=ids.shape[1],
        seed=seed,
        date=datetime.date.today().isoformat(),
        command=command,
        rows=rows,
        architecture=str(facts["model_class"]),
        parameters=facts["parameters"],
        quantisation=facts["quantisation"],
        weights_sha=facts["sha256"],
        text_source=source,
        versions={
            "regard": regard.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        cost_ratio=reading.seconds / reading.plain_seconds,
        extra_memory_mb=reading.extra_memory_mb,
        first_key_is_bos=facts["key0_is_bos"],
        hardware=f"{next(model.parameters()).device.type}, {threads} threads, {platform.machine()}",
        notes=[facts["note"]] if facts["note"] else [],
    )


def _limits(rows: float) -> list[str]:
    lines = [
        "One text: what heads do depends on what they read. Figures are about this text and this model.",
        "Attention weights say where a head looks, not what it uses; that is why findings carry a causal test.",
        "The cost ratio compares one plain and one observed pass on this machine; both vary from run to run.",
    ]
    if rows < 1:
        lines.append(
            f"One query row in {round(1 / rows)} was read, drawn at random from each stretch of as many rows; figures over"
            " rows carry a standard error. Received attention near the end of the text rests on few rows."
        )
    return lines
