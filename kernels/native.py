"""The fast op set for CPUs and any torch device.

Activations are tensors [F, C, H, W] in channels-last memory, 16 bits wide where asked for; each fit
is computed by itself. Statistics, norms' parameters and gradients of parameters are float32.
Against `reference` two
savings of exact algebra are made: a bias that a norm follows is dropped, and a 3x3 convolution of
an enlarged map (nearest) is done on the small map.
"""

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
    if up == "nearest" and even and weight.shape[-1] == 3:
        # The statistics of an enlarged map are those of the small one, and a convolution over a
        # concatenation is the sum of two.
        shallow = weight.shape[2] - deep.shape[1]
        (gamma_s, gamma_d), (beta_s, beta_d) = (
            (t[:, :shallow], t[:, shallow:]) for t in (join_gamma, join_beta)
        )
        weight_s, weight_d = weight[:, :, :shallow], weight[:, :, shallow:]
        y = _enlarged_conv(_norm(deep, gamma_d, beta_d), weight_d, pad)
        if skip is not None:
            y = y + _conv(_norm(skip, gamma_s, beta_s), weight_s, 1, pad)
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


def _enlarged_conv(x: Tensor, weight: Tensor, pad: Pad) -> Tensor:
    """Return conv3x3(enlarge(x)), [F, O, 2H, 2W], where enlarge doubles each pixel.

    Each of the four phases of the result sees 2x2 pixels of x: 16 products instead of 36.
    Reflection of the enlarged map is replication of x.
    """
    x = F.pad(x, (1,) * 4, mode="replicate" if pad == "reflection" else "constant")
    rows = _PHASES.to(weight)
    folded = torch.einsum("aik,bjl,fockl->fabocij", rows, rows, weight)
    folded = folded.flatten(1, 3).to(x.dtype)  # [F, 4 O, I, 2, 2]
    if len(x) == 1:
        return _interleave(F.conv2d(x, folded.squeeze(0)))
    return _interleave(torch.cat([F.conv2d(x[f : f + 1], w) for f, w in enumerate(folded)]))


# Which of three taps fall on either of the two pixels that a phase sees: [phase, pixel, tap].
_PHASES = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]])


class _Interleave(torch.autograd.Function):
    """Put phases [F, 4 C, H + 1, W + 1] together as [F, C, 2H, 2W]; (a, b) starts at (a, b)."""

    @staticmethod
    def forward(ctx: Any, phases: Tensor) -> Tensor:
        fits, channels, height, width = phases.shape
        size = (fits, channels // 4, 2 * (height - 1), 2 * (width - 1))
        y = phases.new_empty(size).to(memory_format=torch.channels_last)
        for whole, phase in _phase_views(y, phases):
            whole.copy_(phase)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        fits, channels, height, width = dy.shape
        size = (fits, 4 * channels, height // 2 + 1, width // 2 + 1)
        phases = dy.new_zeros(size).to(memory_format=torch.channels_last)
        for whole, phase in _phase_views(dy, phases):
            phase.copy_(whole)
        return phases


def _interleave(phases: Tensor) -> Tensor:
    y: Tensor = _Interleave.apply(phases)  # type: ignore[no-untyped-call]
    return y


def _phase_views(y: Tensor, phases: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return for each phase its pixels in the whole map, and its own map."""
    height, width = y.shape[2] // 2, y.shape[3] // 2
    parts = phases.chunk(4, dim=1)
    return [
        (y[:, :, a::2, b::2], parts[2 * a + b][:, :, a : a + height, b : b + width])
        for a in (0, 1)
        for b in (0, 1)
    ]


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
