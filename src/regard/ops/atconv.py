"""Attentive convolution: a depthwise convolution whose kernels belong to one image and one channel.

    p_i    = mean of the features in run i of k^2 runs   (run i: [floor(i N / k^2), ceil((i + 1) N / k^2)) of N = H W)
    K'_c   = K_c - alpha_c mean(K_c)                              lateral inhibition, alpha in [0, 1]
    Y_bc   = V_bc * K'_bc                                         cross-correlation, zero padding, stride 1

The same kernel slides over the whole map: it depends on the image, not on the place. Inhibition leaves sum(K') = (1 - alpha)
sum(K); at alpha = 1 a kernel has no constant part and only answers to differences.

Source: "Attentive Convolution: Unifying the Expressivity of Self-Attention with Convolutional Efficiency", arXiv 2510.20092.
The released code pools runs of the row-major sequence, not cells of a grid, so the k^2 numbers carry no meaning as places.

Cost: k^2 multiplications a number of the map.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from regard._errors import InputError


def attentive_conv2d(
    values: Float[Tensor, "batch channels height width"],
    kernels: Float[Tensor, "images maps rows columns"],
) -> Float[Tensor, "batch channels height width"]:
    """Each channel of each image, correlated with its own kernel of odd sides; zeros beyond the edges.

    One convolution of batch x channels groups, which is the fastest way on a processor too: summing shifted maps tap by tap
    takes two to five times as long.

    Raises:
        InputError: kernels of even sides, or of another batch or number of channels.

    >>> identity = torch.zeros(1, 2, 3, 3)
    >>> identity[:, :, 1, 1] = 1
    >>> image = torch.randn(1, 2, 5, 4)
    >>> torch.equal(attentive_conv2d(image, identity), image)
    True
    """
    rows, columns = kernels.shape[-2:]
    if values.shape[:2] != kernels.shape[:2]:
        raise InputError(
            f"values {tuple(values.shape)} and kernels {tuple(kernels.shape)} must agree in batch and channels"
        )
    if rows % 2 == 0 or columns % 2 == 0:
        raise InputError.of("kernels", given=tuple(kernels.shape), expected="of odd sides")
    mixed = torch.nn.functional.conv2d(
        values.flatten(0, 1)[None],
        kernels.flatten(0, 1)[:, None],
        padding=(rows // 2, columns // 2),
        groups=len(values) * values.shape[1],
    )
    return mixed[0].view_as(values)


def lateral_inhibition(
    kernels: Float[Tensor, "batch channels rows columns"], alpha: Float[Tensor, " channels"]
) -> Float[Tensor, "batch channels rows columns"]:
    """Kernels less the share `alpha` of their own mean.

    >>> kernels = torch.arange(9.0).view(1, 1, 3, 3)
    >>> float(lateral_inhibition(kernels, torch.ones(1)).sum())
    0.0
    """
    return kernels - alpha[:, None, None] * kernels.mean((-2, -1), keepdim=True)


def run_pool(
    features: Float[Tensor, "batch channels height width"], runs: int
) -> Float[Tensor, "batch channels {runs}"]:
    """Means over `runs` consecutive stretches of the row-major pixels; they overlap by a pixel where pixels do not divide.

    >>> run_pool(torch.arange(8.0).view(1, 1, 2, 4), 4)
    tensor([[[0.5000, 2.5000, 4.5000, 6.5000]]])
    """
    return torch.nn.functional.adaptive_avg_pool1d(features.flatten(2), runs)


def grid_pool(
    features: Float[Tensor, "batch channels height width"], side: int
) -> Float[Tensor, "batch channels {side*side}"]:
    """Means over the cells of a grid of `side` rows and columns, row by row: another operator than `run_pool`."""
    return torch.nn.functional.adaptive_avg_pool2d(features, side).flatten(2)


class KernelRedundancy(NamedTuple):
    """How alike the kernels of a layer are.

    Attributes:
        similarity: mean |cosine| between the kernels of two channels of one image.
        constant: share of the kernels' energy in their means, k^2 mean^2 / sum of squares.
    """

    similarity: float
    constant: float


def kernel_redundancy(
    kernels: Float[Tensor, "batch channels rows columns"],
) -> KernelRedundancy:
    """Similarity of channel kernels and the share of their energy that is constant, over a batch.

    Raises:
        InputError: fewer than two channels.

    Cost: batch x channels^2 x k^2 multiplications.

    >>> kernel_redundancy(torch.ones(1, 2, 3, 3))
    KernelRedundancy(similarity=1.0, constant=1.0)
    """
    channels = kernels.shape[1]
    if channels < 2:
        raise InputError.of("channels", given=channels, expected="2 or more to compare")
    flat = kernels.detach().double().flatten(2)
    unit = torch.nn.functional.normalize(flat, dim=-1)
    cosines = (unit @ unit.transpose(1, 2)).abs()
    own = cosines.diagonal(dim1=1, dim2=2).sum(-1)
    similarity = (cosines.sum((1, 2)) - own) / (channels * (channels - 1))
    constant = flat.shape[-1] * flat.mean(-1).square().sum() / flat.square().sum()
    return KernelRedundancy(round(float(similarity.mean()), 12), round(float(constant), 12))
