"""One case: the network's fit and the rivals', each kept in its own file so that a run can go on.

In the folder of a picture lie `PRESET.json` and `PRESET.png` for each preset that was run, and
`rivals.json` with a picture for each method. What is there and was made in the same way is not made
again; a fit that was interrupted goes on from its checkpoint.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from flashdip.bench.parity.rivals import rivals
from flashdip.bench.parity.suites import Case, Pixels, in_8_bits
from flashdip.engine import tasks
from flashdip.engine.errors import OutputError
from flashdip.engine.events import Callback
from flashdip.engine.files import atomic
from flashdip.engine.images import as_picture, load, save
from flashdip.engine.task_options import FitOptions, config_of

PUBLISHED = "published"  # stands for a suite's own published preset


class InterruptedFitError(Exception):
    """A fit was ended before it was done; its checkpoint is kept."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What is known about a case.

    Attributes:
        case: The picture.
        record: Of our fit: "decibels", "seconds", "iterations_per_second", "iterations", ...
        image: Ours, [H, W, C] in [0, 1].
        rivals: By method: "decibels" and "seconds".
        images: Of the rivals.
    """

    case: Case
    record: dict[str, Any]
    image: Pixels
    rivals: dict[str, dict[str, float]]
    images: dict[str, Pixels]


def run(
    case: Case,
    folder: Path,
    options: FitOptions,
    *,
    bm3d: bool = False,
    callback: Callback | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Restore a picture by all methods, or read what an earlier run left.

    Args:
        case: The picture.
        folder: Where everything is kept; a folder for each suite and picture is made in it.
        options: Of the fit; the preset `PUBLISHED` is the suite's own.
        bm3d: Run BM3D too.
        callback: Receives the events of the fit.
        interrupted: Asked between iterations.

    Raises:
        InterruptedFitError: The fit was ended early.
        OutputError: Something cannot be written.
    """
    place = folder / case.suite.name / case.name
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{place}: cannot be made: {error.strerror}") from None
    others, images = _rivals(case, place, bm3d)
    record, image = _fit(case, place, options, callback, interrupted)
    return Outcome(case, record, image, others, images)


def _fit(
    case: Case,
    place: Path,
    options: FitOptions,
    callback: Callback | None,
    interrupted: Callable[[], bool],
) -> tuple[dict[str, Any], Pixels]:
    suite, name = case.suite, options["preset"]
    options = options | {"preset": suite.preset if name == PUBLISHED else name}
    config = config_of(suite.task, options).record()
    where = {key: options.get(key, "auto") for key in ("backend", "device")}
    identity = _identity(case, {"config": config, "options": dict(suite.options)} | where)
    picture = place / f"{name}.png"
    if (kept := _kept(place / f"{name}.json", identity)) and picture.exists():
        return kept, load(picture).pixels

    checkpoint = place / f"{name}-{identity[:12]}.ckpt"
    own: dict[str, Any] = {"callback": callback, "interrupted": interrupted}
    result = getattr(tasks, suite.task)(
        case.given,
        truth=as_picture(case.truth),
        checkpoint=checkpoint,
        **(own | dict(options) | dict(suite.options)),
    )
    if result.stop_reason == "interrupted":
        raise InterruptedFitError(f"{case.name}: ended early; the same command goes on from there")
    image = np.moveaxis(result.image.numpy(), 0, 2)
    save(picture, as_picture(in_8_bits(image)), force=True)
    record = {key: value for key, value in result.record.items() if key != "history"}
    record |= {"decibels": case.decibels(image), "identity": identity}
    record["seconds"] = record["seconds_setup"] + record["seconds_fit"]
    _write(place / f"{name}.json", record)
    checkpoint.unlink(missing_ok=True)
    return record, load(picture).pixels


def _rivals(
    case: Case, place: Path, bm3d: bool
) -> tuple[dict[str, dict[str, float]], dict[str, Pixels]]:
    identity = _identity(case, {"bm3d": bm3d})
    kept = _kept(place / "rivals.json", identity)
    if not kept or not all((place / f"{name}.png").exists() for name in kept["methods"]):
        found = rivals(case, bm3d=bm3d)
        kept = {"identity": identity, "methods": {}}
        for name, rival in found.items():
            save(place / f"{name}.png", as_picture(in_8_bits(rival.image)), force=True)
            decibels = case.decibels(rival.image)
            kept["methods"][name] = {"decibels": decibels, "seconds": rival.seconds}
        _write(place / "rivals.json", kept)
    return kept["methods"], {name: load(place / f"{name}.png").pixels for name in kept["methods"]}


def _identity(case: Case, how: Mapping[str, Any]) -> str:
    """Return a digest of what a result follows from: input, truth, settings, this version."""
    settings = json.dumps({**how, "version": version("flashdip")}, sort_keys=True)
    digest = hashlib.sha256(settings.encode())
    for pixels in (case.observed, case.truth):
        digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def _kept(path: Path, identity: str) -> dict[str, Any] | None:
    """Return the record of an earlier run, if it is there, whole, and of the same identity."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = isinstance(record, dict) and record.get("identity") == identity
    return record if same else None


def _write(path: Path, record: Mapping[str, Any]) -> None:
    with atomic(path, force=True) as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
