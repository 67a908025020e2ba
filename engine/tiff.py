"""TIFF: bytes to stored values and back, for files that nobody vouches for.

tifffile reads and writes. It believes what the tags say, so the layout is checked first: sizes, the
number and places of strips and tiles, and the sizes inside JPEG-compressed ones. Compressions whose
output cannot be bounded beforehand are refused.
"""

import io
import itertools
import logging
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from flashdip.engine.errors import ImageError
from flashdip.engine.formats import Stored, check_dpi, check_scans, check_size, check_still

if TYPE_CHECKING:
    from tifffile import TiffFile, TiffFrame, TiffPage, TiffWriter

_ORIENTATION, _PROFILE, _JPEG_TABLES, _RESOLUTION = 274, 34675, 347, 282
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_JPEG = 7
# None, CCITT (3), LZW, JPEG, deflate (2), PackBits, Zstandard.
_COMPRESSIONS = {1, 2, 3, 4, 5, _JPEG, 8, 32946, 32773, 50000}
_PREMULTIPLIED, _STRAIGHT = 1, 2
_BESIDE = 0b101  # bits of a page's type: it is a thumbnail or a mask
_MAX_PAGES = 64  # of thumbnails and masks beside the one picture
_BIG = (1 << 32) - (1 << 26)  # bytes that 32-bit offsets reach, less what stands between
_SMALL = 1 << 24  # values that one tile may hold, however small the picture
# The size in a JPEG's frame header: two bytes marker, two length, one depth, then height and width.
_FRAME = re.compile(rb"(?=\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]...(..)(..))", re.DOTALL)
# Without any handler Python would print tifffile's complaints about broken tags to stderr.
_SILENT = logging.NullHandler()
# Flavours of microscopes and scanners, whose private tags would be parsed for nothing.
_FLAVOURS = ("eer", "epics", "lsm", "mmstack", "ndpi", "ome", "philips", "sis", "stk", "vista")


def decode_tiff(data: bytes, max_pixels: int) -> Stored:
    """Decode a TIFF of one page, beside which there may be thumbnails.

    Unsigned integers of up to 8 and 16 bits become uint8 and uint16 of full range; all other
    numbers become float32. Palettes become RGB, white-is-zero becomes black-is-zero, and JPEG's
    YCbCr becomes RGB.

    Raises:
        ImageError: Too large, empty, of several pages, or of a kind that is not supported. Broken
            data raises other errors.
    """
    with _opened(data) as file:
        page = file.pages[0]
        _check(page, data, max_pixels)
        check_still(_count_pictures(file))
        return _decode(page)


def decode_pages(data: bytes, max_pixels: int) -> Iterator[Stored]:
    """Decode the pages of a TIFF in order, without thumbnails and masks; see `decode_tiff`.

    Raises:
        ImageError: A page is too large, empty or of a kind that is not supported, or the pages go
            round in a circle.
    """
    from tifffile import TiffPage

    with _opened(data) as file:
        seen: set[int] = set()
        for index in itertools.count():
            try:
                page = file.pages[index]
            except IndexError:
                return
            if page.offset in seen:
                raise ImageError("expected pages that end, got a TIFF whose pages go in a circle")
            seen.add(page.offset)
            assert isinstance(page, TiffPage)
            if index and int(page.subfiletype) & _BESIDE:
                continue
            _check(page, data, max_pixels)
            yield _decode(page)


def encode_tiff(stored: Stored) -> bytes:
    """Encode any number of channels, 8, 16 bits or float, losslessly (deflate)."""
    file = io.BytesIO()
    encode_pages(file, [stored], stored.values.nbytes)
    return file.getvalue()


def encode_pages(file: BinaryIO | str, pages: Iterable[Stored], size: int) -> None:
    """Write pages one after another; see `encode_tiff`.

    Args:
        file: To write to, or its name.
        pages: What to write.
        size: About how many bytes that is, uncompressed: large ones become BigTIFF.
    """
    from tifffile import TiffWriter

    with TiffWriter(file, bigtiff=size > _BIG) as writer:
        for stored in pages:
            _write(writer, stored)


@contextmanager
def _opened(data: bytes) -> Iterator["TiffFile"]:
    from tifffile import TiffFile

    logging.getLogger("tifffile").addHandler(_SILENT)
    ignored: dict[str, Any] = {f"is_{flavour}": False for flavour in _FLAVOURS}
    with TiffFile(io.BytesIO(data), **ignored) as file:
        yield file


def _check(page: "TiffPage | TiffFrame", data: bytes, max_pixels: int) -> None:
    from tifffile import TiffPage

    assert isinstance(page, TiffPage)
    _check_numbers(page)
    check_size(page.imagewidth, page.imagelength, page.samplesperpixel, max_pixels)
    _check_kind(page)
    _check_segments(page, data)


def _decode(page: "TiffPage | TiffFrame") -> Stored:
    from tifffile import TiffPage

    assert isinstance(page, TiffPage)
    values = page.asarray(maxworkers=1)
    return _stored(values.reshape(page.shape), page)


def _write(writer: "TiffWriter", stored: Stored) -> None:
    values, channels = stored.values, stored.values.shape[2]
    rgb = channels == 3 or (channels > 3 and stored.rgb_first)
    extra = ["unspecified"] * (channels - (3 if rgb else 1))
    if stored.alpha is not None:
        values = np.concatenate([values, stored.alpha[:, :, None]], axis=2)
        extra.append("assocalpha" if stored.premultiplied else "unassalpha")
    options: dict[str, Any] = {}
    if stored.dpi:
        options |= {"resolution": stored.dpi, "resolutionunit": "INCH"}
    if stored.orientation != 1:
        options["extratags"] = [(_ORIENTATION, 3, 1, stored.orientation, True)]
    if values.shape[2] > 1:
        options |= {"planarconfig": "contig", "extrasamples": extra}
    writer.write(
        values if values.shape[2] > 1 else values[:, :, 0],
        photometric="rgb" if rgb else "minisblack",
        compression="adobe_deflate",
        predictor=True,
        iccprofile=stored.icc,
        metadata=None,
        software=False,
        **options,
    )


def _check_numbers(page: "TiffPage") -> None:
    """Refuse tags that hold lists, text or fractions where one whole number belongs."""
    names = ("imagewidth", "imagelength", "imagedepth", "samplesperpixel", "rowsperstrip")
    for name in (*names, "tilewidth", "tilelength", "compression", "photometric", "planarconfig"):
        if not isinstance(value := getattr(page, name), int):
            raise ValueError(f"{name} is {value}")


def _check_kind(page: "TiffPage") -> None:
    """Refuse what is valid, but is not one plain picture."""
    wanted = "expected a grey, RGB or palette TIFF of numbers"
    if page.imagedepth != 1:
        raise ImageError(f"expected one still image, got a TIFF volume {page.imagedepth} deep")
    if page.compression not in _COMPRESSIONS:
        raise ImageError(
            "expected a TIFF with no compression, LZW, deflate, Zstandard, PackBits, CCITT or JPEG,"
            f" got {_name(page.compression)}: save it with one of these"
        )
    kinds = {_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE}
    if page.photometric not in kinds | ({_YCBCR} if page.compression == _JPEG else set()):
        raise ImageError(f"{wanted}, got {_name(page.photometric)}: convert it to RGB")
    if page.dtype is None or page.dtype.kind not in "buif":
        raise ImageError(
            f"{wanted}, got {page.bitspersample} bits of format {_name(page.sampleformat)}: "
            "save it with 8 or 16 bits or as float"
        )


def _check_segments(page: "TiffPage", data: bytes) -> None:
    """Refuse strips or tiles that are missing, lie outside the file, or are absurdly large.

    Those missing would come back as zeros, or as whatever the memory held before.
    """
    places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    if len(places) != math.prod(page.chunked):
        raise ValueError(f"{len(places)} strips or tiles instead of {math.prod(page.chunked)}")
    if any(start < 8 or size < 1 or start + size > len(data) for start, size in places):
        raise ValueError("strips or tiles are empty or end behind the file's end")
    size = math.prod(page.chunks)
    if size > max(_SMALL, math.prod(page.shape)):
        raise ValueError(f"tiles of {size:,} values for {math.prod(page.shape):,}")
    if page.compression == _JPEG:
        tables = page.tags.valueof(_JPEG_TABLES, default=b"")
        for start, size in places:
            _check_jpeg(tables + data[start : start + size], page)


def _check_jpeg(jpeg: bytes, page: "TiffPage") -> None:
    """Refuse a strip or tile whose own header claims more pixels than the tags do."""
    check_scans(jpeg)
    length, width = page.tile if page.tile else (page.rowsperstrip, page.imagewidth)
    for claim in _FRAME.finditer(jpeg):
        down, across = (int.from_bytes(side, "big") for side in claim.groups())
        if down > length or across > width:
            raise ValueError(f"a JPEG of {across} x {down} in a tile of {width} x {length}")


def _count_pictures(file: "TiffFile") -> int:
    """Count pages, without those that are marked as thumbnails or masks of another.

    Counting ends at the second picture: chains of pages can be endless.
    """
    from tifffile import TiffPage

    for index in range(1, _MAX_PAGES):
        try:
            page = file.pages[index]
        except IndexError:
            return 1
        if not isinstance(page, TiffPage) or not int(page.subfiletype) & _BESIDE:
            return 2
    return _MAX_PAGES


def _stored(values: NDArray[Any], page: "TiffPage") -> Stored:
    if page.axes == "SYX":
        values = np.moveaxis(values, 0, -1)
    values = values.reshape(page.imagelength, page.imagewidth, -1)
    values = (_look_up if page.photometric == _PALETTE else _full_range)(values, page)
    rgb = page.photometric in (_RGB, _PALETTE, _YCBCR)
    kinds = [int(kind) for kind in page.extrasamples or ()]
    alphas = [kind for kind in kinds if kind in (_PREMULTIPLIED, _STRAIGHT)]
    alpha = None
    if alphas:
        place = (3 if rgb else 1) + kinds.index(alphas[0])
        alpha = _alpha(values[:, :, place])
        values = np.delete(values, place, axis=2)
    if page.photometric == _WHITE_IS_ZERO and values.dtype != np.float32:
        values = ~values
    orientation = page.tags.valueof(_ORIENTATION, default=1)
    profile = page.tags.valueof(_PROFILE)
    return Stored(
        values=values,
        alpha=alpha,
        icc=profile if isinstance(profile, bytes) and profile else None,
        orientation=orientation if orientation in range(1, 9) else 1,
        dpi=_dpi(page),
        premultiplied=alphas[:1] == [_PREMULTIPLIED],
        rgb_first=rgb and values.shape[2] > 3,
    )


def _look_up(values: NDArray[Any], page: "TiffPage") -> NDArray[Any]:
    """Replace palette indices [H, W, 1] by 8-bit colours [H, W, 3]."""
    if page.colormap is None:
        raise ValueError("the palette is missing")
    palette: NDArray[Any] = page.colormap.T  # [entries, 3], 16 bits
    # Some programs write 8-bit colours there, which would all be black.
    palette = palette >> 8 if palette.max() > 255 else palette
    colours: NDArray[Any] = palette.astype(np.uint8)[values[:, :, 0].astype(np.intp)]
    return colours


def _full_range(values: NDArray[Any], page: "TiffPage") -> NDArray[Any]:
    """Return uint8 or uint16 of full range, or float32."""
    if values.dtype.kind in "if" or values.dtype.itemsize > 2:
        with np.errstate(over="ignore"):  # float64 above float32's range is infinite
            return values.astype(np.float32)
    bits = page.bitspersample
    whole = 8 if bits <= 8 else 16
    target = np.uint8 if whole == 8 else np.uint16
    if bits == whole:
        return values.astype(target, copy=False)
    stretched = values.astype(np.float64) * ((2**whole - 1) / (2**bits - 1))
    return np.asarray(np.rint(stretched), dtype=target)


def _alpha(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype == np.float32 and not np.all((values >= 0) & (values <= 1)):
        raise ImageError("expected alpha within [0, 1] in a float TIFF, got other values: scale it")
    return values


def _dpi(page: "TiffPage") -> tuple[float, float] | None:
    if _RESOLUTION not in page.tags:
        return None
    try:
        return check_dpi(page.get_resolution(unit="INCH"))
    except Exception:  # broken tags of a picture that is whole
        return None


def _name(value: object) -> str:
    return str(getattr(value, "name", value))
