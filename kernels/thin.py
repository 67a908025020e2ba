"""A convolution of a map of few channels, whose gradient is a matrix product and a sum of shifts.

oneDNN computes that gradient in blocks of 16 channels at least. That pays for small maps; and, as a
forward convolution in float32, where the result has not many more channels than the map.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashdip.kernels import fitwise

_SMALL = 4096  # pixels, below which one call is faster than many
_LIKE = 8  # times the map's channels that the result may have for a convolution to be the faster


def conv(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each fit of x [F, I, H, W] with its own weights [F, O, I, k, l].

    Args:
        x: In any layout.
        weight: In the map's dtype.

    Returns:
        [F, O, H - k + 1, W - l + 1] in channels-last memory.
    """
    y: Tensor = _Conv.apply(x, weight)  # type: ignore[no-untyped-call]
    return y


class _Conv(torch.autograd.Function):
    """See `conv`. The map's gradient is laid out in planes, where each shift adds long lines."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        return fitwise.conv(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        wanted, small = ctx.needs_input_grad[0], dy.shape[2] * dy.shape[3] < _SMALL
        dx, d_weight = fitwise.conv_gradients(dy, x, weight, wanted and small)
        return _spread(dy, weight, x) if wanted and not small else dx, d_weight


def _spread(dy: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of x: what each pixel of dy gives to those that it was made from."""
    narrow, outputs, inputs = dy.dtype.itemsize < 4, *weight.shape[1:3]
    if not narrow and outputs <= _LIKE * inputs:
        mirrored = weight.flip(3, 4).transpose(1, 2)
        return fitwise.conv(dy, mirrored, 1, weight.shape[3] - 1).contiguous()
    taps = weight.flatten(2).mT  # [F, I k l, O]
    if narrow:
        given = torch.stack([t @ of.flatten(1) for t, of in zip(taps, dy, strict=True)])
        given = given.view(len(dy), *weight.shape[2:], *dy.shape[2:])
    else:
        given = fitwise.multiply(dy, taps).unflatten(1, weight.shape[2:])
    wide = torch.promote_types(dy.dtype, torch.float32)
    layout = torch.contiguous_format if narrow else torch.channels_last
    dx = torch.zeros_like(x, dtype=wide, memory_format=layout)
    height, width = dy.shape[2:]
    for row in range(weight.shape[3]):
        for column in range(weight.shape[4]):
            part = dx[:, :, row : row + height, column : column + width]
            part += given[:, :, row, column]
    return dx.to(x.dtype, memory_format=torch.contiguous_format)
