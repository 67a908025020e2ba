"""Image quality against a known truth."""

import math

import torch
from torch import Tensor

from flashdip.engine.errors import ShapeError

_LUMA = (65.481 / 255, 128.553 / 255, 24.966 / 255)  # ITU-R BT.601, studio range


def decibels(mse: float) -> float:
    """Return the PSNR of a mean squared error of values in [0, 1], in dB; at most 200."""
    return -10 * math.log10(max(mse, 1e-20))


def psnr(image: Tensor, truth: Tensor) -> float:
    """Return the peak signal-to-noise ratio over all entries jointly; see `decibels`.

    Args:
        image: Any shape, values in [0, 1].
        truth: The same shape.

    Raises:
        ShapeError: The shapes differ.
    """
    if image.shape != truth.shape:
        raise ShapeError(
            f"truth: expected the restored image's shape {tuple(image.shape)}, "
            f"got {tuple(truth.shape)}"
        )
    return decibels((image.double() - truth.double()).square().mean().item())


def psnr_luma(image: Tensor, truth: Tensor, crop: int = 4) -> float:
    """Return the PSNR of the luma channel in dB, as the paper evaluates super-resolution.

    Y of BT.601 in studio range; `crop` pixels left out at the top and on the left, one more at the
    bottom and on the right (Ulyanov et al., super-resolution_eval_script.py).

    Args:
        image: RGB, [3, H, W], values in [0, 1].
        truth: The same shape.
    """
    return psnr(_luma(image, crop), _luma(truth, crop))


def _luma(image: Tensor, crop: int) -> Tensor:
    height, width = image.shape[-2:]
    inner = image[..., crop : height - crop - 1, crop : width - crop - 1].double()
    return torch.einsum("c,chw->hw", torch.tensor(_LUMA, dtype=torch.float64), inner)
