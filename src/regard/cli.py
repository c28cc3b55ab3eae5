"""The `regard` command.

A thin shell over the library: each command reads its arguments, checks them before any work, and
calls one function. Nothing heavy is imported until a command needs it, so `regard --help` is
instant. Whatever goes wrong ends as one line on stderr and an exit code: 2 for bad input, 1 for a
failure, 130 for Ctrl-C, 141 when the reader of a pipe went away; `--traceback` shows the rest.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from regard._errors import InputError, OutputError, RegardError

if TYPE_CHECKING:
    from regard.papers import Entry
    from regard.plan import Plan


EXAMPLES = """\
Examples
  regard report                             a page about smollm2 reading a sample
  regard report smollm2 --text notes.txt    the same about your own file
  regard check ./my-model                   does regard leave this model unchanged?
  regard bench smollm2 --text notes.txt     what each KV cache saves, and what it costs
  regard papers sink                        papers about attention sinks
  regard reproduce retrieval-head --quick   try one paper's experiment

MODEL is smollm2 (fetched once, 93 MB), a directory, a .gguf file or a
Hugging Face id. Every command explains itself: regard report --help
"""


class Commands(TyperGroup):
    """The command group, with regard's way of ending."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        traceback = "--traceback" in given
        options["standalone_mode"] = False
        try:
            given = [arg for arg in given if arg != "--traceback"]
            code = super().main(given, *rest, **options)
        except Exception as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # the help is printed already
                sys.exit(0)
            if traceback and not hasattr(error, "exit_code"):
                raise
            _end(*_explain(error))
        sys.exit(code if isinstance(code, int) else 0)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        typer.echo(EXAMPLES)

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except KeyboardInterrupt:
            _end(130, "interrupted; nothing is half-written")
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            _hang_up()


class Screen(Console):
    """stdout, without highlighting; ends quietly when the reader of a pipe went away."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        _hang_up()


def _hang_up() -> NoReturn:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(141)


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and one line for whatever ended the command."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        usage = getattr(error, "ctx", None)
        path = usage.command_path if usage is not None else "regard"
        said = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        return 2, f"{said}; see: {path} --help"
    if isinstance(error, InputError | OutputError):
        return 2, str(error)
    if isinstance(error, RegardError):
        return 1, str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return 1, "ran out of memory; try fewer --tokens, or --rows 1/16"
    name = type(error).__name__
    return 1, f"unexpected {name}: {error} (add --traceback to see where)"


def _end(code: int, message: str) -> NoReturn:
    line = " ".join(message.split())
    Console(stderr=True).print(
        Text.assemble(("error: ", "bold red"), (line, "red")), soft_wrap=True, highlight=False
    )
    sys.exit(code)


app = typer.Typer(
    cls=Commands,
    name="regard",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PROBE = "Attention is where a model looks. It may look back, and it may look at nothing."
SEE, SHRINK, PAPERS = "See what attention does", "Shrink the cache", "Papers"
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="smollm2, a directory, a .gguf file, or a Hugging Face id."
    ),
]


def _show_version(wanted: bool) -> bool:
    if wanted:
        import regard

        typer.echo(f"regard {regard.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def regard_(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=_show_version, is_eager=True, help="Print it."
        ),
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", metavar="", help="Show the Python traceback of an error.")
    ] = False,
) -> None:
    """See where a language model's attention goes, and check what papers say about it.

    New here? [cyan]regard report[/] makes a page about a small model that comes with regard.
    """


@app.command(rich_help_panel=SEE)
def report(
    model: Model = "smollm2",
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Text to read; - is stdin.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", metavar="TEXT", help="The text itself.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option("--tokens", metavar="N", min=2, help="Read at most this many tokens."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to write.")] = Path(
        "report.html"
    ),
    rows: Annotated[
        str,
        typer.Option(
            "--rows",
            metavar="SHARE",
            help="auto, exact, or a share such as 1/16 of the query rows (faster).",
        ),
    ] = "auto",
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Seed of everything random.")
    ] = 0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", metavar="", help="Leave out the slow sections (ablation, retrieval)."
        ),
    ] = False,
) -> None:
    """Write an HTML page about a model's attention.

    [cyan]regard report smollm2 --text notes.txt --out page.html[/]
    """
    words = _text(text, prompt)
    share = _rows(rows)
    _check_out(out)
    from regard import report as write_report

    options: dict[str, Any] = {"out": out, "rows": share, "seed": seed}
    if tokens is not None:
        options["tokens"] = tokens
    if quick:
        options["quick"] = True
    found = write_report(model, words, **options)
    Screen().print(found)
    Screen().print(f"written to {out}, with the data beside it", style="dim", soft_wrap=True)


@app.command(rich_help_panel=SEE)
def check(
    model: Model = "smollm2",
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Probe text; - is stdin.")
    ] = None,
) -> None:
    """Check that watching a model does not change what it computes.

    [cyan]regard check ./my-model[/]
    """
    words = _text(text, None) or PROBE
    import regard

    loaded = regard.load(model)
    from regard.attach import anatomy, equality

    tokenizer = regard.pretrained.tokenizer_of(loaded)
    inputs = dict(tokenizer(words, return_tensors="pt", truncation=True, max_length=512))
    result = equality(loaded, inputs)
    screen = Screen()
    for stack in anatomy(loaded):
        screen.print(f"{stack.name or 'text'}: {len(stack.blocks)} layers")
    screen.print(f"{type(loaded).__name__} on {inputs['input_ids'].shape[1]} tokens: {result}")
    screen.print("equal", style="green")


@app.command(rich_help_panel=SHRINK)
def bench(
    model: Model = "smollm2",
    text: Annotated[
        str | None, typer.Option("--text", metavar="FILE", help="Text to read; - is stdin.")
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods", metavar="A,B", help="Such as h2o,snapkv+ada,expected+calibrated."
        ),
    ] = None,
    budgets: Annotated[
        str, typer.Option("--budgets", metavar="A,B", help="Fractions, tokens, or bytes (64MB).")
    ] = "0.1,0.2,0.5",
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="N,M", help="Tokens of context.")
    ] = "2048",
    documents: Annotated[
        int, typer.Option("--documents", metavar="N", min=1, help="Texts; intervals are over them.")
    ] = 3,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page to write.")] = Path(
        "bench.html"
    ),
    plan: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Write the best setting, for regard.apply."),
    ] = None,
    max_kl: Annotated[
        float,
        typer.Option("--max-kl", metavar="NATS", help="The plan's bound on the KL, a token."),
    ] = 0.05,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Seed of what is planted where.")
    ] = 0,
) -> None:
    """Measure what each KV cache saves and what it costs.

    [cyan]regard bench smollm2 --methods h2o,expected+calibrated --budgets 0.2[/]
    """
    words = _text(text, None)
    _check_out(out)
    if plan is not None:
        _check_out(plan)
        if not max_kl > 0:
            raise InputError.of("--max-kl", given=max_kl, expected="above 0, in nats a token")
    from regard.bench import METHODS, Bench, make_plan, save, summary
    from regard.bench.planning import parse_size

    run = Bench(
        model,
        words,
        methods=_list(methods) if methods is not None else METHODS,
        budgets=[parse_size(size) for size in _list(budgets)],
        lengths=[_whole("--lengths", length) for length in _list(lengths)],
        documents=documents,
        seed=seed,
        keep=out.with_suffix(".partial.jsonl"),
        command=shlex.join(["regard", *sys.argv[1:]]),
    )
    if run.store.resumed:
        Console(stderr=True).print("going on with the cells of an earlier run", style="dim")
    screen = Screen()
    try:
        results = run.run()
    except KeyboardInterrupt:
        kept = run.results()
        if kept.rows:
            screen.print(summary(kept))
            save(kept, out)
        _end(130, f"interrupted; what is measured is in {out}. Run the same command to go on")
    screen.print(summary(results))
    save(results, out)
    run.store.clear()
    screen.print(f"written to {out}, with the data beside it", style="dim", soft_wrap=True)
    if plan is not None:
        made = make_plan(results, run.model, max_kl, run.calibration_used())
        made.save(plan)
        screen.print(_plan_line(made, plan), soft_wrap=True)


@app.command(rich_help_panel=PAPERS)
def papers(
    query: Annotated[
        list[str] | None,
        typer.Argument(metavar="QUERY", help="Words to look for; a slug shows one paper."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")] = False,
) -> None:
    """List the papers and how far each one is.

    [cyan]regard papers sink[/]
    """
    from regard.papers import catalogue, search
    from regard.papers._show import details, papers_table

    wanted = " ".join(query or []).strip()
    exact = [row for row in catalogue() if row.slug == wanted.lower()]
    found = exact or search(wanted)
    if not found:
        raise InputError(f"no paper matches {wanted!r}; list all of them with: regard papers")
    if as_json:
        typer.echo(json.dumps([_row(row) for row in found], indent=1, ensure_ascii=False))
        return
    console = Screen()
    if not exact:
        console.print(papers_table(found))
        done = sum(row.status == "measured" for row in found)
        console.print(
            f"\n{len(found)} paper{'s' if len(found) > 1 else ''}, {done} measured. "
            "More about one: regard papers SLUG",
            style="dim",
        )
        return
    console.print(details(exact[0]))
    _print_evidence(console, exact[0])


@app.command(rich_help_panel=PAPERS)
def reproduce(
    slug: Annotated[
        str, typer.Argument(metavar="SLUG", help="A paper, as `regard papers` names it.")
    ],
    quick: Annotated[
        bool,
        typer.Option("--quick", metavar="", help="A small run: does it work? Not a measurement."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Evidence directory to write into.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", metavar="", help="Go on from where an interrupted run stopped."),
    ] = False,
) -> None:
    """Check a paper's claims on a small model.

    [cyan]regard reproduce retrieval-head --quick[/]
    """
    from regard.papers import entry, load
    from regard.papers import reproduce as run_it
    from regard.papers._reproduce import default_out
    from regard.papers._show import tally, verdict_table

    row, module = entry(slug), load(slug)
    scale = "quick" if quick else "full"
    console = Screen()
    console.print(f"[bold]{row.title}[/] [dim]{row.url}[/]\n")
    try:
        evidence = run_it(module, scale=scale, out=out, resume=resume, console=_progress_console())
    except KeyboardInterrupt:
        _end(
            130,
            "interrupted; nothing is half-written, finished measurements are kept. "
            f"Go on with: {_again(row.slug, quick, out)} --resume",
        )
    console.print(verdict_table(evidence, module.PAPER.claims))
    place = (out if out is not None else default_out(scale)) / f"{row.slug}.json"
    minutes = evidence["seconds"] / 60
    took = f"{minutes:.0f} min" if minutes >= 2 else f"{evidence['seconds']:.0f} s"
    console.print(f"{tally(evidence)} ({scale} scale, {took})", style="bold")
    console.print(f"written to {place}", style="dim", soft_wrap=True)


def _print_evidence(console: Console, row: Entry) -> None:
    from regard.papers._catalogue import evidence_file
    from regard.papers._evidence import read
    from regard.papers._show import tally, verdict_table

    if row.status == "measured":
        evidence = read(evidence_file(row.slug))
        console.print("\n", verdict_table(evidence))
        console.print(tally(evidence), style="bold")


def _row(row: Entry) -> dict[str, str]:
    names = ("slug", "title", "arxiv", "url", "topic", "room", "what", "venue", "also", "status")
    return {name: getattr(row, name) for name in names} | {"date": row.date.isoformat()}


def _again(slug: str, quick: bool, out: Path | None) -> str:
    where = f" --out {out}" if out is not None else ""
    return f"regard reproduce {slug}{' --quick' if quick else ''}{where}"


def _progress_console() -> Console:
    return Console(stderr=True)


def _text(file: str | None, prompt: str | None) -> str | None:
    """The text that --text or --prompt names; None when neither is given."""
    if file is not None and prompt is not None:
        raise InputError("give either --text FILE or --prompt TEXT, got both; leave one out")
    if prompt is not None:
        if not prompt.strip():
            raise InputError("--prompt must be a text with words, got an empty one")
        return prompt
    if file is None:
        return None
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"--text must name a file, got {file!r}, which does not exist; "
            "to give the text itself use --prompt"
        ) from None
    except OSError as error:
        raise InputError(f"--text cannot read {file!r}: {error.strerror}") from error
    name = "stdin" if file == "-" else repr(file)
    if b"\0" in raw:
        raise InputError(f"--text must be a text file in UTF-8, got {name}, which is binary")
    try:
        words = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--text must be a text file in UTF-8, got {name} with byte 0x{raw[error.start]:02x} "
            f"at position {error.start}; convert it with: iconv -t utf-8"
        ) from error
    if not words.strip():
        raise InputError(f"--text must be a text with words, got {name}, which is empty")
    return words


def _list(given: str) -> list[str]:
    """`a, b` -> ["a", "b"]."""
    return [part.strip() for part in given.split(",") if part.strip()]


def _whole(name: str, given: str) -> int:
    try:
        return int(given)
    except ValueError:
        raise InputError.of(name, given=given, expected="whole numbers such as 2048") from None


def _plan_line(plan: Plan, path: Path) -> str:
    """What a plan keeps and costs, with a warning where its KL hides what it forgets."""
    cost = plan.expected
    line = (
        f"plan: {plan.method} at {plan.budget}, {100 * cost['kept']:.0f} % of the memory, KL {cost['kl']:.3f}, "
        f"needles {cost['needle_lost']:+.2f} nats lost; written to {path}"
    )
    if cost["needle_lost"] > 0.5:
        line += (
            "\n[yellow]It predicts the running text well and forgets what is asked for later; "
            "look at the needle column before you use it.[/]"
        )
    return line


def _rows(given: str) -> float | None:
    """`auto` -> None, `exact` -> 1.0, `1/16` -> 0.0625."""
    if given == "auto":
        return None
    try:
        share = 1.0 if given == "exact" else float(Fraction(given))
    except (ValueError, ZeroDivisionError):
        share = 0.0
    if not 0 < share <= 1:
        raise InputError.of("--rows", given=given, expected="auto, exact or a share such as 1/16")
    return share


def _check_out(path: Path) -> None:
    """Find out before the work whether the page can be written."""
    from regard.papers._evidence import check_writable

    if path.is_dir():
        raise OutputError(f"--out must be a file, got the directory {path}; try {path}/report.html")
    if path.exists() and not os.access(path, os.W_OK):
        raise OutputError(f"--out must be writable, got {path}, which is read-only")
    check_writable(path.parent)


def main() -> None:
    """Entry point of the `regard` command."""
    app()


if __name__ == "__main__":
    main()
