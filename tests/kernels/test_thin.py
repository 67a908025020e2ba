"""Convolutions of maps of few channels."""

import pytest
import torch
from torch import Tensor

from flashdip.kernels import thin
from tests.numerics import assert_as_exact, convolved, differentiated

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


SIDES = [(21, 18), (68, 70)]  # a small map, and a larger one, whose gradient is in float32
OUTPUTS = [16, 32]  # a convolution, or a product and a sum of shifts


def tensors(
    fits: int, size: int, sides: tuple[int, int] = SIDES[0], outputs: int = OUTPUTS[1]
) -> list[Tensor]:
    """Map, weights and gradient of the result, in float64."""
    generator = torch.Generator().manual_seed(2)
    height, width = (side + 1 - size for side in sides)
    shapes = (fits, 3, *sides), (fits, outputs, 3, size, size), (fits, outputs, height, width)
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("sides", SIDES, ids=str)
@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("fits", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conv_is_as_exact_as_torchs(
    dtype: torch.dtype, fits: int, size: int, sides: tuple[int, int], outputs: int
) -> None:
    """Errors of result and gradients are at most twice those of torch's convolution."""
    arguments = tensors(fits, size, sides, outputs)
    low = [t.to(dtype) for t in arguments]
    exact = convolved([t.double() for t in low])
    leaves = [t.clone().requires_grad_() for t in low[:2]]
    dy = low[2].contiguous(memory_format=torch.channels_last)
    found = differentiated(thin.conv(leaves[0], leaves[1]), leaves, dy)
    assert {t.dtype for t in found} == {dtype}
    assert_as_exact(found, convolved(low), exact)


def test_a_map_without_gradient() -> None:
    """The network's input needs none."""
    x, weight, dy = tensors(1, 3)
    weight.requires_grad_()
    thin.conv(x, weight).backward(dy)
    assert weight.grad is not None and x.grad is None
    torch.testing.assert_close(weight.grad, convolved([x, weight, dy])[2])
