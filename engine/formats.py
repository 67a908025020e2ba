"""PNG, JPEG and WebP: bytes to stored values and back, for files that nobody vouches for.

Pillow reads the headers, the metadata and JPEG and WebP; libpng (imagecodecs) reads and writes all
pixels of PNG, because Pillow cuts 16-bit colour to 8 bits. Decoders take the whole file as bytes,
look at its size before they decode, and raise `ImageError` without the file's name for what they
refuse. Broken data may make them raise anything else: `images.load` turns that into one line.
"""

import io
import struct
import zlib
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flashdip.engine.errors import ImageError

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

_ORIENTATION = 0x0112  # the EXIF and TIFF tag
_PNG_HEADER = 33  # bytes of signature and IHDR, after which other chunks may stand
_MAX_SCANS = 500  # of one progressive JPEG; encoders make about 10, hostile files 10,000 slow ones
_START_OF_SCAN = b"\xff\xda"


@dataclass(frozen=True, eq=False)
class Stored:
    """One image as its file holds it: not yet upright, not yet scaled to [0, 1].

    Attributes:
        values: Colour channels, [H, W, C], uint8, uint16 or float32.
        alpha: [H, W] of the same dtype, or None.
        icc: Colour profile.
        orientation: EXIF orientation, 1 to 8.
        dpi: Pixels per inch, across and down.
        premultiplied: Colours are multiplied by alpha (TIFF only).
        rgb_first: The first three of more than three channels are red, green and blue (TIFF only).
    """

    values: NDArray[Any]
    alpha: NDArray[Any] | None = None
    icc: bytes | None = None
    orientation: int = 1
    dpi: tuple[float, float] | None = None
    premultiplied: bool = False
    rgb_first: bool = False


def check_size(width: int, height: int, channels: int, max_pixels: int) -> None:
    """Refuse images without pixels, and ones too large to decode.

    Four values a pixel are allowed on average, so that files with thousands of channels do not get
    past the limit.

    Raises:
        ImageError: There is no pixel, or there are more than `max_pixels`.
    """
    if width < 1 or height < 1 or channels < 1:
        raise ImageError(
            f"expected at least one pixel, got {width} x {height} in {channels} channels: "
            "export the picture again"
        )
    if width * height * max(1.0, channels / 4) > max_pixels:
        many = f" in {channels} channels" if channels > 4 else ""
        raise ImageError(
            f"expected at most {max_pixels:,} pixels, got {width} x {height}{many}: if you trust "
            "the file, raise the limit with --max-pixels (max_pixels in Python)"
        )


def check_still(frames: int) -> None:
    """Refuse animations and files of several pages."""
    if frames > 1:
        raise ImageError(
            f"expected one still image, got {frames} frames or pages: save the one to restore as a "
            "file of its own"
        )


def check_scans(jpeg: bytes) -> None:
    """Refuse progressive JPEGs with so many scans that decoding them would take for ever."""
    scans = jpeg.count(_START_OF_SCAN)
    if scans > _MAX_SCANS:
        raise ImageError(
            f"expected at most {_MAX_SCANS} scans in a JPEG, got {scans}: save the picture again"
        )


def check_dpi(dpi: Any) -> tuple[float, float] | None:
    """Return a resolution that every format can store, or None: it is never worth an error."""
    try:
        across, down = (float(value) for value in dpi)
    except (TypeError, ValueError, ArithmeticError):
        return None
    return (across, down) if 1 <= across <= 65535 and 1 <= down <= 65535 else None


def decode_png(data: bytes, max_pixels: int) -> Stored:
    """Decode a PNG: any depth and colour type; palettes become RGB, fewer than 8 bits become 8.

    Raises:
        ImageError: Too large, empty or animated. Broken data raises other errors.
    """
    from imagecodecs import png_decode
    from PIL.PngImagePlugin import PngImageFile

    if data[12:16] == b"IHDR":  # Pillow does not tell what is wrong with an empty image
        width, height = struct.unpack_from(">II", data, 16)
        check_size(width, height, 4, max_pixels)
    with PngImageFile(io.BytesIO(data)) as image:
        check_size(*image.size, 4, max_pixels)
        check_still(getattr(image, "n_frames", 1))
        # Decoding here too finds metadata behind the pixels and limits zipped text and profiles.
        image.load()
        # libpng's warnings about surplus bytes and odd chunks would be written straight to stderr.
        with redirect_stderr(io.StringIO()):
            values = png_decode(data)
        return _stored(values, image)


def decode_jpeg(data: bytes, max_pixels: int) -> Stored:
    """Decode a JPEG, grey or RGB. Of several pictures in one file (MPO) the first is taken.

    Raises:
        ImageError: Too large, empty, or CMYK. Broken data raises other errors.
    """
    from PIL.JpegImagePlugin import JpegImageFile

    check_scans(data)
    with JpegImageFile(io.BytesIO(data)) as image:
        check_size(*image.size, 3, max_pixels)
        if image.mode not in ("L", "RGB"):
            raise ImageError(f"expected a grey or RGB JPEG, got {image.mode}: convert it to RGB")
        image.load()
        return _stored(np.asarray(image), image)


def decode_webp(data: bytes, max_pixels: int) -> Stored:
    """Decode a WebP, lossy or lossless, RGB or RGBA.

    Raises:
        ImageError: Too large, empty or animated. Broken data raises other errors.
    """
    from PIL.WebPImagePlugin import WebPImageFile

    # The decoder behind Pillow takes memory for the whole canvas as soon as it is opened.
    check_size(*_webp_size(data), 4, max_pixels)
    with WebPImageFile(io.BytesIO(data)) as image:
        check_size(*image.size, 4, max_pixels)
        check_still(image.n_frames)
        image.load()
        return _stored(np.asarray(image), image)


def encode_png(stored: Stored) -> bytes:
    """Encode 8 or 16 bits of grey or RGB, with alpha or without, losslessly."""
    from imagecodecs import png_encode

    extra = b""
    if stored.icc:
        extra += _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(stored.icc))
    if stored.dpi:
        across, down = (round(value / 0.0254) for value in stored.dpi)  # pixels per metre
        extra += _chunk(b"pHYs", struct.pack(">IIB", across, down, 1))
    if stored.orientation != 1:
        extra += _chunk(b"eXIf", _exif(stored).removeprefix(b"Exif\0\0"))
    data = bytes(png_encode(np.ascontiguousarray(_with_alpha(stored))))
    return data[:_PNG_HEADER] + extra + data[_PNG_HEADER:]


def encode_jpeg(stored: Stored) -> bytes:
    """Encode 8 bits of grey or RGB at quality 95 without colour subsampling; alpha is left out."""
    options: dict[str, Any] = {"quality": 95, "subsampling": 0}
    if stored.dpi:
        options["dpi"] = stored.dpi
    return _encode_with_pillow(stored.values, stored, "JPEG", options)


def encode_webp(stored: Stored) -> bytes:
    """Encode 8 bits losslessly, colours under transparent pixels included.

    WebP has no grey: it becomes RGB, without its profile, which would not fit.
    """
    if stored.values.shape[2] == 1:
        stored = replace(stored, values=np.repeat(stored.values, 3, axis=2), icc=None)
    return _encode_with_pillow(
        _with_alpha(stored), stored, "WEBP", {"lossless": True, "exact": True}
    )


def _stored(values: NDArray[Any], image: "ImageFile") -> Stored:
    """Join decoded pixels with the metadata that Pillow found."""
    values = values.reshape(*values.shape[:2], -1)
    has_alpha = values.shape[2] in (2, 4)
    profile = image.info.get("icc_profile")
    return Stored(
        values=values[:, :, :-1] if has_alpha else values,
        alpha=values[:, :, -1] if has_alpha else None,
        icc=profile if isinstance(profile, bytes) and profile else None,
        orientation=_orientation(image),
        dpi=check_dpi(image.info.get("dpi")),
    )


def _orientation(image: "ImageFile") -> int:
    """Return the orientation, 1 where the EXIF block is broken: the pixels may still be whole."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow's parser lets all kinds through
        return 1
    return value if value in range(1, 9) else 1


def _chunk(name: bytes, content: bytes) -> bytes:
    check = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Read the size of the canvas from the first chunk (RFC 9649, sections 2.5 to 2.7)."""
    match data[12:16]:
        case b"VP8X":
            across, down = data[24:27], data[27:30]
            return int.from_bytes(across, "little") + 1, int.from_bytes(down, "little") + 1
        case b"VP8L":
            (bits,) = struct.unpack_from("<I", data, 21)
            return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        case b"VP8 ":
            width, height = struct.unpack_from("<HH", data, 26)
            return width & 0x3FFF, height & 0x3FFF
    raise ValueError("no VP8 chunk where the format wants it")


def _with_alpha(stored: Stored) -> NDArray[Any]:
    if stored.alpha is None:
        return stored.values
    return np.concatenate([stored.values, stored.alpha[:, :, None]], axis=2)


def _exif(stored: Stored) -> bytes:
    from PIL.Image import Exif

    exif = Exif()
    exif[_ORIENTATION] = stored.orientation
    return exif.tobytes()


def _encode_with_pillow(
    values: NDArray[Any], stored: Stored, name: str, options: dict[str, Any]
) -> bytes:
    from PIL import Image

    if stored.icc:
        options["icc_profile"] = stored.icc
    if stored.orientation != 1:
        options["exif"] = _exif(stored)
    file = io.BytesIO()
    # Pillow knows grey by the missing axis.
    grey = values.shape[2] == 1
    Image.fromarray(values[:, :, 0] if grey else values).save(file, name, **options)
    return file.getvalue()
