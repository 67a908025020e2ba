"""Arrays of pixels: from stored values to [0, 1] and back, upright and back, to another size."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Pixels: TypeAlias = NDArray[np.float32]

_TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: lambda image: np.rot90(image, 1),
}
_BACK = {6: 8, 8: 6}  # all others are their own inverse


def top(dtype: np.dtype[Any]) -> float:
    """Return the stored value that 1 stands for: the largest one of integers, 1 of floats."""
    return float(np.iinfo(dtype).max) if dtype.kind == "u" else 1.0


def span(values: NDArray[Any]) -> tuple[float, float]:
    """Return the range that [0, 1] stands for in a float image.

    It is (0, 1) if all finite values lie in it, else the least and the largest of them; an image of
    one value gets some range above that value.
    """
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if low >= 0 and high <= 1:
        return 0.0, 1.0
    return (low, high) if low < high else (low, low + max(1.0, abs(low)))


def scale(values: NDArray[Any], low: float, high: float) -> Pixels:
    """Map [low, high] to [0, 1] as float32. NaN and infinity stay what they are."""
    if (low, high) == (0.0, 1.0):
        return values.astype(np.float32)
    # float64 where it matters: float32 holds 16-bit values divided by 65535 well enough.
    wide: NDArray[np.floating] = values.astype(
        np.float32 if values.dtype.kind == "u" else np.float64
    )
    return ((wide - low) / (high - low)).astype(np.float32, copy=False)


def unscale(pixels: Pixels, low: float, high: float) -> Pixels:
    """Map [0, 1] back to [low, high], as float32."""
    if (low, high) == (0.0, 1.0):
        return pixels
    with np.errstate(over="ignore"):  # an overshoot beyond float32 is infinite
        return (pixels.astype(np.float64) * (high - low) + low).astype(np.float32)


def quantise(pixels: Pixels, dtype: str) -> NDArray[Any]:
    """Round [0, 1] to all of an integer type's range; what lies outside is clipped."""
    levels: NDArray[Any] = np.rint(np.clip(pixels, 0, 1) * np.float32(np.iinfo(dtype).max))
    return levels.astype(dtype)


def upright(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn a stored image [H, W, ...] as its EXIF orientation (1 to 8) says."""
    turn = _TURNS.get(orientation)
    return np.ascontiguousarray(turn(image) if turn else image)


def as_stored(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Undo `upright`."""
    return upright(image, _BACK.get(orientation, orientation))


def unpremultiply(values: NDArray[Any], alpha: Pixels) -> Pixels:
    """Divide colours [H, W, C] by alpha [H, W]; colours of transparent pixels become 0."""
    weights = np.broadcast_to(alpha[:, :, None], values.shape)
    straight = np.zeros(values.shape, np.float32)
    np.divide(values, weights, out=straight, where=weights > 0, dtype=np.float32)
    return straight


def resize(plane: Pixels, height: int, width: int) -> Pixels:
    """Resize [H, W] bilinearly, averaging where it shrinks; stays within the values' range."""
    from PIL import Image

    if plane.shape == (height, width):
        return plane
    resized = Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized, dtype=np.float32)
