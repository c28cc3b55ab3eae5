"""`regard.ablate`: a model without some of its heads or neurons, for as long as a `with` block lasts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from regard._errors import InputError
from regard.attach import Session
from regard.engine import Method
from regard.interventions._places import find_heads, find_neurons, split
from regard.interventions.activations import ZeroNeurons
from regard.interventions.heads import HeadMethod, MeanHeads, ParkOnSink, UniformHeads, ZeroHeads

MODES: dict[str, Callable[..., HeadMethod]] = {
    "zero": ZeroHeads,
    "mean": MeanHeads,
    "uniform": UniformHeads,
    "sink": ParkOnSink,
}


def ablate(
    model: nn.Module,
    heads: Any = (),
    mode: str = "zero",
    *,
    neurons: Any = (),
    phase: str = "all",
    means: Any = None,
) -> Session:
    """Silences heads and neurons: `with regard.ablate(model, heads=["L5H3"]): model.generate(...)`.

    Works on the live model, in `generate()`, with padding, under any dtype; afterwards the model is exactly as it was.

    Args:
        model: any model that `regard.attach` takes.
        heads: coordinates in any form (`"L5H3"`, `"L3-5H*"`, `(5, 3)`, lists of these); neurons may be mixed in.
        mode: "zero" (the head writes nothing), "mean" (a constant, its mean output), "uniform" (attends evenly to what it
            sees) or "sink" (attends to the first visible key only). Neurons can only be zeroed.
        neurons: neuron coordinates (`"mlp.4.n17"`, `"mlp.4.n0-9"`).
        phase: "all", or "decode" to leave the reading of the prompt untouched and act on generated tokens only.
        means: for "mean": a text, token ids or inputs to average over, a `MeanOutput`, or its `compute()`d means. By default
            the first 1,024 tokens of `regard.texts.default_text`.

    Returns:
        A `Session`, to be used as a context manager.

    Raises:
        InputError: no head or neuron is named, one is outside the model (the message names the range), or the mode or the
            phase is unknown.
        AttachError: the model's attention cannot be hooked.

    Cost: "zero" and "mean" keep the fused kernel (a few per cent); "uniform" and "sink" run attention block by block (1.3 to 1.5
    times the time, O(N) memory).
    """
    if mode not in MODES:
        raise InputError.unknown("mode", given=mode, known=MODES)
    named_heads, named_neurons = split(heads)
    more_heads, more_neurons = split(neurons)
    if more_heads:
        find_neurons(model, more_heads)  # raises: these are no neurons
    named_neurons += more_neurons
    if not named_heads and not named_neurons:
        raise InputError(
            'nothing to ablate; name heads such as heads=["L5H3"] or neurons such as neurons=["mlp.4.n17"]'
        )
    if named_neurons and mode != "zero":
        raise InputError(
            f"neurons can only be zeroed, got mode={mode!r}; ablate them in a nested regard.ablate(model, neurons=...)"
        )
    methods: list[Method] = []
    if named_heads:
        chosen = find_heads(model, named_heads)
        extra = {"means": _means(model, means)} if mode == "mean" else {}
        methods.append(MODES[mode](chosen, phase=phase, **extra))
    if named_neurons:
        methods.append(ZeroNeurons(find_neurons(model, named_neurons), phase=phase))
    return Session(model, *methods)


def _means(model: nn.Module, means: Any) -> Mapping:
    from regard.instruments.outputs import MeanOutput, mean_outputs

    if isinstance(means, MeanOutput):
        return means.compute()
    if isinstance(means, Mapping) and all(isinstance(key, tuple) for key in means):
        return means
    return mean_outputs(model, means)
