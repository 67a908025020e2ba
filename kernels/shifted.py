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
from collections.abc import Sequence

import torch
from torch import Tensor

_MUCH = 1 << 22  # input channels times output channels times pixels, from where on it is faster


def pays(x: Tensor, weight: Tensor, stride: int) -> bool:
    """Return whether that is faster than torch's own for x [F, I, H, W] on this processor."""
    *channels, height, width = weight.shape[-4:]
    pixels = x.shape[2] * x.shape[3] // stride**2
    return (
        x.is_cpu
        and x.dtype == torch.float32
        and max(height, width) > 1
        and math.prod(channels) * pixels >= _MUCH
        and avx2_at_best()
    )


def avx2_at_best() -> bool:
    """Return whether this is a CPU whose vectors are 256 bits wide."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def weight_gradient(dy: Tensor, x: Tensor, taps: Sequence[int], stride: int) -> Tensor:
    """Return the gradient of a convolution's weights, [O, I, k, l].

    Args:
        dy: Of the result, [1, O, H', W'].
        x: The map, [1, I, H, W], without a margin; in channels-last memory it is not laid out anew.
        taps: k and l.
        stride: Along both axes.
    """
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
