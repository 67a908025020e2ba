"""Files that are refused, each in one line: no image, damaged, of another kind, or hostile."""

import io
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from flashdip.engine.errors import ImageError
from flashdip.engine.images import load
from tests.pictures import chunk, noise, png, refuses, write_tiff


def test_files_that_are_no_images(tmp_path: Path) -> None:
    refuses(tmp_path / "missing.png", "no such file", "check the path")
    refuses(tmp_path, "directory")
    refuses(tmp_path / "line\nbreak.png".replace("\n", " "), "no such file")
    with pytest.raises(ImageError, match=r"line break\.png"):
        load(tmp_path / "line\nbreak.png")
    with pytest.raises(ImageError, match="readable"):
        load("null\0byte")
    (tmp_path / "empty.png").write_bytes(b"")
    refuses(tmp_path / "empty.png", "empty")
    (tmp_path / "text.png").write_text("hello")
    refuses(tmp_path / "text.png", "PNG, JPEG, WebP or TIFF", "hello")
    os.mkfifo(tmp_path / "pipe.png")
    refuses(tmp_path / "pipe.png", "pipe")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_files(tmp_path: Path, suffix: str, part: float) -> None:
    whole = tmp_path / f"whole{suffix}"
    Image.fromarray(noise(40, 30, 3)).save(whole)
    data = whole.read_bytes()
    path = tmp_path / f"part{suffix}"
    path.write_bytes(data[: int(len(data) * part)])
    refuses(path, "damaged, truncated")


def test_deep_png_truncated(tmp_path: Path) -> None:
    data = imagecodecs.png_encode(noise(40, 30, 3, dtype="uint16"))
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    refuses(tmp_path / "a.png", "damaged, truncated")


def test_several_frames_or_pages(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(9, 7, 3, seed=seed)) for seed in range(3)]
    for suffix in (".png", ".webp", ".tif"):
        path = tmp_path / f"a{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        refuses(path, "one still image")


def test_thumbnails_beside_a_tiff_are_ignored(tmp_path: Path) -> None:
    values = noise(16, 16)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(values, photometric="minisblack", metadata=None)
        file.write(values[::2, ::2], photometric="minisblack", subfiletype=1, metadata=None)
    assert_array_equal(np.rint(load(tmp_path / "a.tif").pixels[:, :, 0] * 255), values)


def test_kinds_that_cannot_be_restored_as_they_are(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (7, 9))
    cmyk.save(tmp_path / "a.jpg")
    cmyk.save(tmp_path / "a.tif")
    refuses(tmp_path / "a.jpg", "CMYK", "convert it to RGB")
    refuses(tmp_path / "a.tif", "SEPARATED", "convert it to RGB")
    write_tiff(tmp_path / "b.tif", np.zeros((9, 7), np.complex64), photometric="minisblack")
    refuses(tmp_path / "b.tif", "COMPLEX")
    write_tiff(tmp_path / "c.tif", noise(9, 7), compression="png", photometric="minisblack")
    refuses(tmp_path / "c.tif", "compression", "PNG")
    write_tiff(tmp_path / "d.tif", noise(3, 9, 7), volumetric=True, photometric="minisblack")
    refuses(tmp_path / "d.tif", "volume")
    alpha = np.full((9, 7, 2), 7, np.float32)
    write_tiff(
        tmp_path / "e.tif", alpha, photometric="minisblack", planarconfig="contig",
        extrasamples=["unassalpha"],
    )  # fmt: skip
    refuses(tmp_path / "e.tif", "alpha within [0, 1]")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_the_limit_on_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(noise(40, 30, 3)).save(path)
    refuses(path, "1,199 pixels", "30 x 40", "--max-pixels", max_pixels=1199)
    assert load(path, max_pixels=1200).pixels.shape == (40, 30, 3)


def test_many_channels_count_as_pixels(tmp_path: Path) -> None:
    path = write_tiff(
        tmp_path / "a.tif", noise(9, 7, 40), photometric="minisblack", planarconfig="contig"
    )
    refuses(path, "40 channels", max_pixels=629)
    assert load(path, max_pixels=630).pixels.shape == (9, 7, 40)


def patched_tiff(code: int, value: int, type: int = 4, **options: Any) -> bytes:
    """Return a small TIFF with one tag replaced by one value, LONG unless `type` says otherwise."""
    file = io.BytesIO()
    tifffile.imwrite(file, noise(48, 64), photometric="minisblack", metadata=None, **options)
    data = bytearray(file.getvalue())
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as parsed:
        tag = parsed.pages.first.tags[code]
        struct.pack_into("<HI", data, tag.offset + 2, type, 1)
        struct.pack_into("<I", data, tag.offset + 8, value)
    return bytes(data)


def giant_jpeg_in_tiff() -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, noise(48, 64, 3), photometric="rgb", compression="jpeg")
    data = file.getvalue()
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", 60000, 60000) + data[place + 4 :]


def many_scans() -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(48, 64)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 1000 + data[-2:]


def endless_pages() -> bytes:
    data = bytearray(patched_tiff(254, 1, subfiletype=1))  # a thumbnail, whose next page is itself
    (start,) = struct.unpack_from("<I", data, 4)
    (tags,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + 12 * tags, start)
    return bytes(data)


def webp_canvas() -> bytes:
    flags_and_size = b"\0\0\0\0" + b"\xff\xff\0" + b"\xfe\xff\0"
    body = b"WEBPVP8X" + struct.pack("<I", 10) + flags_and_size
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMB = zlib.compress(bytes(200_000_000), 9)
PIXEL = zlib.compress(b"\0\0")
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "zipped text": (lambda: png(1, 1, 8, 0, PIXEL, chunk(b"zTXt", b"a\0\0" + BOMB)), "too large"),
    "zipped text behind the pixels": (
        lambda: png(1, 1, 8, 0, PIXEL)[:-12] + chunk(b"zTXt", b"a\0\0" + BOMB),
        "too large",
    ),
    "zipped profile": (
        lambda: png(1, 1, 8, 0, PIXEL, chunk(b"iCCP", b"a\0\0" + BOMB)),
        "too large",
    ),
    "giant PNG": (lambda: png(2**31 - 1, 2**31 - 1, 16, 6, b""), "--max-pixels"),
    "empty PNG": (lambda: png(0, 5, 8, 0, b""), "0 x 5"),
    "giant WebP canvas": (webp_canvas, "--max-pixels"),
    "giant TIFF": (lambda: patched_tiff(256, 2**32 - 1), "--max-pixels"),
    "empty TIFF": (lambda: patched_tiff(257, 0), "64 x 0"),
    "TIFF width of text": (lambda: patched_tiff(256, 64, type=2), "imagewidth is"),
    "TIFF channels": (lambda: patched_tiff(277, 60000), "failed to read"),
    "giant TIFF tile": (lambda: patched_tiff(322, 2**26, tile=(64, 64)), "tiles of 4,294,967,296"),
    "TIFF strip beyond the end": (lambda: patched_tiff(279, 2**31), "behind the file's end"),
    "TIFF strip without data": (lambda: patched_tiff(279, 0), "empty"),
    "missing TIFF strips": (lambda: patched_tiff(278, 8, compression="zlib"), "1 strips"),
    "endless TIFF pages": (endless_pages, "64 frames or pages"),
    "giant JPEG in TIFF": (giant_jpeg_in_tiff, "60000 x 60000"),
    "progressive JPEG": (many_scans, "scans"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_take_no_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile"
    content, word = HOSTILE[name]
    path.write_bytes(content())
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        pytest.skip("this system does not let a process reset its peak of memory")
    before = peak_kilobytes()
    refuses(path, word)
    assert peak_kilobytes() - before < 50_000


def peak_kilobytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def test_a_file_too_large_for_its_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(1 << 40)  # sparse: takes no space
    refuses(path, "bytes", "--max-pixels")


def test_surplus_bytes_are_not_worth_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(1, 1, 16, 0, zlib.compress(b"\0\1\1" + bytes(99))) + b"more")
    assert_allclose(load(path).pixels, [[[257 / 65535]]], rtol=1e-6)
    assert capfd.readouterr() == ("", "")
