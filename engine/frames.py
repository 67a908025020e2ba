"""Sequences of pictures: folders of frames, the pages of a TIFF, channels of a picture, videos.

What comes in goes out likewise. Frames are read one at a time; those of a float TIFF share one
range. Videos need the extra `video` (imageio with PyAV) and have 8 bits and no alpha.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from importlib import util
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from flashdip.engine import images, tiff
from flashdip.engine.errors import ImageError, InputError, OutputError, UnavailableError
from flashdip.engine.files import atomic, one_line
from flashdip.engine.formats import Stored
from flashdip.engine.images import SUFFIXES, Picture
from flashdip.engine.picture import dress, undress
from flashdip.engine.pixels import span

VIDEOS = (".mp4", ".mkv", ".mov", ".avi", ".webm")
_TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_RATE = 25.0  # frames a second, of a video that does not say


@dataclass(frozen=True)
class Frames:
    """Pictures in order.

    Attributes:
        kind: "folder", "pages", "channels" or "video".
        names: Of the frames, as files of a folder are called; empty for a video.
        read: Returns the pictures, each time from the first one on.
        like: The picture that channels are of; else None.
        rate: Frames a second, of a video.
    """

    kind: str
    names: tuple[str, ...]
    read: Callable[[], Iterator[Picture]]
    like: Picture | None = None
    rate: float = _RATE


def open_frames(path: Path, max_pixels: int) -> Frames:
    """Open a sequence.

    Args:
        path: A folder, whose pictures are taken in the order of the numbers in their names; a TIFF
            of several pages; a picture of several channels; or a video.
        max_pixels: Refuse larger frames.

    Raises:
        ImageError: It cannot be read, or is one frame only.
        UnavailableError: It is a video, and the extra is not installed.
    """
    if path.is_dir():
        return _folder(path, max_pixels)
    if path.suffix.lower() in VIDEOS:
        return _video(path)
    with images.named(path):
        data = images.read(path, max_pixels)
        pages = _pages(path, data, max_pixels) if data.startswith(_TIFFS) else None
    return pages or _channels(path, max_pixels)


def check_frames(path: Path, frames: Frames, *, force: bool) -> None:
    """Check that frames of this kind can be written there.

    Raises:
        InputError: The name is of another kind of thing.
        OutputError: It exists and `force` is not set.
    """
    suffix, name = path.suffix.lower(), one_line(path)
    expected = {
        "folder": "the name of a folder, as the frames come from one",
        "pages": "a name that ends in .tif, as the frames are a TIFF's pages",
        "channels": f"a name that ends in {', '.join(SUFFIXES)}",
        "video": f"a name that ends in {', '.join(VIDEOS)}, or of a folder",
    }[frames.kind]
    right = {
        "folder": suffix not in (*SUFFIXES, *VIDEOS),
        "pages": SUFFIXES.get(suffix) == "TIFF",
        "channels": suffix in SUFFIXES,
        "video": suffix in VIDEOS,
    }[frames.kind]
    if not right:
        raise InputError(
            f"{name}: expected {expected}, got {suffix or 'no suffix'}: choose another"
        )
    if path.exists() and not force:
        raise OutputError(
            f"{name}: expected a new {'folder' if frames.kind == 'folder' else 'file'}, got one "
            "that exists: choose another name, or replace what is in it with --force"
        )


def write_frames(path: Path, frames: Frames, pictures: Iterable[Picture], *, force: bool) -> None:
    """Write restored frames as the sequence came.

    Args:
        path: See `check_frames`.
        frames: Where they came from.
        pictures: In order, one for each.
        force: Whether what exists may be replaced.

    Raises:
        OutputError: It cannot be written.
    """
    if frames.kind == "folder":
        try:
            path.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"{one_line(path)}: cannot be made: {error.strerror}") from None
        for name, picture in zip(frames.names, pictures, strict=True):
            images.save(path / name, picture, force=force)
    elif frames.kind == "channels":
        assert frames.like is not None
        pixels = np.concatenate([picture.pixels for picture in pictures], axis=2)
        images.save(path, frames.like.with_pixels(pixels), force=force)
    else:
        with atomic(path, force=force) as temporary:
            if frames.kind == "pages":
                _write_pages(temporary, len(frames.names), iter(pictures))
            else:
                _write_video(temporary, frames.rate, pictures)


def _folder(path: Path, max_pixels: int) -> Frames:
    files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file()]
    files.sort(key=lambda file: _natural(file.name))
    if len(files) < 2:
        raise ImageError(
            f"{one_line(path)}: expected a folder of at least two pictures "
            f"({', '.join(SUFFIXES)}), got {len(files)}: name another folder"
        )

    def read() -> Iterator[Picture]:
        return (images.load(file, max_pixels=max_pixels) for file in files)

    return Frames("folder", tuple(file.name for file in files), read)


def _natural(name: str) -> list[tuple[int, str]]:
    """Return what sorts names by the numbers in them: 2 before 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _pages(path: Path, data: bytes, max_pixels: int) -> Frames | None:
    """Return the pages of a TIFF; None if there is only one."""

    def decoded() -> Iterator[Stored]:
        with images.named(path), images.whole("TIFF"):
            yield from tiff.decode_pages(data, max_pixels)

    count = 0
    extremes: list[float] = []
    for page in decoded():
        count += 1
        finite = page.values[np.isfinite(page.values)]
        if finite.size:
            extremes += float(finite.min()), float(finite.max())
    ends = span(np.array(extremes))

    def read() -> Iterator[Picture]:
        return (dress(page, "TIFF", ends) for page in decoded())

    if count < 2:
        return None
    return Frames("pages", tuple(f"page {index + 1}" for index in range(count)), read)


def _write_pages(path: Path, count: int, pictures: Iterator[Picture]) -> None:
    first = undress(next(pictures), "TIFF", "page 1")
    rest = (undress(picture, "TIFF", "page") for picture in pictures)

    def pages() -> Iterator[Stored]:
        yield first
        yield from rest

    tiff.encode_pages(str(path), pages(), count * first.values.nbytes)


def _channels(path: Path, max_pixels: int) -> Frames:
    whole = images.load(path, max_pixels=max_pixels)
    count = whole.pixels.shape[2]
    if count < 2:
        raise ImageError(
            f"{one_line(path)}: expected a sequence (a folder, a TIFF of several pages, several "
            "channels, a video), got one grey picture: leave out --sequence"
        )

    def read() -> Iterator[Picture]:
        for index in range(count):
            one = replace(whole, rgb_first=False, premultiplied=False)
            yield one.with_pixels(whole.pixels[:, :, index : index + 1], alpha=None)

    names = tuple(f"channel {index + 1}" for index in range(count))
    return Frames("channels", names, read, like=whole)


def _video(path: Path) -> Frames:
    name = one_line(path)
    if util.find_spec("av") is None:
        raise UnavailableError(
            f"{name}: videos need imageio and PyAV, which are not installed: "
            "pip install 'flashdip[video]', or give the frames as a folder"
        )
    import imageio.v3 as imageio

    def read() -> Iterator[Picture]:
        with images.named(path), images.whole("video"):
            for frame in imageio.imiter(path, plugin="pyav"):
                yield dress(Stored(np.asarray(frame)), "")

    with images.named(path), images.whole("video"):
        if len(list(islice(imageio.imiter(path, plugin="pyav"), 2))) < 2:
            raise ImageError("expected a video of at least two frames, got fewer")
        found: dict[str, Any] = imageio.immeta(path, plugin="pyav")
    return Frames("video", (), read, rate=float(found.get("fps") or _RATE))


def _write_video(path: Path, rate: float, pictures: Iterable[Picture]) -> None:
    import imageio.v3 as imageio

    codec = "libvpx-vp9" if path.suffix.lower() == ".webm" else "libx264"
    with imageio.imopen(path, "w", plugin="pyav") as file:
        for index, picture in enumerate(pictures):
            values = undress(replace(picture, dtype="uint8"), "PNG", "frame").values
            if index == 0:
                # Colour at half the resolution, as players expect it, needs even sides.
                odd = values.shape[0] % 2 or values.shape[1] % 2
                pixels = "yuv444p" if odd else "yuv420p"
                file.init_video_stream(codec, fps=rate, pixel_format=pixels)
            file.write_frame(values if values.shape[2] == 3 else np.repeat(values, 3, 2))
