"""Turn the linear maps of any model into sigmaReparam layers to train it, and back into plain layers to use it.

    convert_sigma_reparam(model)      W  ->  W_hat = (gamma / sigma(W)) W,   the function unchanged (gamma starts at sigma(W))
    ... train ...
    fuse_sigma_reparam(model)         W_hat  ->  a plain layer with that weight

Every linear layer and convolution is converted, patch embeddings and heads included; embeddings stay as they are, and so does
a head that shares its weight with one. Weights are taken over, not drawn anew: a pretrained model computes what it did.

Source: Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", arXiv 2303.06296. The
layers are `regard.nn.SigmaReparamLinear` and `SigmaReparamConv2d`.

Cost: one singular value decomposition of each weight, once.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from regard._errors import InputError
from regard.nn.sigma_reparam import GammaStart, SigmaReparamConv2d, SigmaReparamLinear


def convert_sigma_reparam(
    model: nn.Module,
    include: Callable[[str], bool] = lambda name: True,
    *,
    gamma: GammaStart = "spectral",
    remove_norms: bool = False,
) -> list[str]:
    """Replaces the model's linear layers and convolutions in place, and returns the paths of those converted.

    Make the optimiser afterwards: it needs the new gammas (and should decay none of the converted weights).

    Args:
        model: any module; parameters keep their identity, so weights that are shared stay shared.
        include: which layers, by their path in the model.
        gamma: "spectral" leaves the function as it is; "one" gives every map norm 1, the paper's start for training anew.
        remove_norms: also replace layer norms and RMS norms by the identity (it changes the function).

    Raises:
        InputError: nothing was converted.
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    made: dict[int, nn.Module] = {}
    converted: list[str] = []
    for path, parent, name, layer in _children(model):
        if remove_norms and type(layer).__name__.endswith(("LayerNorm", "RMSNorm")):
            setattr(parent, name, nn.Identity())
        elif type(layer) in (
            nn.Linear,
            nn.Conv2d,
        ):  # a subclass may apply its weight in another way
            if id(layer.weight) in embedded or not include(path):
                continue
            if id(layer) not in made:
                made[id(layer)] = _converted(layer, gamma)
            setattr(parent, name, made[id(layer)])
            converted.append(path)
    if not converted:
        raise InputError(
            f"{type(model).__name__} has no linear layer or convolution that `include` chooses; "
            "it is asked with paths such as 'layers.0.mlp.up_proj'"
        )
    return converted


def fuse_sigma_reparam(model: nn.Module) -> list[str]:
    """Replaces sigmaReparam layers in place by plain layers that compute the same, and returns their paths.

    Raises:
        InputError: there is none.
    """
    made: dict[int, nn.Module] = {}
    fused: list[str] = []
    for path, parent, name, layer in _children(model):
        if isinstance(layer, (SigmaReparamLinear, SigmaReparamConv2d)):
            setattr(parent, name, made.setdefault(id(layer), layer.fuse()))
            fused.append(path)
    if not fused:
        raise InputError(f"{type(model).__name__} has no sigmaReparam layer to fold back")
    return fused


def _converted(layer: nn.Module, gamma: GammaStart) -> nn.Module:
    if isinstance(layer, nn.Conv2d):
        return SigmaReparamConv2d(layer, gamma)
    assert isinstance(layer, nn.Linear)
    return SigmaReparamLinear.of(layer, gamma)


def _children(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.Module]]:
    """Every place of a module in its parent: (path, parent, name, module); shared modules at each of their places.

    The inner layers of `nn.MultiheadAttention` are left out: it holds its query, key and value weights itself.
    """
    found: list[tuple[str, nn.Module, str, nn.Module]] = []
    for path, parent in model.named_modules():
        if isinstance(parent, nn.MultiheadAttention):
            continue
        prefix = f"{path}." if path else ""
        found += [
            (prefix + name, parent, name, child)
            for name, child in parent._modules.items()
            if child is not None
        ]
    return found
