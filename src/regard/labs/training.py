"""One small trainer for language models on `regard.labs.tasks`.

AdamW, a linear warm-up and a cosine to a tenth of the rate, gradients clipped at norm 1; batch i of a run is drawn from seed
`seed * 1_000_003 + i`, so a run that was interrupted and goes on sees what it would have seen. Several processes split the
batch (`accelerate launch`), with the gradients averaged.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regard._errors import InputError, ModelError
from regard._progress import progress
from regard.labs.tasks import Samples, Task

CHECKPOINT = "training.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(slots=True)
class Training:
    """What a training run left behind; the model itself was trained in place.

    Attributes:
        losses: training loss of every step, nats of an asked token and the mixers' own losses.
        held_out: `(step, accuracy, nats)` on held-out samples, whenever that was measured.
    """

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return len(self.losses)

    def plot(self, axes: Any = None) -> Any:
        """The loss by step, smoothed over a fiftieth of the run, with the held-out loss as points."""
        import matplotlib.pyplot as plt

        axes = plt.subplots(figsize=(6, 3.5))[1] if axes is None else axes
        losses = torch.tensor(self.losses)
        span = max(1, len(losses) // 50)
        smooth = losses.unfold(0, span, 1).mean(-1) if len(losses) >= span else losses
        axes.plot(range(1, len(losses) + 1), losses, color="tab:blue", alpha=0.25, linewidth=0.8)
        axes.plot(range(span, span + len(smooth)), smooth, color="tab:blue", label="training")
        if self.held_out:
            steps, _, nats = zip(*self.held_out, strict=True)
            axes.plot(steps, nats, "o", color="tab:orange", label="held out")
        axes.set(xlabel="step", ylabel="loss (nats a token)")
        axes.legend()
        return axes


def train(
    model: nn.Module,
    task: Task,
    steps: int = 1000,
    *,
    batch: int = 32,
    rate: float = 1e-3,
    warmup: int | None = None,
    decay: float = 0.1,
    seed: int = 0,
    measure_every: int | None = None,
    out: str | os.PathLike[str] | None = None,
    save_every: int = 200,
    stop: int | None = None,
    after_step: Callable[[int, float], None] | None = None,
) -> Training:
    """Trains a model on a task, in place.

    Args:
        model: anything that returns `.loss` for `(ids, labels=...)`, such as `regard.nn.LanguageModel`.
        task: what is learnt.
        steps: optimiser steps of the schedule.
        batch: samples in a step, over all processes.
        rate: highest learning rate.
        warmup: steps in which it grows to that; a twentieth of `steps` by default.
        decay: weight decay of matrices; vectors have none.
        seed: of the samples.
        measure_every: steps between measurements on held-out samples; None measures at the end only.
        out: directory for a checkpoint (safetensors: weights, moments, losses); a run that finds one there goes on from it.
        save_every: steps between checkpoints.
        stop: end after this many steps, before the schedule does.
        after_step: called with the number of finished steps and the loss.

    Raises:
        InputError: a rate or a number of steps that is not positive, or a checkpoint of another run.
        ModelError: the loss is no longer finite; the checkpoint before it stays.
    """
    from accelerate import Accelerator

    for name, value in (
        ("steps", steps),
        ("batch", batch),
        ("rate", rate),
        ("save_every", save_every),
    ):
        if not value > 0:
            raise InputError.of(name, given=value, expected="above 0")
    accelerator = Accelerator()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW([g for g in groups if g["params"]], lr=rate, betas=(0.9, 0.95))
    warmup = max(1, steps // 20) if warmup is None else warmup
    setting = {
        "task": task.name,
        "length": task.length,
        "steps": steps,
        "batch": batch,
        "rate": rate,
        "seed": seed,
    }
    place = None if out is None else Path(out) / CHECKPOINT
    training = Training()
    if place is not None and place.exists():
        training = _resume(place, model, optimiser, setting)
    wrapped, optimiser = accelerator.prepare(model, optimiser)
    wrapped.train()
    last = steps if stop is None else min(stop, steps)
    with progress(last - training.steps, "Training") as advance:
        for step in range(training.steps, last):
            for group in optimiser.param_groups:
                group["lr"] = rate * _factor(step, steps, warmup)
            part = _share(task.draw(batch, seed * 1_000_003 + step), accelerator)
            loss = wrapped(part.ids, labels=part.labels).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            value = float(accelerator.reduce(loss.detach(), reduction="mean"))  # type: ignore[arg-type]
            if not math.isfinite(value):
                raise ModelError(
                    f"the loss of step {step + 1} is {value}; try a lower rate than {rate:g}"
                )
            training.losses.append(value)
            if measure_every and (step + 1) % measure_every == 0 and step + 1 < last:
                training.held_out.append((step + 1, *task.evaluate(model)))
            if place is not None and accelerator.is_main_process and (step + 1) % save_every == 0:
                _save(place, model, optimiser.optimizer, setting, training)
            if after_step is not None:
                after_step(step + 1, value)
            advance(description=f"Training, loss {value:.3f}")
    model.eval()
    if not training.held_out or training.held_out[-1][0] != training.steps:
        training.held_out.append((training.steps, *task.evaluate(model)))
    if place is not None and accelerator.is_main_process:
        _save(place, model, optimiser.optimizer, setting, training)
    return training


def _factor(step: int, steps: int, warmup: int) -> float:
    """Share of the highest rate at a step."""
    if step < warmup:
        return (step + 1) / warmup
    through = (step - warmup) / max(1, steps - warmup)
    return 0.1 + 0.9 * (0.5 + 0.5 * math.cos(math.pi * through))


def _share(samples: Samples, accelerator: Any) -> Samples:
    """The rows of this process."""
    rows = slice(accelerator.process_index, None, accelerator.num_processes)
    return Samples(
        samples.ids[rows].to(accelerator.device), samples.labels[rows].to(accelerator.device)
    )


def _save(
    place: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    setting: dict[str, Any],
    training: Training,
) -> None:
    """Weights, moments and losses in one file, which is replaced only when it is whole."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {f"model/{n}": p.detach() for n, p in model.named_parameters()}
    tensors |= {f"buffer/{n}": b for n, b in model.named_buffers() if b is not None}
    for parameter, state in optimiser.state.items():
        for moment in MOMENTS:
            tensors[f"{moment}/{names[id(parameter)]}"] = torch.as_tensor(state[moment])
    about = {
        "setting": json.dumps(setting),
        "losses": json.dumps(training.losses),
        "held_out": json.dumps(training.held_out),
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    half = place.with_suffix(".partial")
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, half, about)
    half.chmod(0o644)
    half.replace(place)


def _resume(
    place: Path, model: nn.Module, optimiser: torch.optim.Optimizer, setting: dict[str, Any]
) -> Training:
    """Puts a checkpoint back into model and optimiser."""
    from safetensors import safe_open

    with safe_open(place, "pt") as file:
        about = file.metadata()
    known = json.loads(about["setting"])
    if known != setting:
        changed = [name for name in setting if known.get(name) != setting[name]]
        raise InputError(
            f"{place} is of another run: {', '.join(f'{n} was {known.get(n)!r}, now {setting[n]!r}' for n in changed)}; "
            "give another directory or remove it"
        )
    tensors = load_file(place)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    held = {n[6:]: tuple(t.shape) for n, t in tensors.items() if n.startswith("model/")}
    if shapes != held:
        raise InputError(f"{place} holds a model of another shape than the one given")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"model/{name}"])
            if f"exp_avg/{name}" in tensors:
                optimiser.state[parameter] = {m: tensors[f"{m}/{name}"] for m in MOMENTS}
        for name, buffer in buffers.items():
            if f"buffer/{name}" in tensors:
                buffer.copy_(tensors[f"buffer/{name}"])
    pairs = [tuple(item) for item in json.loads(about["held_out"])]
    return Training(json.loads(about["losses"]), pairs)
