"""The fast op set for CPUs and any torch device.

Activations are tensors [F, C, H, W] in channels-last memory, 16 bits wide where asked for; each fit
is computed by itself. Statistics, norms' parameters and gradients of parameters are float32.
Against `reference` exact algebra saves work: a bias that a norm follows is dropped, and a 3x3
convolution of an enlarged map is done on the small map.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam as adam_step

from flashdip.kernels import activated, enlarged, fitwise, recall, reference, thin
from flashdip.kernels.opset import SLOPE, Activation, Down, Pad, Up

_THIN = 16  # a map of fewer channels lies in planes: norms pass over a few long rows faster


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
    return _norm_act(y, gamma, beta, act)


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
        parts = weight.shape[2] - deep.shape[1], deep.shape[1]
        gammas, betas = join_gamma.split(parts, 1), join_beta.split(parts, 1)
        weights = weight.split(parts, 2)
        y = enlarged.conv(enlarged.norm(deep, gammas[1], betas[1], smooth), weights[1], pad, smooth)
        if skip is not None:
            y += _conv(fitwise.norm(skip, gammas[0], betas[0]), weights[0], 1, pad)
        return _norm_act(y, gamma, beta, act)
    joined = F.interpolate(deep, scale_factor=2, mode=up)
    if skip is not None:
        joined = reference.concatenate(skip, joined)
    joined = fitwise.norm(joined, join_gamma, join_beta)
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
    if not parameters.is_cpu:
        own = parameters, gradients, moment1, moment2
        adam_in_passes(*own, step=step, rate=rate, betas=betas, eps=eps)
        return
    adam_step(
        [parameters],
        [gradients],
        [moment1],
        [moment2],
        [],
        [torch.tensor(float(step - 1))],  # elsewhere it would have to be copied to the device
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=rate,
        weight_decay=0.0,
        eps=eps,
        maximize=False,
    )


def adam_in_passes(
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
    """Do what `adam` does, in seven passes instead of one, without a tensor for the step."""
    moment1.lerp_(gradients, 1 - betas[0])
    moment2.mul_(betas[1]).addcmul_(gradients, gradients, value=1 - betas[1])
    root = torch.sqrt(moment2).mul_((1 - betas[1] ** step) ** -0.5).add_(eps)
    parameters.addcdiv_(moment1, root, value=-rate / (1 - betas[0] ** step))


def _conv(x: Tensor, weight: Tensor, stride: int, pad: Pad) -> Tensor:
    weight = weight.to(x.dtype)
    margin = (weight.shape[-1] - 1) // 2
    if margin == 0 and stride == 1:
        return _pointwise(x, weight)
    if x.shape[1] < _THIN and stride == 1:
        x = F.pad(x, (margin,) * 4, mode="reflect" if pad == "reflection" else "constant")
        return thin.conv(x, weight)
    if pad == "reflection":
        reflect = functools.partial(F.pad, pad=(margin,) * 4, mode="reflect")
        x, margin = recall.made(reflect(x), reflect, x), 0
    return fitwise.conv(x, weight, stride, margin)


def _pointwise(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve 1x1: a matrix product, in whose passes nothing is laid out anew."""
    # A product with few channels on either side is bound by memory, and BLAS does as well.
    narrow = min(weight.shape[1:3]) < _THIN
    blas = narrow or x.dtype != torch.float32 or not x.is_cpu
    y = fitwise.product(x, weight.flatten(2), blas)
    return y.contiguous() if y.shape[1] < _THIN else y


def _norm_act(y: Tensor, gamma: Tensor, beta: Tensor, act: Activation) -> Tensor:
    leaky = act == "LeakyReLU"
    if leaky and recall.active() and y.is_contiguous(memory_format=torch.channels_last):
        return activated.norm_act(y, gamma, beta)
    z = fitwise.norm(y, gamma, beta)
    return F.leaky_relu_(z, SLOPE) if leaky else reference.activate(z, act)
