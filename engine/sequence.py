"""Pictures in order, each fitted from the weights of the one before: frames, slices, channels.

The first one begins with random weights. What is much like the one before it needs fewer
iterations: it may do `WARM_SHARE` of them, and stopping rules end it sooner still.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from flashdip.engine import images, tasks
from flashdip.engine.errors import ConfigError, InputError, OutputError
from flashdip.engine.events import Callback, Noted
from flashdip.engine.files import one_line
from flashdip.engine.images import MAX_PIXELS, Picture, as_picture
from flashdip.engine.presets import TASKS
from flashdip.engine.result import PICTURES, Result
from flashdip.engine.task_options import Image, config_of
from flashdip.engine.tiling import WARM_SHARE
from flashdip.engine.warm import Init, Warm

_FRAME, _WEIGHTS = "frame-", "fit.safetensors"
_ANY = 1 << 40  # pixels of our own files
# Options that do not decide a frame's result, or are part of the config.
_BESIDE = {"callback", "interrupted", "accept", "planned", "tiles", "preset", "iterations", "seed"}
_BESIDE |= {"settings", "stop", "budget", "precision", "max_pixels", "truth", "memory"}


def sequence(frames: Iterable[Image], task: str = "denoise", **options: Any) -> Iterator[Result]:
    """Restore pictures in order, each beginning with the weights of the one before.

    A picture whose size or channels are not those of the one before it begins anew, and so does
    one that is tiled.

    Args:
        frames: Pictures, one after another; they may be made as they are asked for.
        task: "denoise", "superres", "inpaint", "dejpeg" or "restore".
        **options: What the function of that name takes, such as `sigma`, `factor`, `mask`; see
            `FitOptions`. `init` is for the first picture. A `checkpoint` is a folder here, in which
            pictures that are done are kept, to go on from.

    Yields:
        The results, in order; after one that was interrupted there are no more. The record's
        "sequence" has the frame's number, and how many fewer iterations it took than the first.

    Raises:
        InputError: A picture or an option cannot be used; the message says why.
        OutputError: The folder cannot be written to.
    """
    if task not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    if options.get("truth") is not None:
        raise ConfigError("truth: expected none with a sequence, got one: compare its results")
    folder = options.pop("checkpoint", None)
    return _results(frames, task, None if folder is None else Path(folder), options)


def savings(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what beginning with weights saved, over the results' records.

    Returns:
        "frames"; "cold" and "warm", how many began with random weights and with others;
        "cold_iterations" and "warm_iterations", their means (None without any); "saved", the share
        of the iterations that a warm one does without.
    """
    cold = [r["iterations"] for r in records if r["sequence"]["saved"] is None]
    warm = [r["iterations"] for r in records if r["sequence"]["saved"] is not None]

    def mean(counts: list[int]) -> float | None:
        return sum(counts) / len(counts) if counts else None

    before, after = mean(cold), mean(warm)
    return {
        "frames": len(records),
        "cold": len(cold),
        "warm": len(warm),
        "cold_iterations": before,
        "warm_iterations": after,
        "saved": None if before is None or after is None else 1 - after / before,
    }


def kept_pictures(folder: Path, count: int) -> Iterator[Picture]:
    """Return the restored pictures that a sequence of so many frames has kept in a folder."""
    for index in range(count):
        frame = folder / f"{_FRAME}{index:05}"
        name = next(name for name in PICTURES if (frame / name).exists())
        yield images.load(frame / name, max_pixels=_ANY)


def remove_frames(folder: Path) -> None:
    """Remove what `sequence` kept in a folder, and the folder if nothing else is in it."""
    for pattern in (f"{_FRAME}*", f".{_FRAME}*"):
        for path in folder.glob(pattern):
            _remove(path)
    with suppress(OSError):
        folder.rmdir()


def _results(
    frames: Iterable[Image], task: str, folder: Path | None, options: dict[str, Any]
) -> Iterator[Result]:
    config = config_of(task, options)  # type: ignore[arg-type]
    first = options.pop("init", None)
    settings = {k: v for k, v in (options.get("settings") or {}).items() if k != "iterations"}
    tell: Callback = options.get("callback") or (lambda event: None)
    if folder is not None:
        _make(folder)
    before: Result | None = None
    last = _begun(first)  # then the fingerprint of the frame before
    cold = 0  # iterations of the latest frame that began with random weights
    for index, frame in enumerate(frames):
        limit = options.get("max_pixels", MAX_PIXELS)
        picture = as_picture(frame, f"frame {index + 1}", limit)
        warm = before is not None and _follows(picture, before)
        if index and not warm:
            tell(Noted(f"frame {index + 1} cannot begin with the weights of the one before"))
        count = max(1, round(WARM_SHARE * config.iterations)) if warm else config.iterations
        own = options | {"iterations": count, "settings": settings}
        last = _fingerprint(picture, task, own, last)
        path = None if folder is None else folder / f"{_FRAME}{index:05}"
        result = None if path is None else _kept(path, last)
        if result is None:
            running = None if path is None else path.with_suffix(".ckpt")
            init = before if warm else (first if index == 0 else None)
            result = getattr(tasks, task)(picture, init=init, checkpoint=running, **own)
            place = {
                "frame": index + 1,
                "size": list(picture.pixels.shape),
                "saved": cold - result.iterations if warm else None,
                "fingerprint": last,
            }
            result = replace(result, record=result.record | {"sequence": place})
            if result.stop_reason == "interrupted":
                yield result
                return
            if path is not None and running is not None:
                _keep(path, result)
                _remove(running)
        else:
            tell(Noted(f"frame {index + 1} is done already"))
        cold = cold if warm else result.iterations
        if folder is not None and index:  # only the next frame needs weights
            (folder / f"{_FRAME}{index - 1:05}" / _WEIGHTS).unlink(missing_ok=True)
        before = result
        yield result


def _begun(init: Init | None) -> str:
    """Return what tells one beginning from another."""
    if isinstance(init, Result):
        return Warm("a result", init.weights).digest
    return "" if init is None else str(init)


def _follows(picture: Picture, before: Result) -> bool:
    """Return whether a picture can begin with the weights of the one before."""
    same = list(picture.pixels.shape) == before.record["sequence"]["size"]
    return same and "tiles" not in before.record


def _fingerprint(picture: Picture, task: str, options: Mapping[str, Any], last: str) -> str:
    """Return a hash of what decides a frame's result: it, the options, and the frame before."""
    config = config_of(task, options)  # type: ignore[arg-type]
    digest = hashlib.sha256(json.dumps([task, config.record(), last]).encode())
    for name in sorted(options.keys() - _BESIDE):
        value = options[name]
        if isinstance(value, np.ndarray | Tensor):
            value = np.asarray(value).tobytes()
        elif isinstance(value, Picture):
            value = value.pixels.tobytes()
        digest.update(f"{name}={value!r};".encode())
    for pixels in (picture.pixels, picture.alpha):
        if pixels is not None:
            digest.update(repr(pixels.shape).encode())
            digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{one_line(folder)}: expected a folder for the frames, got {error.strerror}: choose "
            "another one (--checkpoint)"
        ) from None


def _keep(path: Path, result: Result) -> None:
    """Save a result in a folder, all or nothing."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        replace(result, measurement={}).save(temporary)
        temporary.rename(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"{one_line(path)}: cannot be written: {error.strerror}") from None


def _kept(path: Path, fingerprint: str) -> Result | None:
    """Return what `_keep` saved there; None if nothing was.

    Raises:
        InputError: It is something else, or another sequence's.
    """
    if not path.exists():
        return None
    try:
        if (path / _WEIGHTS).exists():
            result = Result.load(path)
        else:
            record = json.loads((path / "result.json").read_text())
            picture = images.load(path / Path(record.pop("picture")).name, max_pixels=_ANY)
            result = Result(picture.tensor()[0], record, {}, picture)
        own = result.record["sequence"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"checkpoint: {one_line(path)} is not a frame ({one_line(error, 100)}); give another "
            "folder or delete it"
        ) from None
    if own != fingerprint:
        raise InputError(
            f"checkpoint: {one_line(path)} belongs to another sequence or other settings; give "
            "another folder or delete it"
        )
    return result


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
