"""`regard bench`: what each cache saves and costs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from regard._errors import InputError
from regard.cli._app import Screen, app, end
from regard.cli._options import SHRINK, Model, check_out, read_text, split_list, whole

if TYPE_CHECKING:
    from regard.plan import Plan


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
    words = read_text(text, None)
    check_out(out)
    if plan is not None:
        check_out(plan)
        if not max_kl > 0:
            raise InputError.of("--max-kl", given=max_kl, expected="above 0, in nats a token")
    from regard.bench import METHODS, Bench, make_plan, save, summary
    from regard.bench.planning import parse_size

    run = Bench(
        model,
        words,
        methods=split_list(methods) if methods is not None else METHODS,
        budgets=[parse_size(size) for size in split_list(budgets)],
        lengths=[whole("--lengths", length) for length in split_list(lengths)],
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
        end(130, f"interrupted; what is measured is in {out}. Run the same command to go on")
    screen.print(summary(results))
    save(results, out)
    run.store.clear()
    screen.print(f"written to {out}, with the data beside it", style="dim", soft_wrap=True)
    if plan is not None:
        made = make_plan(results, run.model, max_kl, run.calibration_used())
        made.save(plan)
        screen.print(plan_line(made, plan), soft_wrap=True)


def plan_line(plan: Plan, path: Path) -> str:
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
