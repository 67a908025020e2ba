"""Downsampling by an integer factor with a separable kernel, in the published convention.

The published operator (DmitryUlyanov/deep-image-prior, models/downsampler.py) pads by replication
and convolves densely with a square kernel at a stride. Its kernels are outer products, so here one
pass runs
along each axis: 2k taps instead of k^2.
"""

import functools
import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Literal["lanczos2", "lanczos3", "gauss12", "gauss1sq2", "box"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)

_GAUSS = {"gauss12": (7, 0.5), "gauss1sq2": (9, 1 / math.sqrt(2))}  # taps, sigma in half pixels


@functools.cache
def taps(kernel: Kernel, factor: int) -> tuple[float, ...]:
    """Return the taps of one axis; they sum to 1.

    Lanczos kernels are centred on the block of pixels that becomes one: 2 * support * factor taps
    between pixels (the published phase 0.5), one fewer for an odd factor. The Gaussians have a
    fixed odd number and are centred on the block's first pixel; a box has `factor` equal taps.
    """
    if kernel == "box":
        return (1 / factor,) * factor
    if kernel in _GAUSS:
        count, sigma = _GAUSS[kernel]
        raw = [math.exp(-(((i - count // 2) / 2) ** 2) / (2 * sigma**2)) for i in range(count)]
    else:
        support = int(kernel[-1])
        count = 2 * support * factor - factor % 2
        raw = [_lanczos((i - (count - 1) / 2) / factor, support) for i in range(count)]
    total = sum(raw)
    return tuple(value / total for value in raw)


def _lanczos(x: float, support: int) -> float:
    if x == 0:
        return 1.0
    return support * math.sin(math.pi * x) * math.sin(math.pi * x / support) / (math.pi * x) ** 2


@functools.cache
def _weights(kernel: Kernel, factor: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor(taps(kernel, factor), dtype=torch.float64).to(device, dtype)


def downsample(x: Tensor, kernel: Kernel, factor: int) -> Tensor:
    """Filter and keep every `factor`-th pixel: [..., H, W] to [..., H // factor, W // factor]."""
    weights = _weights(kernel, factor, x.device, x.dtype)
    count = weights.numel()
    pad = (count - 1) // 2 if kernel in _GAUSS else (count - factor) // 2
    planes = x.reshape(-1, 1, *x.shape[-2:])
    planes = F.pad(planes, (pad, pad, pad, pad), mode="replicate")
    planes = F.conv2d(planes, weights.view(1, 1, 1, -1), stride=(1, factor))
    planes = F.conv2d(planes, weights.view(1, 1, -1, 1), stride=(factor, 1))
    return planes.reshape(*x.shape[:-2], *planes.shape[-2:])
