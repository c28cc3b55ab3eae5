"""Sparse-GIN: fine-tune a frozen model by a small graph network over its own attention, between attention and MLP of each block.

    X <- X + Attention(norm X)
    S = min(sum_h A_h, 1),   E = sigmoid(10 (S - 0.1)) where that is above 0.6, else 0       edges from keys j <= i to queries i
    Z = W_in X;   u_i = eps Z_i + sum_j E_ij Z_j;   Y = act(W_2 act(W_1 u) + u)
    X <- X + lambda RMSNorm(W_out dropout(Y))

`act` is one PReLU, used twice; eps starts at 0; lambda is learnt for each layer and starts linear in depth, from 0 to 1/2. The
attention that makes the graph is that of the model, and gradients go through it.

    gin = sparse_gin(model, hidden=16)                      # freezes the model
    optimiser = torch.optim.AdamW(gin.parameters(), lr=2e-4)
    with regard.attach(model, gin):
        loss = model(ids, labels=ids).loss
    save_file(gin.state_dict(), "gin.safetensors")

It attaches to any decoder that `regard.attach` reaches, and generates: every layer keeps Z of the tokens seen. (Where the MLP
runs beside attention, not after it, the MLP does not see what is added.) Gradient checkpoints must be off.

Source: Buehler 2025, "Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers", arXiv 2501.02393. The released
code takes queries for the sources of edges, so that its causal filter leaves self-loops alone: `SelfLoopGIN` is that. Left out:
graphs from a mean or a learnt mixture of heads, and several layers.

Cost: attention in blocks in place of the fused kernel and one tokens x tokens graph a layer; 2 width g + 2 g^2 multiplications a
token and g for each key, g = `hidden`. Parameters 2 width g + 2 g^2 + 2 width + 3 g + 3 a layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard._errors import AttachError, InputError, at_least_one
from regard.attach import anatomy
from regard.engine import Block, Method, State
from regard.ops.graph_attention import (
    check_graph,
    self_loops,
    shared_attention,
    sparse_attention_graph,
)


class GraphNetwork(nn.Module):
    """One layer's graph network: `lambda RMSNorm(W_out dropout(Y))` of states and a graph.

    Args:
        width: of the residual stream.
        hidden: g.
        scale: lambda at first.
        dropout: before the last map.
    """

    def __init__(self, width: int, hidden: int, scale: float | int, dropout: float | int) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.first, self.second = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)
        self.activation = nn.PReLU()
        self.epsilon = nn.Parameter(torch.zeros(()))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def forward(
        self,
        nodes: Float[Tensor, "batch keys hidden"],
        edges: Float[Tensor, "batch queries keys"],
    ) -> Float[Tensor, "batch queries width"]:
        """What is added to the stream of the newest tokens; `nodes` are `into` of all tokens so far."""
        mixed = edges.to(nodes.dtype) @ nodes + self.epsilon * nodes[:, -edges.shape[1] :]
        states = self.second(self.activation(self.first(mixed))) + mixed
        written = self.out(self.dropout(self.activation(states)))
        return self.scale * self.norm(written)


class Seen(NamedTuple):
    """What a layer remembers of the tokens so far: its nodes, and a number for each that tells cached keys apart."""

    nodes: Float[Tensor, "batch tokens hidden"]
    marks: Float[Tensor, "batch tokens"]


class SparseGIN(nn.Module, Method):
    """Graph networks for all blocks of a model, to be attached to it; `sparse_gin` makes one that fits.

    Args:
        layers: blocks.
        width: of the residual stream.
        hidden: g, width / 20 by default (155 for 3072 in the paper).
        threshold: th, attention at which an edge is worth 1/2.
        steepness: a.
        keep: e_0, edges below it are left out; with the other two, there is an edge where S > 0.1405.
        scale: lambda of the first and of the last layer at first.
        dropout: before W_out.

    Raises:
        InputError: sizes below 1, or numbers with which pairs without attention would be edges.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        hidden: int | None = None,
        *,
        threshold: float | int = 0.1,
        steepness: float | int = 10.0,
        keep: float | int = 0.6,
        scale: tuple[float | int, float | int] = (0.0, 0.5),
        dropout: float | int = 0.1,
    ) -> None:
        super().__init__()
        hidden = max(1, round(width * 155 / 3072)) if hidden is None else hidden
        at_least_one(layers=layers, width=width, hidden=hidden)
        check_graph(threshold, steepness, keep)
        self.threshold, self.steepness, self.keep = threshold, steepness, keep
        starts = torch.linspace(float(scale[0]), float(scale[1]), layers).tolist()
        self.layers = nn.ModuleList(GraphNetwork(width, hidden, s, dropout) for s in starts)
        self._shared: dict[int, list[Tensor]] = {}
        self._marks: dict[int, Tensor] = {}
        self._inputs: dict[int, Tensor] = {}
        self._seen: dict[int, Seen] = {}

    def graph(
        self, shared: Float[Tensor, "batch queries keys"]
    ) -> Float[Tensor, "batch queries keys"]:
        """E of S."""
        return sparse_attention_graph(
            shared, threshold=self.threshold, steepness=self.steepness, keep=self.keep
        )

    @property
    def scales(self) -> Float[Tensor, " layers"]:
        """lambda of every layer."""
        return torch.stack([layer.scale.detach() for layer in self.layers])  # type: ignore[misc]

    def start(self, session: Any) -> None:
        self._forget()
        blocks = blocks_of(session.model, session.stacks)
        if len(blocks) != len(self.layers):
            raise InputError(
                f"this SparseGIN is for {len(self.layers)} layers, {type(session.model).__name__} has {len(blocks)}"
            )

    def stop(self) -> None:
        self._forget()

    def _forget(self) -> None:
        for held in (self._shared, self._marks, self._inputs, self._seen):
            held.clear()

    def weights(self, block: Block) -> None:
        site, call = block.site, block.call
        if site.stack or site.kind != "self":
            return
        if not site.causal:
            raise AttachError(f"SparseGIN is for causal attention, which {site.name} is not")
        keys = block.keys
        shared = shared_attention(block.weights)
        shared = nn.functional.pad(shared, (keys.start, call.keys - keys.stop))
        if int(block.rows[0]) == 0:
            self._shared[site.layer] = []
            self._marks[site.layer] = call.key.detach().float().sum((1, 3))
        self._shared[site.layer].append(shared)

    def residual(self, state: State) -> Tensor | None:
        if state.stack:
            return None
        if state.part == "embed":
            self._inputs[0] = state.hidden
        elif state.part == "block":
            self._inputs[state.layer + 1] = state.hidden
        elif state.part == "attention":
            return state.hidden + self._written(state.layer, state.hidden)
        return None

    def _written(self, layer: int, write: Tensor) -> Tensor:
        stream = self._inputs.pop(layer) + write
        network: Any = self.layers[layer]
        edges = self.graph(torch.cat(self._shared.pop(layer), 1))
        marks = self._marks.pop(layer)
        kept = network.into.weight
        nodes = network.into(stream.to(kept))
        if edges.shape[2] > nodes.shape[1]:
            nodes = torch.cat([self._past(layer, marks[:, : -nodes.shape[1]]), nodes], 1)
        self._seen[layer] = Seen(nodes.detach(), marks)
        return network(nodes, edges).to(write)

    def _past(self, layer: int, marks: Tensor) -> Tensor:
        """Nodes of the earlier tokens in the order of the cache, whose rows a beam search may have moved.

        Raises:
            AttachError: the cache does not hold the tokens that were seen here.
        """
        seen = self._seen.get(layer)
        if seen is not None and seen.marks.shape[1] == marks.shape[1]:
            near = 1e-4 * (1 + seen.marks.abs().amax())
            same = (marks[:, None] - seen.marks[None]).abs().amax(-1) < near
            if bool(same.any(1).all()):
                return seen.nodes[same.to(torch.uint8).argmax(1)]
        raise AttachError(
            f"the cache of layer {layer} holds {marks.shape[1]} earlier tokens, which are not those that SparseGIN saw; begin "
            "the text anew after attaching, and use a cache that keeps all tokens in their order"
        )


class SelfLoopGIN(SparseGIN):
    """The edges of each token to itself alone, as in the released code: an adapter, gated by attention to itself."""

    def graph(
        self, shared: Float[Tensor, "batch queries keys"]
    ) -> Float[Tensor, "batch queries keys"]:
        return self_loops(super().graph(shared))


def sparse_gin(
    model: nn.Module,
    hidden: int | None = None,
    *,
    kind: type[SparseGIN] = SparseGIN,
    **options: Any,
) -> SparseGIN:
    """A `SparseGIN` that fits a pretrained decoder, on its device; the model's own parameters are frozen.

    Args:
        model: a decoder that `regard.attach` reaches.
        hidden: g, a twentieth of the width by default.
        kind: `SparseGIN` or `SelfLoopGIN`.
        options: those of `SparseGIN`.

    Raises:
        InputError: a model without a stack of blocks whose attention writes to a residual stream, or a wrong option.
    """
    config: Any = getattr(model, "config", None)
    blocks = blocks_of(model, anatomy(model))
    if config is None or not hasattr(config.get_text_config(), "hidden_size"):
        raise InputError(
            f"the width of {type(model).__name__} cannot be read from its config; make a SparseGIN"
        )
    made = kind(len(blocks), config.get_text_config().hidden_size, hidden, **options)
    model.requires_grad_(False)
    return made.to(next(model.parameters()).device)


def blocks_of(model: nn.Module, stacks: list[Any]) -> list[Any]:
    """The main stack's blocks.

    Raises:
        InputError: there is none, or its attention does not write to a residual stream.
    """
    blocks = next((stack.blocks for stack in stacks if stack.name == ""), [])
    if not blocks or any(block.attention_write is None for block in blocks):
        raise InputError(
            f"{type(model).__name__} has no stack of decoder blocks whose attention writes to a residual stream"
        )
    return blocks
