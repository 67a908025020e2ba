"""Which pixels are known: from a mask, from alpha, from NaN, or from a colour that marks the rest.

All functions return booleans [H, W], True = known, the convention of the published inpainting.
Grey levels are cut at half of the range: half and above is known. Values between black and white
come from soft brushes and from resizing, and half is where either of them put the edge.
"""

import re

import numpy as np
from numpy.typing import NDArray

from flashdip.engine.errors import ConfigError, InputError, ShapeError
from flashdip.engine.images import Picture

Known = NDArray[np.bool_]

MARKERS = "zero, nan, alpha or a colour such as #ff00ff"


def from_mask(mask: Picture, picture: Picture) -> Known:
    """Read a mask picture: white or 1 = known, black or 0 = missing.

    Colours are averaged and alpha is ignored. Integer masks that hold nothing but 0 and 1 are read
    as such, although 1 of 255 is dark.

    Raises:
        ShapeError: The mask's size is not the picture's.
        InputError: The mask marks no pixel as known.
    """
    values = mask.pixels.mean(axis=2)
    if values.shape != picture.pixels.shape[:2]:
        raise ShapeError(
            f"mask: expected {size(picture)} pixels (width x height) like the image, got "
            f"{size(mask)}: draw the mask at the image's size"
        )
    if mask.dtype != "float32" and 0 < values.max() <= 1.001 / mask.high:
        values = values * mask.high
    known: Known = values >= 0.5
    if not known.any():
        raise InputError(
            "mask: expected white (known) and black (missing) pixels, got none at or above half of "
            "white: invert the mask if white marks what is missing"
        )
    return known


def from_alpha(picture: Picture) -> Known:
    """Take pixels that are at least half opaque as known.

    Raises:
        InputError: The picture has no alpha channel, or is transparent everywhere.
    """
    if picture.alpha is None:
        raise InputError(
            "image: expected transparent pixels where it is missing, got a picture without alpha: "
            "mark them otherwise (--missing) or give a mask (inpaint --mask)"
        )
    return require_some(picture.alpha >= 0.5, "transparent")


def from_marker(missing: str, picture: Picture) -> Known:
    """Find the missing pixels by the mark they carry.

    Args:
        missing: "zero" (all channels are zero), "nan" (any channel is NaN or infinite), "alpha"
            (less than half opaque) or "#rrggbb" (exactly that colour, at the picture's depth).
        picture: The picture that carries the marks.

    Raises:
        ConfigError: `missing` is none of these.
        InputError: No pixel carries the mark, or all do.
    """
    match missing.lower():
        case "alpha":
            known, mark = from_alpha(picture), "transparent"
        case "nan":
            known, mark = finite(picture), "NaN or infinite"
        case "zero":
            zero = -picture.low / (picture.high - picture.low)
            marked = np.abs(picture.pixels - zero) < _half_step(picture)
            known, mark = ~marked.all(axis=2), "zero in all channels"
        case colour if re.fullmatch(r"#[0-9a-f]{6}", colour):
            known, mark = ~_has_colour(colour, picture), colour
        case _:
            raise ConfigError(f"missing: expected {MARKERS}, got {missing!r}")
    if known.all():
        raise InputError(
            f"image: expected missing pixels to be {mark}, got none: choose another mark with "
            "--missing, or give a mask (inpaint --mask); a JPEG does not keep exact marks"
        )
    return require_some(known, mark)


def finite(picture: Picture) -> Known:
    """Tell where all channels are finite."""
    return np.asarray(np.isfinite(picture.pixels).all(axis=2))


def require_finite(picture: Picture, known: Known | None = None) -> None:
    """Refuse pixels that no mask covers and that hold NaN or infinity.

    Raises:
        InputError: Names how many there are and which command treats them as missing.
    """
    broken = ~finite(picture)
    if known is not None:
        broken &= known
    if count := int(broken.sum()):
        raise InputError(
            f"image: expected finite pixels, got {count} of {broken.size} that are NaN or infinite"
            f"{'' if known is None else ' where the mask says known'}: fill them with "
            "'inpaint' without a mask, or with 'restore --missing nan'"
        )


def size(picture: Picture) -> str:
    """Write a picture's size as width x height, the way image programs do."""
    height, width = picture.pixels.shape[:2]
    return f"{width}x{height}"


def require_some(known: Known, mark: str) -> Known:
    """Return what is known, unless that is nothing.

    Raises:
        InputError: Every pixel carries the mark.
    """
    if not known.any():
        raise InputError(
            f"image: expected some known pixels, got a picture that is {mark} everywhere: there is "
            "nothing to restore it from"
        )
    return known


def _half_step(picture: Picture) -> float:
    # Half of the smallest step that the file's depth can hold, so that equality survives rounding.
    return {"uint8": 0.5 / 255, "uint16": 0.5 / 65535}.get(picture.dtype, 1e-6)


def _has_colour(colour: str, picture: Picture) -> Known:
    channels = picture.pixels.shape[2]
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float32) / 255
    if channels == 1 and len(set(rgb)) > 1:
        raise InputError(
            f"missing: expected a grey such as #808080 for a grey image, got {colour}: "
            "no pixel can have that colour"
        )
    if channels not in (1, 3):
        raise InputError(
            f"missing: expected an image of 1 or 3 channels for the colour {colour}, got "
            f"{channels}: use zero, nan or alpha"
        )
    distance = np.abs(picture.pixels - rgb[:channels])
    return np.asarray((distance < _half_step(picture)).all(axis=2))
