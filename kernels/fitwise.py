"""Torch calls whose parameters each fit has for itself, for the op set `native`.

With one fit nothing is cut out or put together: that would cost copies in the backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flashdip.kernels.opset import EPS


def conv(x: Tensor, weight: Tensor, stride: int = 1, margin: int = 0) -> Tensor:
    """Convolve each fit of x [F, I, H, W] with its own weights [F, O, I, k, l]."""
    if len(x) == 1:
        return F.conv2d(x, weight.squeeze(0), None, stride, margin)
    return torch.cat(
        [F.conv2d(x[f : f + 1], w, None, stride, margin) for f, w in enumerate(weight)]
    )


def norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Normalise each channel of x [F, C, H, W] over (H, W); gamma and beta are [F, C]."""
    if len(x) == 1:
        return F.batch_norm(x, None, None, gamma.squeeze(0), beta.squeeze(0), True, eps=EPS)
    return torch.cat(
        [
            F.batch_norm(x[f : f + 1], None, None, gamma[f], beta[f], True, eps=EPS)
            for f in range(len(x))
        ]
    )


def affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return x scale + shift, rounded once; x is [F, C, H, W], the others [F, C] in float32.

    That is a norm with statistics of 0 and 1, which torch computes in one pass.
    """
    still, one = torch.zeros_like(scale[0]), torch.ones_like(scale[0])
    parts = [
        F.batch_norm(x[f : f + 1], still, one, scale[f], shift[f], False, eps=0.0)
        for f in range(len(x))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
