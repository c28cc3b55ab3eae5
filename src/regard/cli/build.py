"""`regard train`: a small language model of chosen mixers, on a task or on text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from regard._errors import InputError
from regard.cli._app import Screen, app, end
from regard.cli._options import BUILD, split_list


@app.command(rich_help_panel=BUILD)
def train(
    mixer: Annotated[
        str, typer.Option("--mixer", metavar="A,B", help="Mixers, repeated over the layers.")
    ] = "softmax",
    task: Annotated[
        str,
        typer.Option("--task", metavar="NAME", help="characters, recall, induction, needle, ..."),
    ] = "characters",
    length: Annotated[
        int | None, typer.Option("--length", metavar="N", min=8, help="Tokens of a sample.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Steps.")] = 500,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Samples a step.")] = 16,
    layers: Annotated[int, typer.Option("--layers", metavar="N", min=1, help="Layers.")] = 2,
    width: Annotated[int, typer.Option("--width", metavar="N", min=8, help="Width.")] = 128,
    heads: Annotated[int, typer.Option("--heads", metavar="N", min=1, help="Heads.")] = 4,
    rate: Annotated[
        float, typer.Option("--rate", metavar="X", help="Highest learning rate.")
    ] = 1e-3,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of weights and samples.")] = 0,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the model and its curve go.")
    ] = Path("trained"),
) -> None:
    """Train a small model of chosen mixers and draw its loss.

    [cyan]regard train --mixer sliding,softmax --task recall[/]
    """
    if out.exists() and not out.is_dir():
        raise InputError.of("--out", given=str(out), expected="a directory or a new name")
    from regard.labs.tasks import TASKS

    if task not in TASKS:
        raise InputError.unknown("--task", given=task, known=TASKS)
    import torch

    from regard.labs.training import train as fit
    from regard.nn import LanguageModel, LanguageModelConfig

    options: dict[str, Any] = {} if length is None else {"length": length}
    chosen = TASKS[task](**options)
    torch.manual_seed(seed)
    model = LanguageModel(
        LanguageModelConfig(
            vocab_size=chosen.vocabulary,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            mixers=split_list(mixer),
            max_position_embeddings=max(chosen.length, 16),
        )
    )
    screen = Screen()
    size = sum(parameter.numel() for parameter in model.parameters())
    screen.print(
        f"{layers} layers of {mixer}, {size:,} parameters, on {task} of {chosen.length} tokens"
    )
    measured = max(1, steps // 10)
    try:
        training = fit(
            model,
            chosen,
            steps,
            batch=batch,
            rate=rate,
            seed=seed,
            out=out,
            measure_every=measured,
            save_every=measured,
        )
    except KeyboardInterrupt:
        end(130, f"interrupted; the last checkpoint is in {out}. Run the same command to go on")
    model.save_pretrained(out)
    screen.print(_curve(training.losses), soft_wrap=True)
    _step, right, nats = training.held_out[-1]
    screen.print(f"held out: {100 * right:.1f} % right, {nats:.3f} nats a token", style="bold")
    try:
        axes = training.plot()
        axes.set_title(f"{mixer} on {task}")
        axes.figure.savefig(out / "loss.png", dpi=150, bbox_inches="tight")
    except ImportError:
        screen.print("no picture: pip install 'regard[plot]'", style="dim")
    screen.print(f"written to {out}", style="dim", soft_wrap=True)


def _curve(losses: list[float], width: int = 60) -> str:
    """The losses as a line of bars, each the mean of its share of the steps."""
    bars = "▁▂▃▄▅▆▇█"
    size = max(1, -(-len(losses) // width))
    means = [
        sum(losses[i : i + size]) / len(losses[i : i + size]) for i in range(0, len(losses), size)
    ]
    low, high = min(means), max(means)
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    drawn = "".join(bars[round((mean - low) * scale)] for mean in means)
    return f"loss {high:.3f} {drawn} {low:.3f}"
