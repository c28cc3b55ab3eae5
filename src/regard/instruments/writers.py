"""Who writes, keeps and erases a massive activation: sub-layers, heads and neurons, layer by layer.

In a residual architecture the stream at token t* and dimension d* is a sum,

    h_L[t*, d*] = embedding + sum_l ( attention_l + MLP_l )[t*, d*]
    attention_l = sum_h (o_h W_o^h)[d*] + b_o[d*]          o_h: output of head h at t*
    MLP_l       = sum_n a_n W_down[d*, n] + b_down[d*]     a_n: neuron n, the input of the down projection

so each head and neuron has an exact share (component attribution of arXiv 2510.22603; arXiv 2410.13835 for the erasing last
layers). Where a norm follows the sub-layer (Gemma 2, OLMo 2), its scale at t* is taken as given, which keeps the sum exact.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard._errors import AttachError, InputError
from regard.attach import BlockParts, Session
from regard.engine import AttentionCall, State
from regard.instruments._tokens import first_token, wide
from regard.instruments._writing import Write, Writing
from regard.instruments.base import Instrument, SiteKey
from regard.instruments.stream import ResidualPeaks

if TYPE_CHECKING:
    import polars


class Writers(Instrument):
    """Keeps what every part of every layer adds at one token, so that any dimension can be decomposed afterwards.

    Args:
        token: which token to follow, counted from the first real one of each sequence. Sequences too short for it and decode
            steps are left out.

    `compute()` decomposes the dimension of largest size, `compute(507)` the one given.

    Cost: reads one token's rows and runs its projections a second time to check the sums, O(1 / tokens) of the forward pass;
    memory O(layers x (dim + d_ff)), whatever the number of sequences. The instrument refers to the model until it is deleted.

    Raises (at `compute`):
        AttachError: when a block's output is not its input plus what attention and MLP add.
        InputError: when nothing was observed.
    """

    states = dict.fromkeys(
        [
            *("embed", "attention", "cross", "mlp", "block", "heads", "neurons"),
            *("embed.count", "heads.count", "neurons.count"),
        ],
        "sum",
    ) | {"precision": "max"}

    def __init__(self, token: int = 0) -> None:
        super().__init__()
        if token < 0:
            raise InputError.of("token", given=token, expected="a position >= 0")
        self.token = token
        self._blocks: dict[SiteKey, BlockParts] = {}
        self._gains: dict[int, Tensor] = {}
        self.stop()

    def start(self, session: Session) -> None:
        for stack in session.stacks:
            for block in stack.blocks:
                self._blocks[stack.name, block.layer] = block

    def stop(self) -> None:
        self._rows: tuple[Tensor, Tensor] | None = None
        self._shape: tuple[int, ...] = ()
        self._held: dict[tuple[str, SiteKey], Tensor] = {}

    def residual(self, state: State) -> None:
        key = (state.stack, state.layer)
        if state.part == "embed":
            self._choose(state)
            if self._rows is not None:
                self.accumulate("embed.count", key, torch.tensor(float(len(self._rows[0]))))
                precision = torch.finfo(state.hidden.dtype).eps
                self.accumulate("precision", key, torch.tensor(precision))
        read = self._read(state.hidden)
        if read is None or state.part not in self.states:
            return
        written = wide(read)
        if key in self._blocks and state.part in ("attention", "mlp"):
            self._split(self._blocks[key], state.part, key, written)
        self.accumulate(state.part, key, written.double().sum(0).cpu())

    def _choose(self, state: State) -> None:
        """Which slot of each sequence to read in this forward pass; none in a decode step."""
        self._rows, self._held = None, {}
        if state.hidden.dim() != 3:
            return
        self._shape = batch, tokens = state.hidden.shape[:2]
        if tokens == 1 and (state.stack, 0) in self.state["embed"]:
            return
        slot = first_token(state.valid, batch, state.hidden.device) + self.token
        there = slot < tokens
        if state.valid is not None:
            there &= state.valid.gather(1, slot.clamp(max=tokens - 1)[:, None])[:, 0]
        if bool(there.any()):
            self._rows = (there.nonzero()[:, 0], slot[there])

    def _read(self, hidden: Tensor) -> Tensor | None:
        """The followed rows `[sequences, features]` of a tensor over all tokens."""
        if self._rows is None:
            return None
        if (
            hidden.dim() == 2 and len(hidden) == self._shape[0] * self._shape[1]
        ):  # OPT flattens its batch
            hidden = hidden.view(*self._shape, -1)
        return hidden[self._rows] if hidden.shape[:2] == self._shape else None

    def heads(self, call: AttentionCall, output: Tensor) -> None:
        if self._rows is not None and call.site.kind == "self":
            sequences, slots = self._rows
            self._held["attention", call.site.key] = wide(output[sequences, :, slots])

    def neurons(self, state: State) -> None:
        read = self._read(state.hidden)
        if read is not None:
            self._held["mlp", (state.stack, state.layer)] = wide(read)

    def _split(self, block: BlockParts, part: str, key: SiteKey, written: Tensor) -> None:
        """Adds the heads' outputs or the neurons of a sub-layer, when their projections do sum to what it wrote."""
        held = self._held.pop((part, key), None)
        projection, norm, name = route(block, part)
        weight = None if projection is None else matrix(projection)
        if held is None or weight is None or held.flatten(1).shape[1] != weight[0].shape[1]:
            return
        inputs = held.flatten(1).to(weight[0].dtype)
        projected = nn.functional.linear(inputs, *weight).to(written.dtype)
        scale = written.new_ones(len(written), 1)
        if norm is not None:
            projected = projected * self._gain(norm, written).to(written.dtype)
            scale = (written * projected).sum(-1, True) / projected.square().sum(-1, True)
        gap = (projected * scale - written).abs().amax()
        exact = weight[0].dtype in (torch.float32, torch.float64)
        if float(gap) > (1e-3 if exact else 3e-2) * float(written.abs().amax()):
            return
        scale = scale.view(-1, *[1] * (held.dim() - 1)).double()
        self.accumulate(name, key, (held.double() * scale).sum(0).cpu())
        self.accumulate(f"{name}.count", key, torch.tensor(float(len(held))))

    def _gain(self, norm: nn.Module, like: Tensor) -> Tensor:
        """The gain of an RMS norm: what it makes of a vector of ones. Other norms fail the check that follows."""
        if id(norm) not in self._gains:
            parameter = next(norm.parameters(), like)
            ones = torch.ones(1, 1, like.shape[-1], dtype=parameter.dtype, device=like.device)
            with (
                torch.no_grad()
            ):  # `forward` itself: calling the module would run this session's hooks
                self._gains[id(norm)] = norm.forward(ones)[0, 0].detach()
        return self._gains[id(norm)]

    def compute(self, dimension: int | None = None) -> dict[str, Writing]:
        """The decomposition of one dimension for every stack in which the sums hold."""
        if not self.state["embed"]:
            raise InputError(
                f"no sequence with a token {self.token} was observed; run the model inside regard.attach(model, Writers())"
            )
        found, reasons = {}, []
        for stack, _ in self.state["embed"]:
            reason = self._not_additive(stack)
            if reason:
                reasons.append(reason)
            else:
                found[stack] = self._decompose(stack, dimension)
        if not found:
            raise AttachError(
                f"{reasons[0]}; writers and erasers are defined where a block adds its attention and its MLP to the stream"
            )
        return found

    def _layers(self, stack: str) -> list[int]:
        return sorted(layer for name, layer in self.state["block"] if name == stack)

    def _vectors(self, stack: str, part: str) -> Float[Tensor, "layers dim"]:
        zero = torch.zeros_like(self.state["embed"][stack, 0])
        rows = [self.state[part].get((stack, layer), zero) for layer in self._layers(stack)]
        return torch.stack(rows) / self.state["embed.count"][stack, 0]

    def _not_additive(self, stack: str) -> str:
        """Why the decomposition would be wrong, or an empty text."""
        block = self._vectors(stack, "block")
        first = (self.state["embed"][stack, 0] / self.state["embed.count"][stack, 0])[None]
        before = torch.cat([first, block[:-1]])
        added = [self._vectors(stack, part) for part in ("attention", "cross", "mlp")]
        gap = (block - before - sum(added)).abs().amax(-1)
        rounding = 8 * float(self.state["precision"][stack, 0])
        room = rounding * torch.maximum(block.abs(), before.abs()).amax(-1)
        wrote = torch.stack(added).abs().amax((0, 2))
        layer = int((gap - room).argmax())
        if float(gap[layer]) <= float(room[layer]):
            return ""
        where = f"{stack} " if stack else ""
        return (
            f"{where}block {layer} is not its input plus its attention and MLP writes "
            f"(it differs by {float(gap[layer]):.2g}, the writes are up to {float(wrote[layer]):.2g})"
        )

    def _decompose(self, stack: str, dimension: int | None) -> Writing:
        block = self._vectors(stack, "block")
        size = block.shape[-1]
        if dimension is None:
            dimension = int(block.abs().amax(0).argmax())
        if not 0 <= dimension < size:
            raise InputError.of("dimension", given=dimension, expected=f"from 0 to {size - 1}")
        heads, neurons = [], []
        for layer in self._layers(stack):
            heads.append(self._contributions("heads", (stack, layer), dimension))
            neurons.append(self._contributions("neurons", (stack, layer), dimension))
        most = max((len(row) for row in heads if row is not None), default=0)
        table = torch.full((len(heads), most), float("nan"))
        for layer, row in enumerate(heads):
            if row is not None:
                table[layer, : len(row)] = row
        count = self.state["embed.count"][stack, 0]
        return Writing(
            self.token,
            dimension,
            float(self.state["embed"][stack, 0][dimension] / count),
            block[:, dimension].float(),
            self._vectors(stack, "attention")[:, dimension].float(),
            self._vectors(stack, "mlp")[:, dimension].float(),
            self._vectors(stack, "cross")[:, dimension].float(),
            table,
            neurons,
            stack,
        )

    def _contributions(self, name: str, key: SiteKey, dimension: int) -> Tensor | None:
        """What each head or neuron adds to `dimension`, averaged over sequences."""
        count = self.state["embed.count"][key[0], 0]
        if not torch.equal(self.state[f"{name}.count"].get(key, torch.zeros(())), count):
            return None
        projection, norm, _ = route(self._blocks[key], "attention" if name == "heads" else "mlp")
        assert projection is not None
        found = matrix(projection)
        assert found is not None
        row = found[0][dimension].double().cpu()
        if norm is not None:
            row = row * self._gain(norm, found[0][:, 0]).double().cpu()[dimension]
        mean = self.state[name][key] / count
        return (
            (mean * row.view(mean.shape)).sum(-1).float()
            if name == "heads"
            else (mean * row).float()
        )

    def to_frame(self) -> polars.DataFrame:
        """The decomposition of the largest dimension (needs the `frames` extra)."""
        import polars

        return polars.concat([writing.to_frame() for writing in self.compute().values()])

    def measures(self) -> dict[str, Any]:
        """None: a head's write is about one dimension; see `compute()`."""
        return {}

    def plot(self) -> Any:
        """The largest dimension by layer (needs the `plot` extra)."""
        return next(iter(self.compute().values())).plot().figure


def route(block: BlockParts, part: str) -> tuple[nn.Module | None, nn.Module | None, str]:
    """A sub-layer's last projection, the norm behind it if there is one, and what it projects."""
    attends = part == "attention"
    projection = block.output_projection if attends else block.down_projection
    own = block.attention if attends else block.mlp
    last = block.attention_write if attends else block.mlp_write
    norm = None if last is own or last is projection else last
    return projection, norm, "heads" if attends else "neurons"


def matrix(projection: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Weight `[out, in]` and bias of a linear layer or of GPT-2's transposed one; None for anything else."""
    weight, bias = getattr(projection, "weight", None), getattr(projection, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if isinstance(projection, nn.Linear):
        return weight.detach(), None if bias is None else bias.detach()
    if type(projection).__name__ == "Conv1D":
        return weight.detach().T, None if bias is None else bias.detach()
    return None


def writers(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    token: int | None = None,
    dimension: int | None = None,
    stack: str = "",
) -> Writing:
    """Finds the largest activation of the residual stream and names who writes and erases it; two forward passes.

    Args:
        input_ids: token ids `[batch, tokens]`.
        token, dimension: decompose this place instead of the one found.

    Raises:
        AttachError: when blocks do not add their parts to the stream.
    """
    inputs = {"input_ids": input_ids} | (
        {} if attention_mask is None else {"attention_mask": attention_mask}
    )
    if token is None:
        peaks = ResidualPeaks()
        with torch.inference_mode(), Session(model, peaks):
            model(**inputs)
        _, token, found = peaks.compute()[stack].summit
        dimension = found if dimension is None else dimension
    follow = Writers(token)
    with torch.inference_mode(), Session(model, follow):
        model(**inputs)
    return follow.compute(dimension)[stack]


__all__ = ["Write", "Writers", "Writing", "matrix", "writers"]
