"""Small pictures and files for the tests of reading and writing images."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, ImageCms

from flashdip.engine.errors import ImageError
from flashdip.engine.images import MAX_PIXELS, load

Array = NDArray[Any]
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape: int, dtype: str = "uint8", seed: int = 0) -> Array:
    """Return random values over all of a type's range, its ends included."""
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.random(shape, dtype=np.float32)
    top = np.iinfo(dtype).max
    values = rng.integers(0, top, shape, dtype=dtype, endpoint=True)
    values.flat[:2] = 0, top
    return values


def write_tiff(path: Path, values: Array, **options: Any) -> Path:
    tifffile.imwrite(path, values, **({"metadata": None} | options))
    return path


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def refuses(path: Path, *words: str, max_pixels: int = MAX_PIXELS) -> None:
    """Check that loading gives one line that names the file and holds these words."""
    with pytest.raises(ImageError) as caught:
        load(path, max_pixels=max_pixels)
    message = str(caught.value)
    assert message.isprintable()
    for word in (path.name, "expected", "got", *words):
        assert word in message


def chunk(name: bytes, content: bytes) -> bytes:
    size, check = len(content), zlib.crc32(name + content)
    return struct.pack(">I", size) + name + content + struct.pack(">I", check)


def png(width: int, height: int, bits: int, kind: int, pixels: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
