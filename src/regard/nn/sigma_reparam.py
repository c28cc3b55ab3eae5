"""Linear maps whose spectral norm is one learnable number: sigmaReparam.

    W_hat = (gamma / sigma(W)) W,     sigma(W) = v^T W u,     y = W_hat x + b

u and v are the leading singular vectors, followed by one step of power iteration in every forward pass of training:

    v <- W u / ||W u||;   u <- W^T v / ||W^T v||      (no gradient through u and v, so d sigma / d W = v u^T)

||W_hat||_2 = |gamma| whatever the width and however far W has grown: the norm of query and key weights cannot run away, and
with it attention entropy does not collapse (`regard.ops.entropy_lower_bound`). W_hat does not change when W is scaled, so an
update of W turns it by about rate / ||W||: small weights and a large rate turn it freely and nothing is learnt. Decay neither
W (it only makes its steps larger) nor gamma.

Source: Zhai et al. 2023, "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", arXiv 2303.06296.

Cost: 4 in x out more multiplications a forward pass, whatever the batch; folded back (`fuse`) nothing.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from regard._errors import InputError

GammaStart = Literal["one", "spectral"]
"""What gamma starts from: 1, or the norm that W has, so that W_hat = W at first."""


class _SigmaReparam(nn.Module):
    """The weight W_hat of a layer; subclasses apply it.

    `weight` is W_hat, so that code which reads a layer's weight sees the map that is applied. The parameters are `raw` (W) and
    `gamma`; the buffer `right` is u.
    """

    raw: nn.Parameter
    bias: nn.Parameter | None
    right: Tensor

    def _take(self, raw: Tensor, bias: Tensor | None, gamma: GammaStart) -> None:
        assert isinstance(raw, nn.Parameter) and (bias is None or isinstance(bias, nn.Parameter))
        if gamma not in ("one", "spectral"):
            raise InputError.of("gamma", given=gamma, expected='"one" or "spectral"')
        self.raw = raw
        self.register_parameter("bias", bias)
        with torch.no_grad():
            matrix = _precise(raw.flatten(1))
            _, sizes, rows = torch.linalg.svd(matrix, full_matrices=False)
            if not float(sizes[0]) > 0:
                raise InputError("a weight that is all zeros has no spectral norm to divide by")
            start = sizes[0] if gamma == "spectral" else torch.ones_like(sizes[0])
        self.gamma = nn.Parameter(start.to(raw.dtype).clone())
        self.register_buffer("right", rows[0].clone())

    @property
    def weight(self) -> Tensor:
        """W_hat, in the shape and precision of W. In training every reading takes one step of power iteration."""
        return self._normalised(keep=self.training)

    def _normalised(self, *, keep: bool) -> Tensor:
        matrix = _precise(self.raw.flatten(1))
        with torch.no_grad():
            left = functional.normalize(matrix @ self.right.to(matrix.dtype), dim=0)
            right = functional.normalize(matrix.T @ left, dim=0)
            if keep:
                self.right.copy_(right)
        sigma = left @ (matrix @ right)
        return (self.gamma / sigma * matrix).to(self.raw.dtype).view_as(self.raw)


class SigmaReparamLinear(_SigmaReparam):
    """A linear layer whose weight has spectral norm |gamma|.

    Args:
        in_features: numbers in.
        out_features: numbers out.
        bias: whether there is a bias; it starts at 0.
        std: spread of the truncated normal that W starts from (0.02 in vision, 0.1 in speech; it sets how fast the
            direction of W turns, see the module).
        gamma: what gamma starts from.

    >>> layer = SigmaReparamLinear(6, 4)
    >>> for _ in range(50): _ = layer(torch.randn(2, 6))
    >>> float(torch.linalg.matrix_norm(layer.weight, 2).detach().round(decimals=4))
    1.0
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        std: float = 0.02,
        gamma: GammaStart = "one",
    ) -> None:
        super().__init__()
        raw = nn.init.trunc_normal_(torch.empty(out_features, in_features), std=std)
        start = nn.Parameter(torch.zeros(out_features)) if bias else None
        self._take(nn.Parameter(raw), start, gamma)

    @classmethod
    def of(cls, linear: nn.Linear, gamma: GammaStart = "spectral") -> SigmaReparamLinear:
        """This layer with the weight and bias of a linear layer: the parameters themselves, not copies."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._take(linear.weight, linear.bias, gamma)
        return made.train(linear.training)

    @property
    def in_features(self) -> int:
        return self.raw.shape[1]

    @property
    def out_features(self) -> int:
        return self.raw.shape[0]

    def forward(self, hidden: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch outputs"]:
        return functional.linear(hidden, self.weight, self.bias)

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """A plain linear layer that computes what this one computes in evaluation."""
        plain = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.raw.device,
            dtype=self.raw.dtype,
        )
        return _folded(self, plain)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class SigmaReparamConv2d(_SigmaReparam):
    """A convolution whose weight, as a matrix `[out, in * height * width]`, has spectral norm |gamma|.

    Args:
        convolution: a plain convolution; its parameters are taken over, not copied.
        gamma: what gamma starts from.

    Raises:
        InputError: a convolution that pads with anything but zeros.

    >>> SigmaReparamConv2d(nn.Conv2d(3, 8, 4, stride=4))(torch.randn(2, 3, 16, 16)).shape
    torch.Size([2, 8, 4, 4])
    """

    def __init__(self, convolution: nn.Conv2d, gamma: GammaStart = "spectral") -> None:
        super().__init__()
        if convolution.padding_mode != "zeros":
            raise InputError.of(
                "padding_mode", given=convolution.padding_mode, expected='"zeros" to be converted'
            )
        self.geometry: dict[str, Any] = {
            name: getattr(convolution, name) for name in ("stride", "padding", "dilation", "groups")
        }
        self._take(convolution.weight, convolution.bias, gamma)
        self.train(convolution.training)

    def forward(
        self, images: Float[Tensor, "*batch channels height width"]
    ) -> Float[Tensor, "*batch maps rows columns"]:
        return functional.conv2d(images, self.weight, self.bias, **self.geometry)

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """A plain convolution that computes what this one computes in evaluation."""
        outputs, inputs, *kernel = self.raw.shape
        plain = nn.Conv2d(
            inputs * self.geometry["groups"],
            outputs,
            (kernel[0], kernel[1]),
            bias=self.bias is not None,
            device=self.raw.device,
            dtype=self.raw.dtype,
            **self.geometry,
        )
        return _folded(self, plain)


Plain = TypeVar("Plain", nn.Linear, nn.Conv2d)


def _folded(layer: _SigmaReparam, plain: Plain) -> Plain:
    plain.weight.copy_(layer._normalised(keep=False))
    if layer.bias is not None:
        plain.bias = layer.bias
    return plain.train(layer.training)


def _precise(matrix: Tensor) -> Tensor:
    """In float32 or better: power iteration in 16 bits would miss the norm by a percent."""
    return matrix if matrix.dtype == torch.float64 else matrix.float()
