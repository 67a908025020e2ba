"""Whether what a restoration took away looks like noise: its correlation between neighbours."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

REACH = 8  # pixels between neighbours, at most
CONFIDENCE = 0.99
STRUCTURE = 0.1  # correlation from which on the eye sees the picture in its residual


@dataclass(frozen=True, eq=False)
class Whiteness:
    """How far a residual is from white noise.

    Attributes:
        deviation: Its standard deviation.
        correlation: Between pixels at each distance (dy, dx) from -REACH to REACH, [2 REACH + 1,
            2 REACH + 1]; 1 in the centre, NaN where no two measured pixels are so far apart.
        lag: The distance (dy, dx) of the correlation that is largest in magnitude.
        bound: White noise of as many pixels keeps all correlations below this in 99 of 100 cases.
    """

    deviation: float
    correlation: NDArray[np.float64]
    lag: tuple[int, int]
    bound: float

    @property
    def largest(self) -> float:
        """The correlation at `lag`, with its sign."""
        return float(self.correlation[self.lag[0] + REACH, self.lag[1] + REACH])

    @property
    def verdict(self) -> str:
        """What that means, in a few words."""
        size = abs(self.largest)
        if size <= self.bound:
            return "white: no structure of the picture is in it"
        if size <= STRUCTURE:
            return "nearly white: little structure of the picture is in it"
        return "not white: structure of the picture, or correlated noise, is in it"


def whiteness(residual: NDArray[np.floating], measured: NDArray[np.bool_]) -> Whiteness | None:
    """Correlate a residual with itself, shifted by up to `REACH` pixels.

    Args:
        residual: [C, H, W]; channels are weighted by their variance.
        measured: Which of its values count, [C, H, W].

    Returns:
        None where nothing was measured or the residual is constant.
    """
    if not measured.any():
        return None
    mask = measured.astype(np.float64)
    counts = mask.sum(axis=(1, 2), keepdims=True)
    mean = (residual * mask).sum(axis=(1, 2), keepdims=True) / np.maximum(counts, 1)
    centred = (residual - mean) * mask
    variance = float(np.square(centred).sum() / mask.sum())
    if not variance > 0:
        return None
    pairs = _correlate(mask)
    sums = _correlate(centred)
    pairs[pairs < 0.5] = np.nan
    correlation = sums / pairs / variance
    independent = ((2 * REACH + 1) ** 2 - 1) // 2
    quantile = NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2 / independent)
    # Relative to how sure each is.
    surprise = np.abs(correlation) * np.sqrt(pairs)
    surprise[:REACH] = surprise[REACH, : REACH + 1] = np.nan  # the other half mirrors this one
    if np.isnan(surprise).all():
        return None
    row, column = np.unravel_index(int(np.nanargmax(surprise)), surprise.shape)
    return Whiteness(
        deviation=variance**0.5,
        correlation=correlation,
        lag=(int(row) - REACH, int(column) - REACH),
        bound=quantile / float(pairs[row, column]) ** 0.5,
    )


def _correlate(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum v(y, x) v(y + dy, x + dx) over all channels and pixels, for each near (dy, dx)."""
    height, width = (max(side, REACH) + REACH for side in values.shape[1:])  # no shift wraps round
    spectrum = np.fft.rfft2(values, s=(height, width))
    power = np.square(np.abs(spectrum)).sum(axis=0)
    around = np.fft.irfft2(power, s=(height, width))
    rows, columns = (np.arange(-REACH, REACH + 1) % side for side in (height, width))
    result: NDArray[np.float64] = around[np.ix_(rows, columns)]
    return result
