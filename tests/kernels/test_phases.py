"""Phases of a doubled map's convolution: sixteen products, or nine."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashdip.kernels import fitwise
from flashdip.kernels.phases import phases, taps

FEW, MANY = 5, 64  # channels: sixteen products, nine
SHAPE = (31, 35)


def tensors(fits: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Map, weights and a gradient of the phases in float64."""
    generator = torch.Generator().manual_seed(1)
    height, width = SHAPE
    shapes = (
        (fits, channels, height, width),
        (fits, channels, channels, 3, 3),
        (fits, 4 * channels, height - 1, width - 1),
    )
    p, weight, dy = (torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes)
    return p, weight, dy


def computed(p: Tensor, weight: Tensor, dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Phases and both gradients, computed in a precision."""
    leaves = [t.to(dtype).requires_grad_() for t in (p, weight)]
    sums = fitwise.combine(leaves[1], taps(leaves[1], dtype).to(leaves[1].dtype))
    y = phases(leaves[0].contiguous(memory_format=torch.channels_last), sums)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]


def specified(p: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """The same by doubling pixels and convolving."""
    leaves = [t.clone().requires_grad_() for t in (p, weight)]
    doubled = leaves[0].repeat_interleave(2, 2).repeat_interleave(2, 3)
    whole = torch.cat([F.conv2d(doubled[f : f + 1], w) for f, w in enumerate(leaves[1])])
    parts = [whole[:, :, 1 - a :: 2, 1 - b :: 2] for a in range(2) for b in range(2)]
    y = torch.cat(parts, 1)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("fits", [1, 2])
@pytest.mark.parametrize("channels", [FEW, MANY])
def test_phases_are_the_convolution_of_doubled_pixels(fits: int, channels: int) -> None:
    """In float64, with all gradients."""
    arguments = tensors(fits, channels)
    for found, expected in zip(
        computed(*arguments, torch.float64), specified(*arguments), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_nine_products_are_as_exact_as_a_convolution() -> None:
    """Errors of float32, with all gradients, are at most twice those of torch's convolution."""
    arguments = tensors(1, MANY)
    exact = computed(*arguments, torch.float64)
    low = [t.float() for t in arguments]
    for found, plain, right in zip(
        computed(*arguments, torch.float32), specified(*low), exact, strict=True
    ):
        errors = [float((t.double() - right).square().mean().sqrt()) for t in (found, plain)]
        assert 0 < errors[0] <= 2 * errors[1]
