"""The names of a place in other tools: TransformerLens hooks, nnsight paths, interp-engine points.

| here | TransformerLens | nnsight (a Llama) | interp-engine |
|---|---|---|---|
| `L5H3` | `blocks.5.attn.hook_z`, head 3 | `model.layers[5].self_attn.o_proj.input[..., 192:256]` | `z`, 5 |
| `mlp.4.n17` | `blocks.4.mlp.hook_post`, neuron 17 | `model.layers[4].mlp.down_proj.input[..., 17]` | `mlp_act`, 4 |
| `resid.5.d42` | `blocks.5.hook_resid_post`, dimension 42 | `model.layers[5].output[..., 42]` | `resid_post`, 5 |

TransformerLens: `hook_z` is `[batch, position, head, d_head]` with one entry for each *query* head,
`hook_post` `[batch, position, d_mlp]`, `hook_resid_post` `[batch, position, d_model]`. A model that
TransformerLens loaded with its weight processing on (folded norms, centred writing weights) has
another basis in the residual stream, so the values of a dimension differ there. nnsight paths are
the model's own module names; they start below the wrapper object. interp-engine names a tensor by
point and layer; `z` is the concatenation of all heads, `[batch, position, heads * head_dim]`.
Read from TransformerLens 4.3, nnsight 0.8.1 and interp-engine 1.14.2. Only models with one stack
have these names; other stacks raise InputError.
"""

from __future__ import annotations

import re

from regard._errors import InputError
from regard.coordinates import Dimension, Head, Neuron

Place = Head | Neuron | Dimension

_LENS = {
    Head: "blocks.{layer}.attn.hook_z",
    Neuron: "blocks.{layer}.mlp.hook_post",
    Dimension: "blocks.{layer}.hook_resid_post",
}
_POINTS = {Head: "z", Neuron: "mlp_act", Dimension: "resid_post"}


def to_transformer_lens(place: Place) -> tuple[str, int]:
    """The hook name, and the index of the place in the hooked tensor.

    Heads index axis 2 of `hook_z`; neurons and dimensions index the last axis.

    >>> to_transformer_lens(Head(5, 3))
    ('blocks.5.attn.hook_z', 3)
    """
    _single_stack(place, "TransformerLens")
    return _LENS[type(place)].format(layer=place.layer), place.unit


def from_transformer_lens(hook: str, index: int) -> Place:
    """The place at `index` of a hook; the inverse of `to_transformer_lens`.

    `blocks.N.hook_resid_pre` is the stream after block N - 1 and is understood for N >= 1.
    All per-head hooks of the query side (`hook_q`, `hook_pattern`, `hook_attn_scores`,
    `hook_result`) name the same head as `hook_z`. `hook_k` and `hook_v` count KV heads and are
    refused.

    >>> from_transformer_lens("blocks.4.mlp.hook_post", 17)
    mlp.4.n17
    """
    if match := re.fullmatch(r"blocks\.(\d+)\.attn\.hook_(?:z|q|pattern|attn_scores|result)", hook):
        return Head(int(match[1]), index)
    if match := re.fullmatch(r"blocks\.(\d+)\.mlp\.hook_post", hook):
        return Neuron(int(match[1]), index)
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", hook):
        layer = int(match[1]) - (match[2] == "pre")
        if layer < 0:
            raise InputError(f"{hook} is the embedding, which is after no block")
        return Dimension(layer, index)
    raise InputError(
        f"{hook!r} has no coordinate here; understood are blocks.N.attn.hook_z, "
        "blocks.N.mlp.hook_post and blocks.N.hook_resid_post"
    )


def to_nnsight(place: Place, module: str, head_dim: int | None = None) -> str:
    """The expression that reads a place in an nnsight trace, below the wrapper object.

    Args:
        place: a coordinate.
        module: the model's own name of the module, with `{layer}` for the number: the attention's
            output projection for a head, the MLP's down projection for a neuron, the block for a
            dimension. Names with the number filled in work as well
            (`model.layers.5.self_attn.o_proj`).
        head_dim: width of a head; needed for heads.

    Returns:
        For example `model.layers[5].self_attn.o_proj.input[..., 192:256]`. A dimension reads
        `.output[..., d]`; where a block returns a tuple (transformers before 5), write
        `.output[0][..., d]`.

    >>> to_nnsight(Head(5, 3), "model.layers.{layer}.self_attn.o_proj", head_dim=64)
    'model.layers[5].self_attn.o_proj.input[..., 192:256]'
    """
    path = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", module.format(layer=place.layer))
    if isinstance(place, Head):
        if not head_dim or head_dim < 1:
            raise InputError.of("head_dim", given=head_dim, expected="the width of a head")
        return f"{path}.input[..., {place.head * head_dim}:{(place.head + 1) * head_dim}]"
    side = "input" if isinstance(place, Neuron) else "output"
    return f"{path}.{side}[..., {place.index}]"


def from_nnsight(expression: str, head_dim: int | None = None) -> Place:
    """The place that an nnsight expression reads; the inverse of `to_nnsight`.

    A slice of a module's input is a head, one index of it a neuron, one index of an output a
    dimension of the stream. `[:, :, i]` counts as `[..., i]`.

    >>> from_nnsight("model.layers[5].self_attn.o_proj.input[..., 192:256]", head_dim=64)
    L5H3
    """
    match = re.fullmatch(
        r"[\w.]+\[(?P<layer>\d+)\](?P<inner>[\w.]*?)\.(?P<side>input|output)(?:\[0\])?"
        r"\[(?:\.\.\.|:, *:), *(?P<low>\d+)(?::(?P<high>\d+))?\]",
        expression.replace("\n", "").strip(),
    )
    if match is None:
        raise InputError(
            f"{expression!r} has no coordinate here; understood are "
            "model.layers[5].self_attn.o_proj.input[..., 192:256] and its kind"
        )
    layer, low = int(match["layer"]), int(match["low"])
    if match["high"] is not None and match["side"] == "input":
        width = int(match["high"]) - low
        if not head_dim:
            raise InputError.of("head_dim", given=head_dim, expected="the width of a head")
        if width != head_dim or low % head_dim:
            raise InputError(
                f"{expression!r} does not hold one head: heads start at multiples of {head_dim} "
                f"and are {head_dim} wide"
            )
        return Head(layer, low // head_dim)
    if match["high"] is None and match["side"] == "input" and match["inner"]:
        return Neuron(layer, low)
    if match["high"] is None and match["side"] == "output" and not match["inner"]:
        return Dimension(layer, low)
    raise InputError(f"{expression!r} reads neither one head, one neuron nor one dimension")


def to_interp_engine(place: Place) -> tuple[str, int]:
    """The point and the layer, `Address(*to_interp_engine(place))`.

    >>> to_interp_engine(Head(5, 3)), to_interp_engine(Neuron(4, 17))
    (('z', 5), ('mlp_act', 4))
    """
    _single_stack(place, "interp-engine")
    return _POINTS[type(place)], place.layer


def from_interp_engine(point: str, layer: int, index: int) -> Place:
    """The place at `index` (head, neuron or dimension) of a point.

    >>> from_interp_engine("resid_post", 5, 42)
    resid.5.d42
    """
    for kind, name in _POINTS.items():
        if name == point:
            return kind(layer, index)
    raise InputError.of("point", given=point, expected="'z', 'mlp_act' or 'resid_post'")


def _single_stack(place: Place, tool: str) -> None:
    if place.stack:
        raise InputError(
            f"{place} is in the stack {place.stack!r}; {tool} names are known here only for "
            "models with one stack"
        )
