"""Attentive convolution (ATConv): a token mixer for images, 3x3 in reach, whose kernels are made from the whole image.

    P   = pool(W_kernel X)                       k^2 means of each channel
    K   = act(P) W + b                           one k^2 x k^2 map, shared by all channels
    K'  = K - sigmoid(theta_c) mean(K)           lateral inhibition; theta starts at 0: half of the mean goes
    out = W_proj (K' * W_x X)                    each image and channel its own kernel

Cost is linear in the pixels: 3 C^2 + k^2 C multiplications each, where attention also pays 2 C for every other pixel.

Source: "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency", arXiv 2510.20092;
operator, pooling and initialisation as in the released code. `pool="grid"` pools cells of a k x k grid instead, another operator
that fits no released weights. theta is a vector, and like all vectors is to have no weight decay.

These modules see the whole image, so they are no causal mixers (`regard.nn.Mixer`).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from regard._errors import InputError
from regard.ops.atconv import attentive_conv2d, grid_pool, lateral_inhibition, run_pool

Activation = Literal["gelu", "tanh", "silu"]
ACTIVATIONS = {
    "gelu": functional.gelu,
    "tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
}


class ATConv2d(nn.Module):
    """Attentive convolution of images `[batch, width, rows, columns]` of any size.

    Args:
        width: channels.
        kernel: odd side of the kernels.
        pool: "run" (as released: stretches of the row-major pixels) or "grid".
        act: on the pooled numbers: "gelu" (AttNet), "tanh" (tanh-GELU, SiT) or "silu" (REPA).

    Cost: 3 width^2 + kernel^2 width multiplications a pixel; 3 width^2 + 4 width + kernel^4 + kernel^2 parameters.

    Raises:
        InputError: an even kernel, or an unknown pool or act.

    >>> ATConv2d(8)(torch.randn(2, 8, 14, 10)).shape
    torch.Size([2, 8, 14, 10])
    """

    def __init__(
        self,
        width: int,
        *,
        kernel: int = 3,
        pool: Literal["run", "grid"] = "run",
        act: Activation = "gelu",
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise InputError.of("kernel", given=kernel, expected="an odd side of 1 or more")
        if pool not in ("run", "grid"):
            raise InputError.of("pool", given=pool, expected='"run" or "grid"')
        if act not in ACTIVATIONS:
            raise InputError.of("act", given=act, expected=f"one of {', '.join(ACTIVATIONS)}")
        self.width, self.kernel, self.pool, self.act = width, kernel, pool, act
        self.kernel_proj, self.x_proj, self.o_proj = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.generate = nn.Linear(kernel**2, kernel**2)
        self.theta = nn.Parameter(torch.zeros(width))

    def routed(self, features: Tensor) -> Float[Tensor, "batch width kernel kernel"]:
        """The kernels that the image asks for, before inhibition."""
        features = self.kernel_proj(features)
        pooled = (
            run_pool(features, self.kernel**2)
            if self.pool == "run"
            else grid_pool(features, self.kernel)
        )
        made = self.generate(ACTIVATIONS[self.act](pooled))
        return made.unflatten(-1, (self.kernel, self.kernel))

    def kernels(
        self, features: Float[Tensor, "batch width rows columns"]
    ) -> Float[Tensor, "batch width kernel kernel"]:
        """The kernels that are applied, one for each image and channel."""
        return lateral_inhibition(self.routed(features), self.theta.sigmoid())

    def forward(
        self, features: Float[Tensor, "batch width rows columns"]
    ) -> Float[Tensor, "batch width rows columns"]:
        mixed = attentive_conv2d(self.x_proj(features), self.kernels(features))
        return self.o_proj(mixed)


class ATConvTokenMixer(nn.Module):
    """Attentive convolution in place of self-attention, for tokens `[batch, tokens, width]` that are the patches of an image.

    The tokens are laid out row by row, on a square grid unless `grid` gives (rows, columns). A class or text token has no place
    there: keep it out. Weights are those of an `ATConv2d`, `mixer`; the 1x1 convolutions are the linear layers of the SiT code.

    Raises:
        InputError: tokens that do not fill the grid.

    >>> ATConvTokenMixer(8)(torch.randn(2, 16, 8)).shape
    torch.Size([2, 16, 8])
    """

    def __init__(
        self,
        width: int,
        *,
        kernel: int = 3,
        pool: Literal["run", "grid"] = "run",
        act: Activation = "tanh",
    ) -> None:
        super().__init__()
        self.mixer = ATConv2d(width, kernel=kernel, pool=pool, act=act)

    def forward(
        self, hidden: Float[Tensor, "batch tokens width"], grid: tuple[int, int] | None = None
    ) -> Float[Tensor, "batch tokens width"]:
        tokens = hidden.shape[1]
        side = math.isqrt(tokens)
        rows, columns = grid or (side, side)
        if rows * columns != tokens:
            wanted = "a square number" if grid is None else f"{rows} x {columns}"
            raise InputError.of(
                "tokens",
                given=tokens,
                expected=wanted,
                fix="leave class and text tokens out, or give the grid",
            )
        image = hidden.transpose(1, 2).unflatten(2, (rows, columns))
        return self.mixer(image).flatten(2).transpose(1, 2)


@torch.no_grad()
def routing_kernels(model: nn.Module, *inputs: Any) -> dict[str, Tensor]:
    """The kernels `[batch, channels, k, k]` that each `ATConv2d` of a model applies to these inputs, by path.

    What an attention map is to attention: where a pixel's neighbours lie that it takes from, and with which sign. The model is
    run once, and is left as it was.

    Raises:
        InputError: the model has no `ATConv2d`.

    >>> {name: tuple(k.shape) for name, k in routing_kernels(ATConvTokenMixer(8), torch.randn(2, 16, 8)).items()}
    {'mixer': (2, 8, 3, 3)}
    """
    found: dict[str, Tensor] = {}

    def read(name: str, layer: ATConv2d) -> Any:
        return layer.register_forward_pre_hook(
            lambda module, args: found.__setitem__(name, layer.kernels(args[0]))
        )

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, ATConv2d)]
    if not layers:
        raise InputError(f"{type(model).__name__} has no ATConv2d whose kernels could be read")
    hooks = [read(name, layer) for name, layer in layers]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
