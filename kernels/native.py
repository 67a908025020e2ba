"""The fast op set for CPUs and any torch device.

Activations are tensors [F, C, H, W] in channels-last memory, 16 bits wide where asked for; each fit
is computed by itself. Statistics, norms' parameters and gradients of parameters are float32.
Against `reference` exact algebra saves work: a bias that a norm follows is dropped, and a 3x3
convolution of an enlarged map is done on the small map.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashdip.kernels import reference
from flashdip.kernels.opset import EPS, SLOPE, Activation, Down, Pad, Up


def perturb(
    z: Tensor, table: Tensor, offsets: Sequence[int], std: float, dtype: torch.dtype
) -> Tensor:
    """Add the step's noise to the network's input; see `OpSet.perturb`."""
    z = z.contiguous(memory_format=torch.channels_last)
    if std == 0:
        return z.to(dtype)
    noisy = torch.empty_like(z)
    for fit, start in enumerate(offsets):
        source, target = (t[fit].permute(1, 2, 0).view(-1) for t in (z, noisy))
        done = 0
        while done < target.numel():  # the table is read in order, from `start`, and wraps
            count = min(len(table) - start, target.numel() - done)
            part = slice(done, done + count)
            torch.add(source[part], table[start : start + count], alpha=std, out=target[part])
            done, start = done + count, 0
    return noisy.to(dtype)


def conv_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    *,
    stride: int = 1,
    down: Down = "stride",
    pad: Pad = "reflection",
    act: Activation = "LeakyReLU",
) -> Tensor:
    """Convolve, normalise each channel over (H, W), activate; see `OpSet.conv_norm_act`."""
    if stride == 1 or down == "stride":
        y = _conv(x, weight, stride, pad)
    else:
        y = reference.pool(_conv(x, weight, 1, pad), stride, down)
    return _activate(_norm(y, gamma, beta), act)


def join_conv(
    skip: Tensor | None,
    deep: Tensor,
    join_gamma: Tensor,
    join_beta: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    *,
    up: Up = "bilinear",
    pad: Pad = "reflection",
    act: Activation = "LeakyReLU",
) -> Tensor:
    """Upsample, concatenate, normalise, convolve, normalise, activate; see `OpSet.join_conv`."""
    even = skip is None or skip.shape[2:] == tuple(2 * side for side in deep.shape[2:])
    smooth = up == "bilinear"
    if (
        even
        and weight.shape[-1] == 3
        and not (smooth and (pad == "zero" or min(deep.shape[2:]) < 2))
    ):
        # A convolution over a concatenation is the sum of two.
        shallow = weight.shape[2] - deep.shape[1]
        deep = (_norm_smoothed if smooth else _norm)(
            deep, join_gamma[:, shallow:], join_beta[:, shallow:]
        )
        y = _enlarged_conv(deep, weight[:, :, shallow:], pad, smooth)
        if skip is not None:
            skip = _norm(skip, join_gamma[:, :shallow], join_beta[:, :shallow])
            y = y + _conv(skip, weight[:, :, :shallow], 1, pad)
        return _activate(_norm(y, gamma, beta), act)
    joined = F.interpolate(deep, scale_factor=2, mode=up)
    if skip is not None:
        joined = reference.concatenate(skip, joined)
    joined = _norm(joined, join_gamma, join_beta)
    return conv_norm_act(joined, weight, None, gamma, beta, pad=pad, act=act)


def head(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, pad: Pad = "reflection", sigmoid: bool = True
) -> Tensor:
    """Convolve to the image's channels; see `OpSet.head`."""
    y = _conv(x, weight, 1, pad)
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    if bias is not None:
        y = y + bias[:, :, None, None]
    return torch.sigmoid(y) if sigmoid else y


def adam(
    parameters: Tensor,
    gradients: Tensor,
    moment1: Tensor,
    moment2: Tensor,
    *,
    step: int,
    rate: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Update parameters and moments in place; see `OpSet.adam`."""
    moment1.lerp_(gradients, 1 - betas[0])
    moment2.mul_(betas[1]).addcmul_(gradients, gradients, value=1 - betas[1])
    root = torch.sqrt(moment2).mul_((1 - betas[1] ** step) ** -0.5).add_(eps)
    parameters.addcdiv_(moment1, root, value=-rate / (1 - betas[0] ** step))


def _conv(x: Tensor, weight: Tensor, stride: int, pad: Pad) -> Tensor:
    weight = weight.to(x.dtype)
    margin = (weight.shape[-1] - 1) // 2
    if margin == 0 and stride == 1:
        return _pointwise(x, weight)
    if pad == "reflection":
        x, margin = F.pad(x, (margin,) * 4, mode="reflect"), 0
    return _per_fit(x, weight, stride, margin)


def _per_fit(x: Tensor, weight: Tensor, stride: int = 1, margin: int = 0) -> Tensor:
    """Convolve each fit of x [F, I, H, W] with its own weights [F, O, I, k, l]."""
    if len(x) == 1:  # cutting out the only fit would cost a copy in the backward pass
        return F.conv2d(x, weight.squeeze(0), None, stride, margin)
    return torch.cat(
        [F.conv2d(x[f : f + 1], w, None, stride, margin) for f, w in enumerate(weight)]
    )


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve 1x1: a matrix product, in whose passes nothing is laid out anew."""
    rows = x.permute(0, 2, 3, 1)  # [F, H, W, I], contiguous
    if len(x) == 1:
        y = F.linear(rows, weight.reshape(weight.shape[1:3]))
    else:
        y = torch.einsum("fhwi,foi->fhwo", rows, weight.flatten(2))
    return y.permute(0, 3, 1, 2)


def _enlarged_conv(x: Tensor, weight: Tensor, pad: Pad, smooth: bool) -> Tensor:
    """Return conv3x3(enlarge(x)), [F, O, 2H, 2W], computed on the small grid.

    Doubling pixels (nearest): each of the four phases of the result sees 2x2 pixels of x, 16
    products instead of 36, and reflection of the enlarged map is replication of x.

    Bilinear enlargement is doubling pixels followed by the filter [1, 2, 1] / 4 along each axis,
    which changes places with the convolution. The map is then needed one pixel beyond its border,
    where the doubled one has to be reflected about its outermost pixel: `_corrections`.
    """
    small = F.pad(x, (1,) * 4, mode="replicate" if pad == "reflection" else "constant")
    rows = _constant(_PHASES, weight.device, weight.dtype)
    folded = torch.einsum("aik,bjl,fockl->fabocij", rows, rows, weight)
    phases = _per_fit(small, folded.flatten(1, 3).to(x.dtype))  # [F, 4 O, H + 1, W + 1]
    if not smooth:
        return _interleave(phases)
    y = _interleave(phases, *_corrections(x, weight.to(x.dtype)))
    channels = y.shape[1]
    kernel = _constant(_BLUR, y.device, y.dtype).expand(channels, 1, 3, 3)
    return F.conv2d(y, kernel, groups=channels)


# Which of three taps fall on either of the two pixels that a phase sees: [phase, pixel, tap].
_PHASES = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])
_BLUR = torch.outer(*[torch.tensor([0.25, 0.5, 0.25])] * 2)


def _corrections(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what reflecting the doubled x adds to the outer rows and columns of its convolution.

    Replication of x leaves x[0] where the reflected map has x[1]: outermost tap, outermost pixel.
    """
    above, below = x[:, :, 1:2] - x[:, :, :1], x[:, :, -2:-1] - x[:, :, -1:]
    left, right = x[..., 1:2] - x[..., :1], x[..., -2:-1] - x[..., -1:]
    lying = (F.pad(t.repeat_interleave(2, 3), (2, 2, 0, 0), mode="reflect") for t in (above, below))
    upright = (
        F.pad(t.repeat_interleave(2, 2), (0, 0, 2, 2), mode="replicate") for t in (left, right)
    )
    (above, below), (left, right) = lying, upright
    return (
        _per_fit(above, weight[..., :1, :]),
        _per_fit(below, weight[..., 2:, :]),
        _per_fit(left, weight[..., :1]),
        _per_fit(right, weight[..., 2:]),
    )


class _Interleave(torch.autograd.Function):
    """Put four phases [F, 4 C, H + 1, W + 1] together as one map.

    With corrections of its outermost rows and columns it is [F, C, 2H + 2, 2W + 2]; without, the
    outermost ones are left out.
    """

    @staticmethod
    def forward(ctx: Any, phases: Tensor, *corrections: Tensor) -> Tensor:
        fits, channels, height, width = phases.shape
        ring = ctx.ring = len(corrections) > 0
        less = 0 if ring else 2
        size = (fits, channels // 4, 2 * height - less, 2 * width - less)
        y = phases.new_empty(size).to(memory_format=torch.channels_last)
        for whole, phase in _phase_views(y, phases, ring):
            whole.copy_(phase)
        for edge, correction in zip(_edges(y), corrections, strict=False):
            edge.add_(correction)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        fits, channels, height, width = dy.shape
        more = 0 if ctx.ring else 2
        size = (fits, 4 * channels, (height + more) // 2, (width + more) // 2)
        new = dy.new_empty if ctx.ring else dy.new_zeros
        phases = new(size).to(memory_format=torch.channels_last)
        for whole, phase in _phase_views(dy, phases, ctx.ring):
            phase.copy_(whole)
        return phases, *(_edges(dy) if ctx.ring else ())


def _interleave(phases: Tensor, *corrections: Tensor) -> Tensor:
    y: Tensor = _Interleave.apply(phases, *corrections)  # type: ignore[no-untyped-call]
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


def _edges(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return y[:, :, :1], y[:, :, -1:], y[..., :1], y[..., -1:]


def _norm_smoothed(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Normalise x [F, C, H, W] by the statistics of its bilinear enlargement.

    The mean is the same. The sum of squares is that of x with a neighbour's share: A'A of the
    enlargement A is the filter [3, 10, 3] / 8 with replicated borders, along each axis.
    """
    centred = x.to(gamma.dtype)
    centred = centred - centred.mean((2, 3), keepdim=True)
    channels = x.shape[1]
    kernel = _constant(_SHARE, centred.device, centred.dtype).expand(channels, 1, 3, 3)
    near = F.conv2d(F.pad(centred, (1,) * 4, mode="replicate"), kernel, groups=channels)
    variance = (centred * near).mean((2, 3))
    scale = gamma * torch.rsqrt(variance + EPS)
    return (centred * scale[:, :, None, None] + beta[:, :, None, None]).to(x.dtype)


# A'A over the enlarged map's twice as many pixels, along both axes.
_SHARE = torch.outer(*[torch.tensor([3.0, 10.0, 3.0]) / 16] * 2)


@functools.cache
def _constant(values: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return constants where they are needed, copied there once."""
    return values.to(device, dtype)


def _norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    if len(x) == 1:
        return F.batch_norm(x, None, None, gamma.squeeze(0), beta.squeeze(0), True, eps=EPS)
    return torch.cat(
        [
            F.batch_norm(x[f : f + 1], None, None, gamma[f], beta[f], True, eps=EPS)
            for f in range(len(x))
        ]
    )


def _activate(x: Tensor, act: Activation) -> Tensor:
    if act == "LeakyReLU":
        return F.leaky_relu_(x, SLOPE)
    return reference.activate(x, act)
