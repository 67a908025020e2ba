"""Convolutions of maps of few channels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashdip.kernels import thin

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


SIDES = [(21, 18), (68, 70)]  # a small map; one whose gradient is a product and a sum of shifts


def tensors(fits: int, size: int, sides: tuple[int, int] = SIDES[0]) -> list[Tensor]:
    """Map, weights and gradient of the result, in float64."""
    generator = torch.Generator().manual_seed(2)
    height, width = (side + 1 - size for side in sides)
    shapes = (fits, 3, *sides), (fits, 32, 3, size, size), (fits, 32, height, width)
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]


def differentiated(y: Tensor, leaves: list[Tensor], dy: Tensor) -> list[Tensor]:
    """A result and its gradients."""
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def plain(arguments: list[Tensor]) -> list[Tensor]:
    """Result and gradients of torch's convolution."""
    x, weight = leaves = [t.clone().requires_grad_() for t in arguments[:2]]
    y = torch.cat([F.conv2d(x[f : f + 1], w) for f, w in enumerate(weight)])
    return differentiated(y, leaves, arguments[2])


@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("fits", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_is_as_exact_as_torchs(
    dtype: torch.dtype, fits: int, size: int, sides: tuple[int, int]
) -> None:
    """Errors of result and gradients are at most twice those of torch's convolution."""
    arguments = tensors(fits, size, sides)
    low = [t.to(dtype) for t in arguments]
    exact = plain([t.double() for t in low])
    leaves = [t.clone().requires_grad_() for t in low[:2]]
    dy = low[2].contiguous(memory_format=torch.channels_last)
    found = differentiated(thin.conv(leaves[0], leaves[1]), leaves, dy)
    for ours, theirs, right in zip(found, plain(low), exact, strict=True):
        assert ours.dtype == dtype
        error, allowed = (
            float((t.double() - right).square().mean().sqrt()) for t in (ours, theirs)
        )
        assert error <= 2 * allowed + 1e-14 * float(right.abs().max())


def test_a_map_without_gradient() -> None:
    """The network's input needs none."""
    x, weight, dy = tensors(1, 3)
    weight.requires_grad_()
    thin.conv(x, weight).backward(dy)
    assert weight.grad is not None and x.grad is None
    torch.testing.assert_close(weight.grad, plain([x, weight.detach(), dy])[2])
