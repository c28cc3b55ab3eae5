"""The parts of a model that attention dynamics talk about: stacks of blocks, each with its attention and its MLP.

Found from the module tree alone (numbered lists of blocks that hold an attention module), so that no architecture needs an
adapter. What cannot be found is None, and whoever needs it says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from regard.attach import compat

ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
CROSS = re.compile(r"cross|encoder_attn|encdec|enc_dec|encoder_decoder", re.IGNORECASE)
NOT_ATTENTION = re.compile(
    r"(norm|dropout|rotary\w*|embeddings?|output|mask|softmax|residual|biases)$", re.IGNORECASE
)
MLP = ("mlp", "feed_forward", "ffn", "feedforward", "block_sparse_moe", "moe", "DenseReluDense")
OUTPUT = (
    *("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "o", "out_lin", "proj"),
    *("projection_layer", "out", "to_out", "output_linear"),
)
DOWN = (
    *("down_proj", "c_proj", "fc2", "dense_4h_to_h", "wo", "Wo", "w2", "lin2", "output.dense"),
    *("output_dense", "proj_out", "output_linear"),
)
FLAT_DOWN = ("fc2", "ffn_output", "linear2", "output.dense", "dense2")
"""The MLP's last layer where a block holds the MLP's layers themselves."""
POST_ATTENTION = ("post_self_attn_layernorm", "post_attention_layernorm")
POST_MLP = ("post_mlp_layernorm", "post_feedforward_layernorm")


@dataclass(slots=True)
class BlockParts:
    """One block of a stack.

    `attention_write`, `cross_write` and `mlp_write` are the modules whose outputs are added to the stream: the sub-layers
    themselves, the norms after them where a model has those inside the branch (Gemma 2, OLMo 2), or the last linear layer
    where norm and sum come after it (BERT).
    """

    layer: int
    name: str
    module: nn.Module
    attentions: dict[str, nn.Module] = field(default_factory=dict)
    output_projection: nn.Module | None = None
    mlp: nn.Module | None = None
    down_projection: nn.Module | None = None
    attention_write: nn.Module | None = None
    cross_write: nn.Module | None = None
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


def anatomy(model: nn.Module) -> list[Stack]:
    """The stacks of a model in the order of its modules, then attention that stands outside of any stack.

    Names: "" for the main text stack (the decoder, where there is an encoder too, or the only stack), "encoder", "vision",
    "audio"; a number is added where a name repeats. An attention module outside of all stacks (a pooling head, a resampler)
    makes a stack of its own, named by its path.

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
            stacks.append(Stack(_stack_name(path), path, blocks))
    if not any(re.search(r"(^|\.)(\w+_)?decoder", stack.path) for stack in stacks):
        for stack in stacks:
            stack.name = "" if stack.name == "encoder" else stack.name
    if len(stacks) == 1:
        stacks[0].name = ""
    stacks += _strays(model, stacks)
    seen: dict[str, int] = {}
    for stack in stacks:
        count = seen.get(stack.name, 0)
        seen[stack.name] = count + 1
        if count:
            stack.name = f"{stack.name or 'text'}{count + 1}"
    return stacks


def _stack_name(path: str) -> str:
    for word, name in (
        ("vision", "vision"),
        ("visual", "vision"),
        ("image", "vision"),
        ("audio", "audio"),
    ):
        if word in path.lower():
            return name
    if re.search(r"(^|\.)(\w+_)?encoder(\.|$)", path):
        return "encoder"
    return ""


def _strays(model: nn.Module, stacks: list[Stack]) -> Iterator[Stack]:
    """Attention modules outside of all stacks, each as a stack of one block."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if not path or any(f"{path}.".startswith(stack.path + ".") for stack in stacks):
            continue
        if _is_attention(module) and not any(stack.path.startswith(path + ".") for stack in stacks):
            for outer in [name for name in found if path.startswith(name + ".")]:
                del found[outer]
            found[path] = module
    for path, module in found.items():
        parts = BlockParts(0, path, module, {"": module}, _child(module, OUTPUT))
        yield Stack(path, path, [parts])


def _is_attention(module: nn.Module) -> bool:
    label = type(module).__name__
    if NOT_ATTENTION.search(label):
        return False
    return ATTENTION.search(label) is not None or compat.is_hookable(module)


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    for name in names:
        found = _at(module, name)
        if found is not None:
            return found
    return None


def _at(module: nn.Module, path: str) -> nn.Module | None:
    found: nn.Module | None = module
    for part in path.split(".") if path else ():
        found = getattr(found, part, None) if found is not None else None
    return found if isinstance(found, nn.Module) else None


def _attentions(block: nn.Module) -> dict[str, nn.Module]:
    """The innermost attention modules below a block: wrappers are replaced by what they wrap."""
    found: dict[str, nn.Module] = {}
    for name, module in block.named_modules():
        if name and _is_attention(module):
            for outer in [outer for outer in found if name.startswith(outer + ".")]:
                del found[outer]
            found[name] = module
    if not found and _is_attention(block):
        found[""] = block
    return found


def _describe(layer: int, name: str, module: nn.Module) -> BlockParts:
    parts = BlockParts(layer, name, module, _attentions(module))
    own = [path for path in parts.attentions if not CROSS.search(path)]
    crossing = [path for path in parts.attentions if CROSS.search(path)]
    if own:
        parts.output_projection, parts.attention_write = _projection(module, parts, own[0])
    if crossing:
        parts.cross_write = _projection(module, parts, crossing[0])[1]
    parts.mlp = _child(module, MLP) or _nested_mlp(module)
    if parts.mlp is not None:
        parts.down_projection = _child(parts.mlp, DOWN)
        parts.mlp_write = parts.mlp
    if parts.mlp is None or isinstance(parts.mlp, nn.Linear):
        inner = _at(module, own[0].rsplit(".", 1)[0]) if own and "." in own[0] else None
        flat = _child(module, FLAT_DOWN) or (
            _child(inner, FLAT_DOWN) if inner is not None else None
        )
        parts.mlp = parts.down_projection = parts.mlp_write = flat
    sandwich = _child(module, POST_MLP)
    if sandwich is not None:
        parts.attention_write, parts.mlp_write = _child(module, POST_ATTENTION), sandwich
    return parts


def _projection(
    block: nn.Module, parts: BlockParts, path: str
) -> tuple[nn.Module | None, nn.Module | None]:
    """An attention module's output projection and the module whose output is added to the stream."""
    attention = parts.attentions[path]
    inside = _child(attention, OUTPUT)
    if inside is not None:
        whole = isinstance(getattr(attention, "LayerNorm", None), nn.Module)  # sum and norm inside
        return inside, inside if whole else attention
    around = _at(block, path.rsplit(".", 1)[0]) if "." in path else None
    beside = _child(around, ("output.dense", "out_proj", "output")) if around is not None else None
    return beside, beside if beside is not None else attention


def _nested_mlp(block: nn.Module) -> nn.Module | None:
    """An MLP inside a wrapper of the block (T5's layer list, a shared transformer)."""
    for path, module in block.named_modules():
        if path.rsplit(".", 1)[-1] in MLP and not _is_attention(module):
            return module
    return None
