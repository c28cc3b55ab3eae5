"""The command group: how `regard` begins, and how whatever goes wrong ends.

Every error ends as one line on stderr and an exit code: 2 for bad input, 1 for a failure, 130 for Ctrl-C, 141 when the reader
of a pipe went away; `--traceback` shows the rest.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from regard._errors import InputError, OutputError, RegardError

EXAMPLES = """\
Examples
  regard report                             a page about smollm2 reading a sample
  regard report smollm2 --text notes.txt    the same about your own file
  regard check ./my-model                   does regard leave this model unchanged?
  regard bench smollm2 --text notes.txt     what each KV cache saves, and what it costs
  regard train --mixer softmax,sliding      a small model of your own, and its loss curve
  regard lab scan-and-snap                  theory beside experiment
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
            end(*_explain(error))
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
            end(130, "interrupted; nothing is half-written")
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


def end(code: int, message: str) -> NoReturn:
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
