"""Pictures: image files to float32 pixels in [0, 1] and back.

What a file's pixels were dressed in comes back when they are saved: depth, range, alpha, colour
profile, orientation and resolution. Other metadata (camera, place, text) is left behind, and so are
PNG's gamma chunks. Files are taken as hostile: their size is limited before they are decoded, and
whatever is wrong with them is an `ImageError` of one line.
"""

import os
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashdip.engine import formats, tiff
from flashdip.engine.errors import ImageError, InputError, OutputError, ShapeError
from flashdip.engine.files import atomic, one_line
from flashdip.engine.formats import Stored
from flashdip.engine.picture import Picture, as_pixels, dress, undress

if TYPE_CHECKING:
    import torch

__all__ = ["MAX_PIXELS", "Picture", "as_picture", "check_save", "decode", "encode", "load", "save"]

MAX_PIXELS = 100_000_000
"""Pixels that a file may claim, unless the caller allows more: 1.2 GB as RGB in float32."""

SUFFIXES = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"RIFF": "WEBP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
}
_DECODERS: dict[str, Callable[[bytes, int], Stored]] = {
    "PNG": formats.decode_png,
    "JPEG": formats.decode_jpeg,
    "WEBP": formats.decode_webp,
    "TIFF": tiff.decode_tiff,
}
_ENCODERS: dict[str, Callable[[Stored], bytes]] = {
    "PNG": formats.encode_png,
    "JPEG": formats.encode_jpeg,
    "WEBP": formats.encode_webp,
    "TIFF": tiff.encode_tiff,
}
_LONGEST_SIDE = {"JPEG": 65500, "WEBP": 16383}


def load(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Read a PNG, JPEG, WebP or TIFF, told by its content, not by its name.

    Args:
        path: File with one still image.
        max_pixels: Refuse larger ones before decoding them.

    Raises:
        ImageError: Missing, not a file, not an image, damaged, truncated, animated or of several
            pages, empty, too large, or of a kind that cannot be restored as it is (CMYK, for one).
    """
    with named(path):
        data = read(Path(path), max_pixels)
    return decode(data, str(path), max_pixels=max_pixels)


def decode(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Picture:
    """Return the picture that a file holds, given all its bytes.

    Args:
        data: The file.
        name: What messages call it.
        max_pixels: Refuse larger ones before decoding them.

    Raises:
        ImageError: As `load`.
    """
    with named(name):
        return _decode(data, max_pixels)


def encode(name: str, picture: Picture) -> bytes:
    """Return the file that `save` would write under a name.

    Raises:
        InputError: As `save`.
        OutputError: The encoder fails.
    """
    kind = check_save(name, picture)
    stored = undress(picture, kind, one_line(name))
    try:
        return _ENCODERS[kind](stored)
    except Exception as error:  # encoders have no common error
        raise OutputError(
            f"{one_line(name)}: cannot be written as {kind}: {one_line(error)}"
        ) from error


def most_bytes(max_pixels: int) -> int:
    """Return how long a file of so many pixels can be: float64, four channels, metadata."""
    return (1 << 26) + 32 * max_pixels


@contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Put the file's name before what is said against it."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"{one_line(path)}: {one_line(error)}") from error


def save(path: str | os.PathLike[str], picture: Picture, *, force: bool = False) -> None:
    """Write a picture, in the format that the suffix of `path` names, in the dress it came in.

    PNG holds 8 or 16 bits (16 for float), WebP 8 bits (lossless), JPEG 8 bits (quality 95, no
    chroma subsampling), TIFF anything (deflate). Integers are rounded and clipped to their range.
    A picture that was read and not changed gets back its stored values: bit for bit in integer
    files and in float files within [0, 1], to float32's rounding of the range in other float files.

    Raises:
        InputError: As `check_save`, or NaN or infinity in an integer format.
        OutputError: It exists and `force` is False, or it cannot be written.
    """
    data = encode(str(path), picture)
    with atomic(path, force=force) as temporary:
        temporary.write_bytes(data)


def check_save(path: str | os.PathLike[str], picture: Picture) -> str:
    """Check that the format which `path` names can hold a picture like this one.

    Returns:
        The format's name.

    Raises:
        InputError: The suffix is unknown, or the format cannot hold so many channels, transparency
            or sides so long.
    """
    name, suffix = one_line(path), Path(path).suffix
    kind = SUFFIXES.get(suffix.lower())
    height, width, channels = picture.pixels.shape
    if kind is None:
        raise InputError(
            f"{name}: expected a name that ends in {', '.join(SUFFIXES)}, got "
            f"{one_line(suffix) or 'no suffix'}: choose one of these"
        )
    if channels not in (1, 3) and kind != "TIFF":
        raise InputError(
            f"{name}: expected 1 or 3 channels for {kind}, got {channels}: save as TIFF (.tif)"
        )
    if kind == "JPEG" and picture.alpha is not None and picture.alpha.min() < 1:
        raise InputError(
            f"{name}: expected an opaque picture for JPEG, got a transparent one: save as PNG "
            "(.png), WebP (.webp) or TIFF (.tif)"
        )
    if max(height, width) > _LONGEST_SIDE.get(kind, max(height, width)):
        raise InputError(
            f"{name}: expected sides of at most {_LONGEST_SIDE[kind]} pixels for {kind}, got "
            f"{width} x {height}: save as PNG (.png) or TIFF (.tif)"
        )
    return kind


def as_picture(
    source: "str | os.PathLike[str] | NDArray[Any] | torch.Tensor | Picture",
    name: str = "image",
    max_pixels: int = MAX_PIXELS,
) -> Picture:
    """Return a picture of whatever holds one.

    Args:
        source: A file; an array [H, W] or [H, W, C] of bool, uint8, uint16 or float, whose range is
            told as that of a file; a tensor [H, W], [C, H, W] or [1, C, H, W] of floats in [0, 1],
            which noise may overshoot (down to -1, up to 2); or a `Picture`, returned as it is. All
            channels of arrays and tensors are data: alpha comes from files and pictures only.
        name: What messages call arrays and tensors.
        max_pixels: Limit for files.

    Raises:
        ImageError: The file cannot be read.
        ShapeError: The array or tensor has another shape.
        InputError: It holds other values, or `source` is something else.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, str | os.PathLike):
        return load(source, max_pixels=max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    import torch

    if isinstance(source, torch.Tensor):
        return _from_tensor(source, name)
    raise InputError(
        f"{name}: expected a path, an array, a tensor or a Picture, got {type(source).__name__}"
    )


def read(path: Path, max_pixels: int) -> bytes:
    """Return the whole file, unless it is no file or cannot be an image by its size.

    Raises:
        ImageError: It is so; the file is not named.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ImageError("expected an image file, got a directory: name one file in it")
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("expected an image file, got a device or pipe: save it as a file")
        if status.st_size > most_bytes(max_pixels):
            raise ImageError(
                f"expected an image of at most {max_pixels:,} pixels, got {status.st_size:,} bytes:"
                " if you trust the file, raise the limit with --max-pixels (max_pixels in Python)"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise ImageError("expected an image file, got no such file: check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        reason = one_line(getattr(error, "strerror", None) or error)
        raise ImageError(f"expected a readable file, got '{reason}': check the path") from error


def _decode(data: bytes, max_pixels: int) -> Picture:
    kind = next((kind for start, kind in _SIGNATURES.items() if data.startswith(start)), None)
    if kind is None or (kind == "WEBP" and data[8:12] != b"WEBP"):
        found = f"one that starts with {data[:8]!r}" if data else "an empty one"
        raise ImageError(f"expected a PNG, JPEG, WebP or TIFF file, got {found}: convert it first")
    with whole(kind):
        return dress(_DECODERS[kind](data, max_pixels), kind)


@contextmanager
def whole(kind: str) -> Iterator[None]:
    """Turn whatever decoding a file of this kind raises into an `ImageError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata that is not used
            yield
    except ImageError:
        raise
    except MemoryError as error:
        raise ImageError(
            "expected a picture that fits into memory, got too little memory: cut it in parts"
        ) from error
    except Exception as error:  # decoders raise nearly anything on broken data
        reason = one_line(error, limit=160) or type(error).__name__
        raise ImageError(
            f"expected a whole {kind} file, got a damaged, truncated or unusual one ({reason}): "
            "copy or export it again"
        ) from error


def _from_array(array: NDArray[Any], name: str) -> Picture:
    if array.ndim not in (2, 3) or 0 in array.shape:
        raise ShapeError(f"{name}: expected [H, W] or [H, W, C], got {list(array.shape)}")
    if array.dtype.kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind != "f" and array.dtype not in (np.uint8, np.uint16):
        raise InputError(
            f"{name}: expected an array of bool, uint8, uint16 or float, got {array.dtype}: "
            "convert it to the depth that it has"
        )
    with np.errstate(over="ignore"):  # float64 above float32's range is infinite
        values = array.astype(np.float32) if array.dtype.kind == "f" else array
    return dress(Stored(values.reshape(*array.shape[:2], -1)), "")


def _from_tensor(tensor: "torch.Tensor", name: str) -> Picture:
    if tensor.ndim not in (2, 3, 4) or 0 in tensor.shape or tensor.shape[:-3].numel() != 1:
        raise ShapeError(
            f"{name}: expected a tensor [H, W], [C, H, W] or [1, C, H, W], got {list(tensor.shape)}"
        )
    advice = "divide it by its largest possible value"
    if not tensor.is_floating_point():
        raise InputError(
            f"{name}: expected a tensor of floats in [0, 1], got {tensor.dtype}: {advice}"
        )
    values = as_pixels(tensor)
    finite = values[np.isfinite(values)]
    if finite.size and (finite.min() < -1 or finite.max() > 2):
        raise InputError(
            f"{name}: expected a tensor of floats in [0, 1], got values from {finite.min():.4g} to "
            f"{finite.max():.4g}: {advice}"
        )
    return Picture(values)
