"""LoRA adapters, with the small modules that context extension trains beside them.

    W x  ->  W x + (alpha / r) B A x,     A [r, in] random, B [out, r] zero at first

(LoRA, arXiv 2106.09685.) LongLoRA (arXiv 2309.12307) found that for longer contexts this is not enough, and that training the
embeddings and all norms as well nearly closes the gap to full fine-tuning, at under 2 % of the parameters of a 7B model. The
adapter algebra, saving and merging are those of `peft`; here are its settings for that recipe.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn

from regard._errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def lora(
    model: nn.Module,
    r: int = 8,
    targets: Iterable[str] = TARGETS,
    *,
    alpha: float | int | None = None,
    dropout: float = 0.0,
    extra: Iterable[str] = ("embed", "norm"),
) -> PeftModel:
    """A `peft` model around `model`: adapters on the linear layers `targets`, copies of the modules `extra` to train.

    Nothing else is trained, and the model's own weights stay as they are: `with result.disable_adapter(): ...` runs them,
    `result.merge_and_unload()` gives the trained model, `result.save_pretrained(path)` writes adapters and copies as
    safetensors. (`result.unload()` drops the adapters but keeps the trained copies of `extra`.)

    Args:
        model: a transformers model; the adapters are put into it.
        r: rank of the adapters.
        targets: names of linear layers, as in `peft`.
        alpha: scale of the adapters, 2 r when None.
        dropout: on the adapters' input.
        extra: pieces of names; every module that has one in its own name and holds parameters is trained in full (embeddings
            tied to the output stay tied). () trains the adapters alone.

    Raises:
        InputError: `peft` is not installed, no module has such a name, or the rank is below 1.

    Cost: r x (in + out) numbers for each target, and one copy of each extra module.
    """
    if importlib.util.find_spec("peft") is None:
        raise InputError(
            "lora needs the package peft, which is not installed; pip install 'regard[train]'"
        )
    if r < 1:
        raise InputError.of("r", given=r, expected="a rank of at least 1")
    import peft

    targets, copies = _targets(model, targets), _extra(model, extra)
    config = getattr(model, "config", None)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    settings = peft.LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets,
        modules_to_save=copies or None,
        ensure_weight_tying=tied and any("embed" in name for name in copies),
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
    )
    return peft.get_peft_model(model, settings)  # type: ignore[return-value,arg-type]


def _targets(model: nn.Module, targets: Iterable[str]) -> list[str]:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    wanted = list(targets)
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise InputError(
                f"targets must name linear layers of {type(model).__name__}, got {target!r}; it has {', '.join(known)}"
            )
    if not wanted:
        raise InputError.of("targets", given=wanted, expected="at least one name of a linear layer")
    return wanted


def _extra(model: nn.Module, pieces: Iterable[str]) -> list[str]:
    """Paths of the modules with parameters of their own and one of the pieces in their own name."""
    holding = [name for name, module in model.named_modules() if any(_own(module))]
    found: list[str] = []
    for piece in pieces:
        named = [name for name in holding if piece in name.rsplit(".", 1)[-1]]
        if not named:
            known = sorted({name.rsplit(".", 1)[-1] for name in holding})
            raise InputError(
                f"extra must be pieces of module names of {type(model).__name__}, got {piece!r}; it has {', '.join(known)}"
            )
        found += [name for name in named if name not in found]
    return found


def _own(module: nn.Module) -> Iterable[bool]:
    return (True for _ in module.parameters(recurse=False))
