"""How noisy an image is, judged from the image alone."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def estimate_sigma(pixels: NDArray[np.float32]) -> float:
    """Return the standard deviation of white Gaussian noise in an image, in the image's own unit.

    The median absolute value of the finest wavelet coefficients, averaged over channels (Donoho and
    Johnstone 1994, as in scikit-image). Texture makes it too large, clipping too small.

    Args:
        pixels: [H, W, C].
    """
    from skimage import restoration

    estimate: Callable[..., float] = restoration.estimate_sigma
    return float(estimate(pixels, average_sigmas=True, channel_axis=-1))
