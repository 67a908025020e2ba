"""How noisy an image is, and what the noise leaves after clipping."""

import math
import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def estimate_sigma(pixels: NDArray[np.float32]) -> float:
    """Return the standard deviation of white Gaussian noise in an image, in the image's own unit.

    The median absolute value of the finest wavelet coefficients, averaged over channels (Donoho and
    Johnstone 1994, as in scikit-image). Texture makes it too large, clipping too small; a flat
    image has none.

    Args:
        pixels: [H, W, C], finite.
    """
    from skimage import restoration

    with warnings.catch_warnings():
        # Coefficients that are exactly zero are left out; of a flat channel none remain.
        warnings.simplefilter("ignore", RuntimeWarning)
        levels = restoration.estimate_sigma(pixels, channel_axis=-1)
    return float(np.nan_to_num(levels).mean())


def clipped_variance(x: Tensor, sigma: float) -> Tensor:
    """Return E[(clip(x + n, 0, 1) - x)^2] for n normal with deviation sigma, elementwise.

    Noise on a picture that is then stored in [0, 1] is cut at both ends; in black and white areas
    half of it is lost. With a = -x / sigma, b = (1 - x) / sigma, and the normal density f and
    distribution F, the integral is sigma^2 (F(b) - F(a) - b f(b) + a f(a)) + x^2 F(a) + (1 - x)^2
    (1 - F(b)).

    Args:
        x: Noiseless values; those outside [0, 1] are taken as the nearest end.
        sigma: At least 0.
    """
    if sigma == 0:
        return torch.zeros_like(x)
    x = x.clamp(0, 1)
    a, b = -x / sigma, (1 - x) / sigma
    below, above = _distribution(a), _distribution(-b)
    inside = 1 - below - above - b * _density(b) + a * _density(a)
    variance: Tensor = sigma**2 * inside + x**2 * below + (1 - x) ** 2 * above
    return variance


def _distribution(t: Tensor) -> Tensor:
    # Not torch.special.ndtr, which some devices lack.
    distribution: Tensor = (1 + torch.erf(t / math.sqrt(2))) / 2
    return distribution


def _density(t: Tensor) -> Tensor:
    density: Tensor = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
    return density
