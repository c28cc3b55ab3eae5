"""Attentive convolution against a pixel-by-pixel sum, and what inhibition does to kernels."""

from __future__ import annotations

import math

import pytest
import torch

from regard._errors import InputError
from regard.ops import attentive_conv2d, kernel_redundancy, lateral_inhibition, run_pool
from regard.ops.atconv import grid_pool


def by_pixel(values: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Every output number from the definition of a cross-correlation with zeros outside."""
    height, width = values.shape[-2:]
    rows, columns = kernels.shape[-2:]
    found = torch.zeros_like(values)
    for y in range(height):
        for x in range(width):
            for i in range(rows):
                for j in range(columns):
                    row, column = y + i - rows // 2, x + j - columns // 2
                    if 0 <= row < height and 0 <= column < width:
                        found[:, :, y, x] += kernels[:, :, i, j] * values[:, :, row, column]
    return found


@pytest.mark.parametrize("sides", [(3, 3), (1, 1), (5, 3)])
def test_it_is_the_sum_over_taps(sides):
    torch.manual_seed(0)
    values = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    kernels = torch.randn(2, 3, *sides, dtype=torch.float64)
    torch.testing.assert_close(
        attentive_conv2d(values, kernels), by_pixel(values, kernels), rtol=0, atol=1e-12
    )


def test_gradients():
    torch.manual_seed(0)
    values = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    kernels = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    alpha = torch.rand(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v, k, a: attentive_conv2d(v, lateral_inhibition(k, a)), (values, kernels, alpha)
    )


def test_inhibition_leaves_the_share_of_the_sum_that_it_says():
    torch.manual_seed(0)
    kernels, alpha = torch.randn(2, 4, 3, 3), torch.tensor([0.0, 0.3, 0.5, 1.0])
    kept = lateral_inhibition(kernels, alpha)
    torch.testing.assert_close(kept.sum((-2, -1)), (1 - alpha) * kernels.sum((-2, -1)))
    torch.testing.assert_close(kept[:, 0], kernels[:, 0])
    flat = torch.full((2, 4, 6, 6), 7.0)
    inner = attentive_conv2d(flat, kept)[:, 3, 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.zeros_like(inner), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 6), (5, 7), (2, 3)])
def test_runs_cover_the_row_major_pixels(shape):
    torch.manual_seed(0)
    features = torch.randn(2, 3, *shape, dtype=torch.float64)
    flat, count = features.flatten(2), math.prod(shape)
    expected = torch.stack(
        [flat[..., i * count // 9 : -(-(i + 1) * count // 9)].mean(-1) for i in range(9)], -1
    )
    torch.testing.assert_close(run_pool(features, 9), expected)


def test_runs_are_no_grid():
    features = torch.zeros(1, 1, 6, 6)
    features[..., :2, :2] = 1
    assert float(grid_pool(features, 3)[0, 0, 0]) == 1.0
    assert float(run_pool(features, 9)[0, 0, 0]) == pytest.approx(0.5)


def test_redundancy_of_known_kernels():
    kernels = torch.zeros(1, 3, 3, 3)
    kernels[0, 0, 0, 0], kernels[0, 1, 0, 0], kernels[0, 2, 1, 1] = 2.0, -1.0, 1.0
    found = kernel_redundancy(kernels)
    assert found.similarity == pytest.approx(1 / 3)
    assert found.constant == pytest.approx(1 / 9)


def test_what_does_not_fit_is_named():
    with pytest.raises(InputError, match=r"\(2, 3, 4, 4\).*\(2, 2, 3, 3\)"):
        attentive_conv2d(torch.zeros(2, 3, 4, 4), torch.zeros(2, 2, 3, 3))
    with pytest.raises(InputError, match="odd sides"):
        attentive_conv2d(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2))
    with pytest.raises(InputError, match="2 or more"):
        kernel_redundancy(torch.zeros(1, 1, 3, 3))
