"""The gradient of a convolution's weights as matrix products, one for each tap.

A tap's gradient is the product of the result's gradient with the map, shifted by the tap. With the
rows of the former drawn out to the map's own length, zeros at their ends, a shift is an offset in
memory, and nothing is unfolded (the idea of kn2row: Anderson, Vasudevan, Keane and Gregg,
"Low-memory GEMM-based convolution algorithms for deep neural networks", 2017). At a stride the map
is first taken apart into the pixels that the same taps see.

Without AVX-512 oneDNN computes this gradient of channels-last maps at a third of the speed: 115 ms
against 43 at 128 channels and 128x128 pixels, on two Zen 3 cores (measured).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_MUCH = 1 << 24  # input channels times output channels times pixels, from where on it is faster


def pays(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Return whether `conv` is faster than torch's own for x [F, I, H, W] on this processor."""
    *channels, height, width = weight.shape[-4:]
    pixels = x.shape[2] * x.shape[3] // stride**2
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and max(height, width) > 1
        and math.prod(channels) * pixels >= _MUCH
        and torch.backends.cpu.get_cpu_capability() == "AVX2"
    )


def conv(x: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """Convolve a map with weights, without a margin.

    Args:
        x: [1, I, H, W]; nothing is laid out anew if it is in channels-last memory.
        weight: [O, I, k, l], in the map's dtype.
        stride: Along both axes.

    Returns:
        [1, O, (H - k) // stride + 1, (W - l) // stride + 1].
    """
    y: Tensor = _Conv.apply(x, weight, stride)  # type: ignore[no-untyped-call]
    return y


class _Conv(torch.autograd.Function):
    """See `conv`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        ctx.stride = stride
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, None, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None]:
        x, weight = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            strides, wanted = (ctx.stride,) * 2, (True, False, False)
            dx = torch.ops.aten.convolution_backward(
                dy, x, weight, None, strides, (0, 0), (1, 1), False, (0, 0), 1, wanted
            )[0]
        return dx, _weight_gradient(dy, x, weight.shape[2:], ctx.stride), None


def _weight_gradient(dy: Tensor, x: Tensor, taps: torch.Size, stride: int) -> Tensor:
    """Return the gradient of weights [O, I, k, l] from that of the result, dy [1, O, H', W']."""
    outputs, height, width = dy.shape[1:]
    inputs = x.shape[1]
    gradient = dy.new_empty(*taps, outputs, inputs)
    for left in range(min(stride, taps[1])):
        pitch = len(range(left, x.shape[3], stride))
        length = (height - 1) * pitch + width
        rows = _drawn_out(dy, pitch)[:length]
        for top in range(min(stride, taps[0])):
            pixels = x[0, :, top::stride, left::stride].permute(1, 2, 0).reshape(-1, inputs)
            for row in range(top, taps[0], stride):
                for column in range(left, taps[1], stride):
                    start = row // stride * pitch + column // stride
                    shifted = pixels[start : start + length]
                    torch.mm(rows.T, shifted, out=gradient[row, column])
    return gradient.permute(2, 3, 0, 1)


def _drawn_out(dy: Tensor, pitch: int) -> Tensor:
    """Return the pixels of dy [1, O, H', W'] with zeros after each row, [H' pitch, O]."""
    outputs, height, width = dy.shape[1:]
    rows = dy.new_empty(height, pitch, outputs)
    rows[:, :width].copy_(dy[0].permute(1, 2, 0))
    rows[:, width:].zero_()
    return rows.view(-1, outputs)
