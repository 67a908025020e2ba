"""The specification: every operation of `flashdip.kernels.opset`, in naive PyTorch.

Activations are plain tensors [F, C, H, W] in the dtype of the network's input. Nothing here is
tuned, and no algebra is used to save work; every other op set is tested against this one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdip.kernels.opset import EPS, SLOPE, Activation, Down, Pad, Up
from flashdip.kernels.resample import downsample


def perturb(
    z: Tensor, table: Tensor, offsets: Sequence[int], std: float, dtype: torch.dtype
) -> Tensor:
    """Add the step's noise to the network's input; see `OpSet.perturb`."""
    if std == 0:
        return z.to(dtype)
    fits, channels, height, width = z.shape
    position = torch.arange(height * width * channels, device=z.device)
    position = position.view(height, width, channels).permute(2, 0, 1)  # [C, H, W]
    noise = torch.stack([table[(position + start) % len(table)] for start in offsets[:fits]])
    return (z + std * noise.to(z)).to(dtype)


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
        y = _conv(x, weight, bias, stride, pad)
    else:
        y = pool(_conv(x, weight, bias, 1, pad), stride, down)
    return activate(_norm(y, gamma, beta), act)


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
    joined = F.interpolate(deep, scale_factor=2, mode=up)
    if skip is not None:
        joined = concatenate(skip, joined)
    joined = _norm(joined, join_gamma, join_beta)
    return conv_norm_act(joined, weight, bias, gamma, beta, pad=pad, act=act)


def head(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, pad: Pad = "reflection", sigmoid: bool = True
) -> Tensor:
    """Convolve to the image's channels; see `OpSet.head`."""
    y = _conv(x, weight, bias, 1, pad)
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
    moment1.copy_(betas[0] * moment1 + (1 - betas[0]) * gradients)
    moment2.copy_(betas[1] * moment2 + (1 - betas[1]) * gradients**2)
    mean = moment1 / (1 - betas[0] ** step)
    spread = torch.sqrt(moment2 / (1 - betas[1] ** step))
    parameters -= rate * mean / (spread + eps)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, pad: Pad) -> Tensor:
    """Convolve each fit with its own weights: one group per fit."""
    fits, outputs, _, size, _ = weight.shape
    margin = (size - 1) // 2
    x = F.pad(x, (margin,) * 4, mode="reflect" if pad == "reflection" else "constant")
    y = F.conv2d(
        x.reshape(1, -1, *x.shape[2:]),
        weight.reshape(-1, *weight.shape[2:]),
        None if bias is None else bias.reshape(-1),
        stride=stride,
        groups=fits,
    )
    return y.reshape(fits, outputs, *y.shape[2:])


def pool(x: Tensor, factor: int, down: Down) -> Tensor:
    """Shrink by a factor, sides rounded down."""
    if down == "avg":
        return F.avg_pool2d(x, factor)
    if down == "max":
        return F.max_pool2d(x, factor)
    assert down in ("lanczos2", "lanczos3")
    return downsample(x, down, factor)


def _norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    mean = x.mean(dim=(2, 3), keepdim=True)
    variance = x.var(dim=(2, 3), correction=0, keepdim=True)
    normal = (x - mean) / torch.sqrt(variance + EPS)
    return normal * gamma[:, :, None, None] + beta[:, :, None, None]


def activate(x: Tensor, act: Activation) -> Tensor:
    """Apply the activation function."""
    match act:
        case "LeakyReLU":
            return F.leaky_relu(x, SLOPE)
        case "Swish":
            return F.silu(x)
        case "ELU":
            return F.elu(x)
        case "none":
            return x


def concatenate(a: Tensor, b: Tensor) -> Tensor:
    """Concatenate channels of two maps, both cropped centrally to the smaller size."""
    height, width = (min(sides) for sides in zip(a.shape[2:], b.shape[2:], strict=True))
    return torch.cat([_crop(a, height, width), _crop(b, height, width)], dim=1)


def _crop(x: Tensor, height: int, width: int) -> Tensor:
    top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
    return x[:, :, top : top + height, left : left + width]
