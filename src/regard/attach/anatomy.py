"""The parts of a model that attention dynamics talk about: stacks of blocks, each with its attention and its MLP.

Found from the module tree alone (numbered lists of blocks that hold an attention module), so that no architecture needs an
adapter. What cannot be found is None, and whoever needs it says so.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
CROSS = re.compile(r"cross|encoder_attn|encdec|enc_dec", re.IGNORECASE)
MLP = ("mlp", "feed_forward", "ffn", "feedforward", "block_sparse_moe", "moe", "DenseReluDense", "fc")
OUTPUT = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "o", "out_lin", "proj", "projection_layer", "out", "to_out")
DOWN = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "wo", "Wo", "w2", "lin2", "output.dense", "proj_out", "output_linear")
POST_ATTENTION = ("post_self_attn_layernorm", "post_attention_layernorm")
POST_MLP = ("post_mlp_layernorm", "post_feedforward_layernorm")


@dataclass(slots=True)
class BlockParts:
    """One block of a stack. `attention_write` and `mlp_write` are the modules whose outputs are added to the stream."""

    layer: int
    name: str
    module: nn.Module
    attentions: dict[str, nn.Module] = field(default_factory=dict)
    output_projection: nn.Module | None = None
    mlp: nn.Module | None = None
    down_projection: nn.Module | None = None
    attention_write: nn.Module | None = None
    mlp_write: nn.Module | None = None

    @property
    def attention(self) -> nn.Module | None:
        """The self-attention module (the first one that is not cross-attention)."""
        own = [module for name, module in self.attentions.items() if not CROSS.search(name)]
        return own[0] if own else None


@dataclass(slots=True)
class Stack:
    """A list of blocks; `name` is "" for the main text stack (or the only one)."""

    name: str
    path: str
    blocks: list[BlockParts]


def _is_attention(name: str, module: nn.Module) -> bool:
    label = type(module).__name__
    named = ATTENTION.search(label) is not None
    skip = re.search(r"norm|dropout|rotary|embedding|output|mask|softmax", label, re.IGNORECASE)
    return named and skip is None


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    for name in names:
        found: nn.Module | None = module
        for part in name.split("."):
            found = getattr(found, part, None) if found is not None else None
        if isinstance(found, nn.Module):
            return found
    return None


def _attentions(block: nn.Module) -> dict[str, nn.Module]:
    """The outermost attention modules below a block that hold a projection; wrappers are replaced by what they wrap."""
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        if name and _is_attention(name, module):
            parents = [outer for outer in found if name.startswith(outer + ".")]
            for outer in parents:
                del found[outer]
            found[name] = module
    return found


def _describe(layer: int, name: str, module: nn.Module) -> BlockParts:
    parts = BlockParts(layer, name, module, _attentions(module))
    attention = parts.attention
    if attention is not None:
        parts.output_projection = _child(attention, OUTPUT)
    parts.mlp = _child(module, MLP)
    if parts.mlp is None:
        for child_name, child in module.named_modules():
            last = child_name.rsplit(".", 1)[-1]
            if last in MLP and not _is_attention(child_name, child):
                parts.mlp = child
                break
    if parts.mlp is not None:
        parts.down_projection = _child(parts.mlp, DOWN)
    elif _child(module, ("fc2",)) is not None:
        parts.mlp = parts.down_projection = _child(module, ("fc2",))
    sandwich = _child(module, POST_MLP)
    if sandwich is not None:
        parts.attention_write, parts.mlp_write = _child(module, POST_ATTENTION), sandwich
    else:
        parts.attention_write, parts.mlp_write = attention, parts.mlp
    return parts


def _stack_name(path: str, cross: bool) -> str:
    for word, name in (("vision", "vision"), ("visual", "vision"), ("image", "vision"), ("audio", "audio")):
        if word in path.lower():
            return name
    if re.search(r"(^|\.)encoder(\.|$)", path):
        return "encoder"
    return ""


def anatomy(model: nn.Module) -> list[Stack]:
    """The stacks of a model in the order of its modules.

    Raises:
        nothing; a model without blocks gives an empty list.
    """
    stacks: list[Stack] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(path.startswith(other.path + ".") for other in stacks):
            continue
        blocks = [_describe(i, f"{path}.{i}", block) for i, block in enumerate(module)]
        if any(block.attentions for block in blocks):
            stacks.append(Stack(_stack_name(path, False), path, blocks))
    if stacks and all(stack.name for stack in stacks):
        if len(stacks) == 1:
            stacks[0].name = ""
    seen: dict[str, int] = {}
    for stack in stacks:
        count = seen.get(stack.name, 0)
        seen[stack.name] = count + 1
        if count:
            stack.name = f"{stack.name or 'text'}{count + 1}"
    return stacks
