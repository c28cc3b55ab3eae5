"""Proves attachment on every architecture that can be built small, and writes the table of the documentation.

    python tools/architectures.py                    # all families, writes docs/architectures.md (about a minute)
    python tools/architectures.py llama whisper      # only these, prints and writes nothing

For each family a tiny model with random weights is verified by `regard.attach.verification.verify` on unpadded, right-padded
and left-padded input, in `generate()`, and against the maps of its own eager implementation.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from regard._errors import AttachError
from regard.attach.verification import Verification, verify

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"

OTHERS = {
    "albert": "AlbertForMaskedLM",
    "bart": "BartForConditionalGeneration",
    "bert": "BertForMaskedLM",
    "clip": "CLIPModel",
    "dinov2": "Dinov2Model",
    "distilbert": "DistilBertForMaskedLM",
    "esm": "EsmForMaskedLM",
    "gemma3": "Gemma3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "modernbert": "ModernBertForMaskedLM",
    "mt5": "MT5ForConditionalGeneration",
    "siglip": "SiglipModel",
    "t5": "T5ForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "wav2vec2": "Wav2Vec2Model",
    "whisper": "WhisperForConditionalGeneration",
}
"""Encoders, vision, speech and encoder-decoders, beside all causal language models."""


@dataclass(frozen=True)
class Family:
    name: str
    head: str

    def __str__(self) -> str:
        return f"{self.name}-{self.head}"


@dataclass
class Outcome:
    """`status`: "equal", "differs", "out of reach" (attach refuses) or "not built" (no small model could be made)."""

    family: Family
    status: str
    reason: str = ""
    proof: Verification | None = None


def families() -> list[Family]:
    """Every causal language model of the installed transformers once, and the `OTHERS`."""
    found: dict[str, Family] = {}
    for name, head in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        held = found.get(head)
        if held is None or name.endswith("_text") or head.lower().startswith(name.replace("_", "")):
            found[head] = Family(name, head)
    for name, head in OTHERS.items():
        found[head] = Family(name, head)
    return sorted(found.values(), key=lambda family: (family.name, family.head))


def make(family: Family, seed: int = 0) -> nn.Module:
    """The family's tiny model with uneven random weights."""
    torch.manual_seed(seed)
    head = (
        None if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family.name) == family.head else family.head
    )
    return tiny_models.randomise(tiny_models.build(family.name, head), seed)


def inputs(family: Family, model: nn.Module, tokens: int = 13) -> dict[str, dict[str, Any]]:
    """Unpadded, right-padded and left-padded input for a model, as far as it takes a padding mask."""
    generator = torch.Generator().manual_seed(1)
    takes = set(inspect.signature(model.forward).parameters)
    config: Any = model.config
    fixed: dict[str, Any] = {}
    vision = getattr(config, "vision_config", config)
    if "pixel_values" in takes and (family.name in OTHERS or "input_ids" not in takes):
        fixed["pixel_values"] = torch.randn(
            2, 3, vision.image_size, vision.image_size, generator=generator
        )
    if "input_features" in takes and family.name == "whisper":
        shape = (2, config.num_mel_bins, 2 * config.max_source_positions)
        fixed["input_features"] = torch.randn(shape, generator=generator)
    if "input_values" in takes:
        values = torch.randn(2, 3000, generator=generator)
        mask = torch.ones(2, 3000, dtype=torch.long)
        mask[1, 2000:] = 0
        padded = {"input_values": values * mask, "attention_mask": mask}
        return {"unpadded": {"input_values": values}, "right padding": padded}
    ids = torch.randint(10, 90, (2, tokens), generator=generator)
    if "decoder_input_ids" in takes:
        fixed["decoder_input_ids"] = ids[:, :7].flip(0)
    if "input_ids" not in takes:
        return {"unpadded": fixed}
    right = torch.ones_like(ids)
    right[1, -4:] = 0
    image = getattr(config, "image_token_index", None) if "pixel_values" in fixed else None
    if image is not None:
        count = 16 if family.name == "llava" else config.mm_tokens_per_image
        ids = torch.cat([ids[:, :1], torch.full((2, count), image), ids[:, 1:]], 1)
        right = torch.cat([torch.ones(2, count, dtype=torch.long), right], 1)
    found = {"unpadded": {"input_ids": ids, **fixed}}
    left = right.flip(1)
    text = left.argmax(-1)  # left padding moves a sequence to the right as a whole
    moved = torch.stack([row.roll(int(start)) for row, start in zip(ids, text, strict=True)])
    for name, mask, given in (("right padding", right, ids), ("left padding", left, moved)):
        found[name] = {
            "input_ids": torch.where(mask.bool(), given, 0),
            "attention_mask": mask,
            **fixed,
        }
    if "token_type_ids" in takes and image is not None:
        for given in found.values():
            given["token_type_ids"] = (given["input_ids"] == image).long()
    return found


def prove(family: Family) -> Outcome:
    """Builds the family's tiny model and verifies it."""
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = make(family)
            given = inputs(family, model)
            model(**given["unpadded"])
    except Exception as error:
        return Outcome(family, "not built", _one_line(error))
    prompt = _prompt(model, given)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            proof = verify(model, given, generate=prompt)
    except AttachError as error:
        return Outcome(family, "out of reach", _one_line(error))
    status = "equal" if proof.holds else "differs"
    reason = "; ".join(proof.problems)
    if proof.holds and proof.unhooked:
        reason = f"not reached: {proof.unhooked[0]}" + (
            f" and {len(proof.unhooked) - 1} more" if len(proof.unhooked) > 1 else ""
        )
    return Outcome(family, status, reason, proof)


def _prompt(model: nn.Module, given: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """What `generate()` starts from: left-padded where the model itself can do so, None where it cannot generate."""
    if not getattr(model, "can_generate", lambda: False)():
        return None
    for name in ("left padding", "right padding", "unpadded"):
        prompt = {
            key: value for key, value in given.get(name, {}).items() if key != "decoder_input_ids"
        }
        try:
            with torch.no_grad():
                model.generate(**prompt, max_new_tokens=2, do_sample=False)  # type: ignore[operator]
        except Exception:
            continue
        return prompt
    return None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    text = text.split("; families that use")[0]
    return text if len(text) < 260 else text[:257] + "..."


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.0e}"


def _row(outcome: Outcome) -> str:
    proof = outcome.proof
    assert proof is not None
    padded = [v for name, v in proof.outputs.items() if "padding" in name]
    plain = [v for name, v in proof.outputs.items() if "padding" not in name]
    kinds = {
        "grouped": proof.grouped,
        "window": proof.windowed,
        "soft cap": proof.softcap,
        "sinks": proof.sinks,
        "cross": any(site.kind == "cross" for site in proof.sites),
    }
    stacks = sorted({site.stack for site in proof.sites} - {""})
    cells = [
        f"`{outcome.family.name}`",
        f"{proof.model}",
        str(len(proof.sites)) + (f" ({', '.join(stacks)})" if stacks else ""),
        ", ".join(name for name, has in kinds.items() if has) or "–",
        proof.implementation,
        _number(max(plain)),
        _number(max(padded, default=None)),
        _number(proof.generate),
        _number(proof.maps),
        _number(proof.entropy),
        "yes" if proof.additive.get("") else "no",
        "equal" if outcome.status == "equal" else "**differs**",
    ]
    return "| " + " | ".join(cells) + " |"


def page(outcomes: list[Outcome], seconds: float) -> str:
    """docs/architectures.md"""
    by: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by.setdefault(outcome.status, []).append(outcome)
    equal, differing = by.get("equal", []), by.get("differs", [])
    proven = [*differing, *equal]
    partial = [o for o in equal if o.reason]
    lines = [
        "# Architectures",
        "",
        f"{len(equal)} model classes of transformers {transformers.__version__} proven equal with methods attached, "
        f"{len(differing)} different, {len(by.get('out of reach', []))} out of reach.",
        "",
        "Each row is a tiny model with random weights, compared with itself: its own default implementation, untouched, "
        "against the same model with reading methods attached. Differences are the largest over all valid tokens, relative to "
        "the largest output where that exceeds 1; in fp32, equal means below 1e-4.",
        "",
        "* *sites*: attention layers that methods see (and the stacks besides the main one);",
        "* *attention*: grouped KV heads, sliding window, soft-capped scores, learned sinks, cross-attention;",
        "* *plain*, *padded*: logits or hidden states, without padding and with right and left padding, weights read block by "
        "block or the fused kernel left in place, whichever is further off;",
        "* *generate*: logits of 4 greedily generated tokens (prefill, cache, decoding, left padding);",
        "* *maps*: attention weights that methods see against the maps of the model's eager implementation (– where a module "
        "returns none);",
        "* *entropy*: in nats, against float64 from the full maps;",
        "* *additive*: block output = input + attention + MLP, so that contributions to the residual stream add up;",
        "* every model is the same afterwards: implementation names, hooks, and outputs bit for bit.",
        "",
        f"Written by `python tools/architectures.py` in {seconds:.0f} s with torch {torch.__version__.split('+')[0]}; the same "
        "comparisons run as tests.",
        "",
        "| family | class | sites | attention | default | plain | padded | generate | maps | entropy | additive | status |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *[_row(outcome) for outcome in proven],
    ]
    if partial:
        lines += ["", "## Partly reached", ""]
        lines += [
            "Attached, with a warning: some softmax attention of these models does not use transformers' attention "
            "interface. `session.unhooked` lists it.",
            "",
        ]
        lines += [f"* `{o.family.name}` ({o.family.head}): {o.reason}" for o in partial]
    if by.get("out of reach"):
        lines += ["", "## Out of reach", ""]
        lines += [
            "`regard.attach` refuses these with the reason below. Either the model's code computes attention without "
            "transformers' attention interface, or there is no softmax attention to see.",
            "",
            "| family | class | reason |",
            "|---|---|---|",
        ]
        lines += [
            f"| `{o.family.name}` | {o.family.head} | {o.reason} |" for o in by["out of reach"]
        ]
    if by.get("not built"):
        lines += ["", "## Not tried", ""]
        lines += ["No small model could be built from the configuration alone.", ""]
        lines += [f"* `{o.family.name}` ({o.family.head}): {o.reason}" for o in by["not built"]]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("families", nargs="*", help="names such as llama; all when none is given")
    chosen = parser.parse_args(arguments).families
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    started = time.perf_counter()
    outcomes = []
    for family in families():
        if chosen and family.name not in chosen:
            continue
        outcome = prove(family)
        outcomes.append(outcome)
        print(f"{outcome.status:12} {family}  {outcome.proof or ''} {outcome.reason}", flush=True)
    seconds = time.perf_counter() - started
    counts = {
        status: sum(o.status == status for o in outcomes)
        for status in sorted({o.status for o in outcomes})
    }
    print(", ".join(f"{count} {status}" for status, count in counts.items()), f"in {seconds:.0f} s")
    if not chosen:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(outcomes, seconds), encoding="utf-8")
        print(f"wrote {PAGE}")
    return 1 if counts.get("differs") else 0


if __name__ == "__main__":
    sys.exit(main())
