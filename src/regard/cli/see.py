"""`regard report` and `regard check`: look at a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard.cli._app import Screen, app
from regard.cli._options import SEE, Model, check_out, read_text, row_share

PROBE = "Attention is where a model looks. It may look back, and it may look at nothing."


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
    words = read_text(text, prompt)
    share = row_share(rows)
    check_out(out)
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
    words = read_text(text, None) or PROBE
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
