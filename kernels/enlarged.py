"""A 3x3 convolution of a map that is enlarged twofold, computed on the small map.

Doubling pixels (nearest): each of the four phases of the result sees 2x2 pixels of the small map
(`flashdip.kernels.phases`), and reflection of the enlarged map is replication of the small one.

Bilinear enlargement is doubling pixels followed by the filter [1, 2, 1] / 4 along each axis, which
changes places with the convolution. The map is then needed one pixel beyond its border, where the
doubled one has to be reflected about its outermost pixel (`flashdip.kernels.reflected`).

Maps are [F, C, H, W] in channels-last memory. Backward passes are written out where autograd would
pass over the maps more often than has to be.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashdip.kernels import fitwise, recall, reflected
from flashdip.kernels.opset import EPS, Pad
from flashdip.kernels.phases import constant, phases, taps


def conv(x: Tensor, weight: Tensor, pad: Pad, smooth: bool) -> Tensor:
    """Return conv3x3(enlarge(x)), [F, O, 2H, 2W].

    Args:
        x: The small map; H and W at least 2 if `smooth`.
        weight: [F, O, C, 3, 3], in float32 at least.
        pad: Of the enlarged map; reflection if `smooth`.
        smooth: Whether enlargement is bilinear; else pixels are doubled.
    """
    rows = taps(weight, x.dtype)
    if smooth:  # of all taps in one go: the weights are taken apart and put together once
        sums = fitwise.combine(weight, _with_border(rows, weight.device, weight.dtype))
        inner, border = sums.split((len(rows), len(reflected.TAPS)), 1)
        padded, lines = reflected.frame(x, border)
        return _blur(_interleave(phases(padded, inner), lines))
    padded = F.pad(x, (1,) * 4, mode="replicate" if pad == "reflection" else "constant")
    sums = fitwise.combine(weight, constant(rows, weight.device, weight.dtype))
    return _interleave(phases(padded, sums))


@functools.cache
def _with_border(rows: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.cat([rows, reflected.TAPS]).to(device, dtype)


class _Interleave(torch.autograd.Function):
    """Put four phases [F, 4 C, H + 1, W + 1] together as one map.

    With what is to be added to its outermost lines, as `reflected.frame` returns it, that is
    [F, C, 2H + 2, 2W + 2]; without, the outermost lines are left out.
    """

    @staticmethod
    def forward(ctx: Any, phases: Tensor, *lines: Tensor) -> Tensor:
        fits, channels, height, width = phases.shape
        ring = ctx.ring = len(lines) > 0
        less = 0 if ring else 2
        y = _empty(phases, fits, channels // 4, 2 * height - less, 2 * width - less)
        for whole, phase in _phase_views(y, phases, ring):
            whole.copy_(phase)
        for added in lines:
            for side, edge in enumerate(_outer(y)):
                edge += added[:, side, : edge.shape[2]].mT
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        fits, channels, height, width = dy.shape
        more = 0 if ctx.ring else 2
        phases = _empty(dy, fits, 4 * channels, (height + more) // 2, (width + more) // 2)
        if not ctx.ring:  # lines that no pixel of the result came from
            for edge in _outer(phases):
                edge.zero_()
        for whole, phase in _phase_views(dy, phases, ctx.ring):
            phase.copy_(whole)
        if not ctx.ring:
            return (phases,)
        lines = dy.new_zeros(fits, 4, max(height, width), channels)
        for side, edge in enumerate(_outer(dy)):
            lines[:, side, : edge.shape[2]] = edge.mT
        return phases, lines


def _interleave(phases: Tensor, *lines: Tensor) -> Tensor:
    y: Tensor = _Interleave.apply(phases, *lines)  # type: ignore[no-untyped-call]
    return y


def _phase_views(y: Tensor, phases: Tensor, ring: bool) -> list[tuple[Tensor, Tensor]]:
    """Return for each phase its pixels in the whole map, and the same pixels in its own map."""
    height, width = phases.shape[2] - 1, phases.shape[3] - 1
    views = []
    for index, part in enumerate(phases.chunk(4, dim=1)):
        a, b = divmod(index, 2)
        if ring:
            views.append((y[:, :, 1 - a :: 2, 1 - b :: 2], part))
        else:
            views.append((y[:, :, a::2, b::2], part[:, :, a : a + height, b : b + width]))
    return views


def _outer(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """View the lines above, below, left and right, each [F, C, pixels]."""
    return y[:, :, 0], y[:, :, -1], y[..., 0], y[..., -1]


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


class _Blur(torch.autograd.Function):
    """Filter with [1, 2, 1] / 4 along both axes, [F, C, H + 2, W + 2] to [F, C, H, W].

    The filter is its own mirror image: the backward pass is the same convolution, which torch does
    three times as fast as the one that it would choose.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _depthwise(x, _BLUR)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return _depthwise(dy, _BLUR, margin=2)


_BLUR = torch.outer(*[torch.tensor([0.25, 0.5, 0.25])] * 2)


def _blur(x: Tensor) -> Tensor:
    y: Tensor = _Blur.apply(x)  # type: ignore[no-untyped-call]
    return y


class _NormSmoothed(torch.autograd.Function):
    """Normalise x [F, C, H, W] by the statistics of its bilinear enlargement.

    The mean is the same. The mean square of the enlargement A x is that of x with a neighbour's
    share: K = A'A / 4 is the filter [3, 10, 3] / 16 with replicated borders along each axis, which
    is symmetric and leaves constants alone. So with c = x - mean, variance = mean(c K c), and

        dx = scale (dy - mean(dy)) - scale mean(dy c) / (variance + eps) K c
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        near = recall.made(_near(x), _near, x)
        pixels = x.shape[2] * x.shape[3]
        total, product = fitwise.sums(near, x, torch.zeros_like(gamma))
        mean = total / pixels  # of `near` as of x
        variance = product / pixels - mean.square()
        root = torch.rsqrt(variance.clamp_(min=0) + EPS)
        scale = gamma * root
        ctx.save_for_backward(x, near, mean, root, scale)
        shift = beta - mean * scale
        return recall.made(fitwise.affine(x, scale, shift), fitwise.affine, x, scale, shift)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, near, mean, root, scale = ctx.saved_tensors
        pixels = x.shape[2] * x.shape[3]
        beta, product = fitwise.sums(dy, x, mean)
        share = scale * root.square() * product / pixels
        dx = fitwise.affine(dy, scale, share * mean - scale * beta / pixels)
        dx -= fitwise.affine(near, share, torch.zeros_like(share))
        return dx, product * root, beta


# A'A over the enlarged map's twice as many pixels, along both axes.
_SHARE = torch.outer(*[torch.tensor([3.0, 10.0, 3.0]) / 16] * 2)


def _near(x: Tensor) -> Tensor:
    return _depthwise(reflected.replicated(x), _SHARE)


def norm(x: Tensor, gamma: Tensor, beta: Tensor, smooth: bool) -> Tensor:
    """Normalise x [F, C, H, W] by the statistics of its enlargement; see `conv`."""
    if not smooth:
        return fitwise.norm(x, gamma, beta)
    y: Tensor = _NormSmoothed.apply(x, gamma, beta)  # type: ignore[no-untyped-call]
    return y


def _depthwise(x: Tensor, kernel: Tensor, margin: int = 0) -> Tensor:
    """Filter each channel of x with one 3x3 kernel."""
    channels = x.shape[1]
    weight = constant(kernel, x.device, x.dtype).expand(channels, 1, 3, 3)
    return F.conv2d(x, weight, padding=margin, groups=channels)
