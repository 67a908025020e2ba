"""A picture: pixels in [0, 1], and what their file dressed them in."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from flashdip.engine.errors import InputError, ShapeError
from flashdip.engine.formats import Stored
from flashdip.engine.pixels import (
    Pixels,
    as_stored,
    quantise,
    resize,
    scale,
    span,
    top,
    unpremultiply,
    unscale,
    upright,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Picture:
    """Pixels, and what their file dressed them in.

    Attributes:
        pixels: [H, W, C], float32, upright, colour or data channels only. 0 and 1 are the ends of
            the file's range. Those of a float file may hold NaN and infinity.
        alpha: [H, W], float32 in [0, 1], straight (colours are not multiplied by it), or None.
        dtype: As stored: "uint8", "uint16" or "float32", the nearest of them.
        low: Stored value that 0 stands for.
        high: Stored value that 1 stands for: 255, 65535; for float files 1 if all finite values lie
            in [0, 1], else `low` and `high` are the least and the largest of them.
        icc: Colour profile as stored.
        orientation: EXIF orientation as stored, 1 to 8. `pixels` and `alpha` are upright already;
            saving turns them back.
        dpi: Pixels per inch as stored, across and down (before they were turned upright).
        format: "PNG", "JPEG", "WEBP", "TIFF", or "" for what was never a file.
        premultiplied: The file stored colours multiplied by alpha (TIFF).
        rgb_first: Of more than three channels, the first three are red, green and blue (TIFF).
    """

    pixels: Pixels
    alpha: Pixels | None = None
    dtype: str = "float32"
    low: float = 0.0
    high: float = 1.0
    icc: bytes | None = None
    orientation: int = 1
    dpi: tuple[float, float] | None = None
    format: str = ""
    premultiplied: bool = False
    rgb_first: bool = False

    def __post_init__(self) -> None:
        """Raise `ShapeError` unless pixels are [H, W, C] with at least one, and alpha fits."""
        shape = self.pixels.shape
        if len(shape) != 3 or 0 in shape:
            raise ShapeError(f"pixels: expected [H, W, C], none of them 0, got {list(shape)}")
        if self.alpha is not None and self.alpha.shape != shape[:2]:
            raise ShapeError(
                f"alpha: expected {list(shape[:2])} like the pixels, got {list(self.alpha.shape)}"
            )

    def tensor(self) -> "torch.Tensor":
        """Return the pixels as [1, C, H, W], float32, in memory of their own."""
        import torch

        return torch.tensor(np.ascontiguousarray(self.pixels)).permute(2, 0, 1).contiguous()[None]

    def with_pixels(
        self,
        pixels: "NDArray[Any] | torch.Tensor",
        alpha: NDArray[Any] | Literal["keep"] | None = "keep",
    ) -> "Picture":
        """Return other pixels in the same dress.

        Args:
            pixels: Array [H, W, C] or tensor [C, H, W] or [1, C, H, W], of any size.
            alpha: [H, W] in [0, 1], None for none, or "keep" for this picture's own, which is
                resized bilinearly where the size changed.

        Raises:
            ShapeError: `pixels` or `alpha` has another shape.
        """
        values = as_pixels(pixels)
        if isinstance(alpha, str):
            alpha = None if self.alpha is None else resize(self.alpha, *values.shape[:2])
        elif alpha is not None:
            alpha = np.asarray(alpha, dtype=np.float32)
        return replace(self, pixels=values, alpha=alpha)


def dress(stored: Stored, kind: str, ends: tuple[float, float] | None = None) -> Picture:
    """Scale stored values to [0, 1] and turn them upright.

    Args:
        stored: Of a file.
        kind: Of the file.
        ends: What 0 and 1 stand for in a float file; None: as the values say.
    """
    values, alpha = stored.values, None
    low, high = 0.0, top(values.dtype)
    with np.errstate(all="ignore"):  # NaN and infinity are let through
        if stored.alpha is not None:
            alpha = scale(stored.alpha, 0.0, high)
            if stored.premultiplied:
                values = unpremultiply(values, alpha)
        if stored.values.dtype == np.float32:
            low, high = span(values) if ends is None else ends
        scaled = scale(values, low, high)
    return Picture(
        pixels=upright(scaled, stored.orientation),
        alpha=None if alpha is None else upright(alpha, stored.orientation),
        dtype=stored.values.dtype.name,
        low=low,
        high=high,
        icc=stored.icc,
        orientation=stored.orientation,
        dpi=stored.dpi,
        format=kind,
        premultiplied=stored.premultiplied,
        rgb_first=stored.rgb_first,
    )


def undress(picture: Picture, kind: str, name: str) -> Stored:
    """Undo `dress`, at the nearest depth that the format `kind` has.

    Raises:
        InputError: There is NaN or infinity, and the format has integers only.
    """
    dtype = picture.dtype
    if kind != "TIFF":
        dtype = "uint8" if kind != "PNG" or dtype == "uint8" else "uint16"
    premultiplied = kind == "TIFF" and picture.premultiplied and picture.alpha is not None
    values, alpha = picture.pixels, picture.alpha
    if dtype == "float32":
        values = unscale(values, picture.low, picture.high)
    elif not np.isfinite(values).all():
        raise InputError(
            f"{name}: expected finite pixels for {kind} of integers, got NaN or infinity: "
            "fill them first, or save as a float TIFF (.tif)"
        )
    if premultiplied and alpha is not None:
        values = values * alpha[:, :, None]
    if dtype != "float32":
        values = quantise(values, dtype)
        alpha = None if alpha is None else quantise(alpha, dtype)
    return Stored(
        values=as_stored(values, picture.orientation),
        alpha=None if alpha is None else as_stored(alpha, picture.orientation),
        icc=picture.icc,
        orientation=picture.orientation,
        dpi=picture.dpi,
        premultiplied=premultiplied,
        rgb_first=picture.rgb_first,
    )


def as_pixels(source: "NDArray[Any] | torch.Tensor") -> Pixels:
    """Return a copy as float32 [H, W, C], of an array [H, W, C] or a tensor [..., C, H, W]."""
    if isinstance(source, np.ndarray):
        return source.astype(np.float32)
    values = source.detach().float().cpu().numpy()
    values = values.reshape(-1, *values.shape[-2:]).transpose(1, 2, 0)
    return np.array(values, dtype=np.float32, order="C")
