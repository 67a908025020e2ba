"""Mutated image files: each gives a picture or one line, in time, in silence, in little memory.

Run as `python tests/fuzz.py [COUNT]`, COUNT mutations for each kind of file. Every mutation follows
from its kind and number alone: `mutation("PNG 8", 17)` makes that one again.
"""

import contextlib
import faulthandler
import io
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

from flashdip.engine.errors import FlashDIPError
from flashdip.engine.images import load, save

SECONDS = 5.0
MEGABYTES = 200
MAX_PIXELS = 1_000_000

_EXTREMES = (0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


class TooSlow(BaseException):
    """A mutation took longer than `SECONDS`; not an `Exception`, so that nothing swallows it."""


@cache
def samples() -> dict[str, bytes]:
    """Return one small file of each kind, dressed with all the metadata that is read."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 20 * 24 * 3).reshape(20, 24, 3)
    rgb = (ramp + rng.integers(0, 50, ramp.shape)).astype(np.uint8)
    deep = rgb.astype(np.uint16) * 257
    rgba = np.dstack([rgb, rgb[:, :, :1]])
    image, alpha = Image.fromarray(rgb), Image.fromarray(rgba)
    palette = image.quantize(32)
    exif = Image.Exif()
    exif[0x0112] = 6
    dress: dict[str, Any] = {"icc_profile": bytes(500), "exif": exif.tobytes(), "dpi": (300, 300)}
    tags: dict[str, Any] = {
        "iccprofile": bytes(500),
        "extratags": [(274, 3, 1, 6, True)],
        "resolution": (300, 300),
        "metadata": None,
    }
    return {
        "PNG 8": _pillow(image, "PNG", **dress),
        "PNG 16": bytes(imagecodecs.png_encode(deep)),
        "PNG palette": _pillow(palette, "PNG", transparency=bytes(range(0, 256, 8)), **dress),
        "PNG LA": _pillow(alpha.convert("LA"), "PNG", **dress),
        "JPEG": _pillow(image, "JPEG", **dress),
        "JPEG progressive": _pillow(image.convert("L"), "JPEG", progressive=True, **dress),
        "WebP lossy": _pillow(image, "WEBP", icc_profile=bytes(500), exif=exif.tobytes()),
        "WebP lossless": _pillow(alpha, "WEBP", lossless=True),
        "TIFF 8": _tiff(rgba, photometric="rgb", compression="adobe_deflate", **tags),
        "TIFF 16": _tiff(deep, photometric="rgb", compression="lzw", predictor=True, tile=(16, 16)),
        "TIFF float": _tiff(ramp.astype(np.float32), photometric="rgb", rowsperstrip=7, **tags),
        "TIFF JPEG": _tiff(rgb, photometric="rgb", compression="jpeg", byteorder=">", **tags),
        "TIFF palette": _pillow(palette, "TIFF", compression="packbits"),
    }


def mutation(kind: str, number: int) -> bytes:
    """Return the mutation of one kind of file that has this number."""
    chance = random.Random(f"{kind} {number}")
    data = bytearray(samples()[kind])
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        chance.choice(_MUTATORS)(data, chance)
    # Without right checksums hardly a mutation of a PNG gets beyond them.
    mend = kind.startswith("PNG") and chance.random() < 0.7
    return _mend_checksums(data) if mend else bytes(data)


def finding(path: Path) -> str | None:
    """Load one file, save what came of it, and return what was wrong with that, if anything."""
    start = time.monotonic()
    before = _peak_megabytes()
    problem = None
    with _output() as output:
        try:
            with _alarm():
                picture = load(path, max_pixels=MAX_PIXELS)
                for suffix in (".png", ".tif"):
                    save(path.with_name("out" + suffix), picture, force=True)
        except FlashDIPError as error:
            if not str(error).isprintable() or "little memory" in str(error):
                problem = f"message: {str(error)!r}"
        except (Exception, TooSlow) as error:
            problem = f"{type(error).__name__}: {error}"
    if problem is None and output:
        problem = f"printed: {output[0]!r}"
    if problem is None and _peak_megabytes() - before > MEGABYTES:
        problem = f"memory: {_peak_megabytes() - before:.0f} MB"
    return problem and f"{problem} ({time.monotonic() - start:.1f} s)"


def main(count: int) -> int:
    """Try `count` mutations of each kind of file; print what was found; return the exit code."""
    warnings.simplefilter("error")
    findings = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind in samples():
            start = time.monotonic()
            path = Path(folder) / "mutated"
            for number in range(count):
                path.write_bytes(mutation(kind, number))
                if problem := finding(path):
                    findings += 1
                    print(f"{kind} #{number}: {problem}", flush=True)
            print(f"{kind}: {count} mutations in {time.monotonic() - start:.1f} s", flush=True)
    print(f"{findings} findings")
    return 1 if findings else 0


def _flip(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 2, 8))):
        if data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _truncate(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(len(data) + 1) :]


def _edit_header(data: bytearray, chance: random.Random) -> None:
    size = chance.choice((1, 2, 4))
    value = chance.choice(_EXTREMES) % (1 << 8 * size)
    place = chance.randrange(min(300, max(1, len(data))))
    data[place : place + size] = value.to_bytes(size, chance.choice(("big", "little")))


def _splice(data: bytearray, chance: random.Random) -> None:
    other = chance.choice(list(samples().values()))
    start, place = chance.randrange(len(other)), chance.randrange(len(data) + 1)
    replaced = chance.choice((0, chance.randrange(64)))
    data[place : place + replaced] = other[start : start + chance.randrange(1, 64)]


def _cut(data: bytearray, chance: random.Random) -> None:
    place = chance.randrange(len(data) + 1)
    del data[place : place + chance.randrange(1, 64)]


def _repeat(data: bytearray, chance: random.Random) -> None:
    place, size = chance.randrange(len(data) + 1), chance.randrange(1, 200)
    data[place:place] = data[place : place + size] * chance.choice((1, 2, 50))


_MUTATORS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip,
    _flip,
    _edit_header,
    _edit_header,
    _truncate,
    _splice,
    _cut,
    _repeat,
)


def _mend_checksums(png: bytearray) -> bytes:
    place = 8
    while place + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, place)
        end = place + 8 + length
        if end + 4 > len(png):
            break
        struct.pack_into(">I", png, end, zlib.crc32(png[place + 4 : end]))
        place = end + 4
    return bytes(png)


def _pillow(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _tiff(values: np.ndarray[Any, Any], byteorder: Any = "<", **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, byteorder=byteorder, **options)
    return file.getvalue()


def _peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    """Raise `TooSlow` in Python code; end the program with a traceback where C code hangs."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(4 * SECONDS, exit=True, file=sys.stdout)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def _output() -> Iterator[list[str]]:
    """Fill a list with what Python or C code wrote to stderr."""
    written: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield written
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            if text := file.read().decode(errors="replace"):
                written.append(text)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
