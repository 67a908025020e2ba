"""Convolutions of enlarged maps, computed on the small ones, against enlarging and convolving."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashdip.kernels import enlarged, fitwise, reflected
from tests.numerics import assert_as_exact, differentiated


def tensors(fits: int, channels: int, height: int, width: int) -> list[Tensor]:
    """Map, weights and a gradient of the result in float64."""
    generator = torch.Generator().manual_seed(5)
    shapes = (
        (fits, channels, height, width),
        (fits, channels, channels, 3, 3),
        (fits, channels, 2 * height, 2 * width),
    )
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def specified(x: Tensor, weight: Tensor, smooth: bool) -> Tensor:
    """Enlarge, reflect, convolve; each is stored in the map's type."""
    whole = F.interpolate(x, scale_factor=2, mode="bilinear" if smooth else "nearest")
    parts = zip(F.pad(whole, (1,) * 4, mode="reflect").split(1), weight.to(x.dtype), strict=True)
    return torch.cat([F.conv2d(*part) for part in parts])


def computed(x: Tensor, weight: Tensor, smooth: bool) -> Tensor:
    """The same on the small map."""
    x = x.contiguous(memory_format=torch.channels_last)
    return enlarged.conv(x, weight, "reflection", smooth)


def with_gradients(
    conv: Callable[[Tensor, Tensor, bool], Tensor],
    arguments: list[Tensor],
    dtype: torch.dtype,
    smooth: bool,
) -> list[Tensor]:
    """Result and gradients, of maps in a type and weights in float32 at least."""
    x, weight, dy = arguments
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(dtype).requires_grad_(), weight.to(wide).requires_grad_()]
    return differentiated(conv(leaves[0], leaves[1], smooth), leaves, dy.to(dtype))


@pytest.mark.parametrize("smooth", [False, True], ids=["nearest", "bilinear"])
@pytest.mark.parametrize(
    ("fits", "channels", "height", "width"),
    [(1, 5, 2, 2), (2, 3, 2, 7), (1, 4, 11, 3), (2, 64, 5, 6), (1, 8, 23, 31)],
)
def test_it_is_enlarging_and_convolving(
    fits: int, channels: int, height: int, width: int, smooth: bool
) -> None:
    """In float64, with all gradients; maps as small as can be, longer and wider ones."""
    arguments = tensors(fits, channels, height, width)
    for found, expected in zip(
        *(with_gradients(c, arguments, torch.float64, smooth) for c in (computed, specified)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11 * channels)


@pytest.mark.parametrize("smooth", [False, True], ids=["nearest", "bilinear"])
@pytest.mark.parametrize("channels", [5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_is_as_exact(dtype: torch.dtype, channels: int, smooth: bool) -> None:
    """Errors, with all gradients, are at most twice those of storing the enlarged map."""
    arguments = [t.to(dtype).double() for t in tensors(1, channels, 9, 14)]
    exact = with_gradients(specified, arguments, torch.float64, smooth)
    ours, theirs = (with_gradients(c, arguments, dtype, smooth) for c in (computed, specified))
    assert_as_exact(ours, theirs, exact)


@pytest.mark.parametrize(("height", "width"), [(2, 2), (3, 8), (9, 4)])
def test_lines_are_what_reflection_adds(height: int, width: int) -> None:
    """To the convolution of the replicated map: within the outermost lines, and nowhere else."""
    x, weight, _ = tensors(1, 3, height, width)
    padded, lines = reflected.frame(x, fitwise.combine(weight, reflected.TAPS.double()))
    doubled, replicated = (t.repeat_interleave(2, 2).repeat_interleave(2, 3) for t in (x, padded))
    reflecting = F.pad(doubled, (2,) * 4, mode="reflect")
    added = F.conv2d(reflecting, weight[0]) - F.conv2d(replicated, weight[0])
    sides = added[:, :, 0], added[:, :, -1], added[..., 0], added[..., -1]
    torch.testing.assert_close(added[:, :, 1:-1, 1:-1], torch.zeros_like(doubled))
    for line, side in zip(lines[0], sides, strict=True):
        torch.testing.assert_close(line[1 : side.shape[2] - 1], side[0, :, 1:-1].mT)
    for row, y in ((0, 0), (1, -1)):
        for column, end, at in ((2, 0, 0), (3, 2 * width + 1, -1)):
            corner = lines[0, row, end] + lines[0, column, 0 if y == 0 else 2 * height + 1]
            torch.testing.assert_close(corner, added[0, :, y, at])
