"""Fits of pictures that do not fit into memory: tile by tile, and joined.

The first tile begins with random weights, each other one with those of its neighbour and with fewer
iterations. All have one seed, and the picture's one range and noise level. A tile that is done is
published in a folder; a fit that was stopped, in whatever way, goes on there.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from flashdip.engine.checkpoint import fingerprint
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import DivergedError, InputError, OutputError, StoppedError
from flashdip.engine.events import Callback, Noted
from flashdip.engine.files import atomic, one_line
from flashdip.engine.fit import Place, check, fit, measurement, peak_memory
from flashdip.engine.metrics import decibels, psnr
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result, plain_picture
from flashdip.engine.tiling import Tile, Tiling, cut
from flashdip.engine.warm import Init, warm

_NAME = "tile-"  # how the files in the folder begin


@dataclass(frozen=True)
class Published:
    """A tile that is done: a file with its image and weights.

    Attributes:
        path: The file.
        fingerprint: Of what decides its result.
        record: What `result.json` would hold of the tile's own fit.
    """

    path: Path
    fingerprint: str
    record: dict[str, Any]

    def image(self) -> Tensor:
        """Read the image, [C, h, w]."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            image: Tensor = file.get_tensor("image")
        return image


def fit_tiled(
    problem: Problem,
    config: FitConfig,
    tiling: Tiling,
    *,
    backend: str = "auto",
    device: str = "auto",
    truth: Tensor | None = None,
    callback: Callback | None = None,
    folder: str | Path | None = None,
    init: Init | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    notes: Sequence[str] = (),
) -> Result:
    """Fit a problem tile by tile; see `flashdip.engine.fit.fit` for what is not said here.

    Args:
        problem: With an operator that acts nearby: Identity, Mask or Downsample.
        config: How the first tile is fitted; see `Tiling.iterations` for the others.
        tiling: How it is cut.
        backend, device, truth, notes: As of `fit`.
        callback: Receives the events of each tile's fit, one after another.
        folder: Where tiles are published, to go on from; made if missing. None: a temporary one.
        init: What the first tile begins with.
        interrupted: As of `fit`.

    Returns:
        A result without weights; its record has "tiles", with how far they disagree where they
        overlap.

    Raises:
        InputError: Problem and tiles do not go together, or the folder holds another fit's.
        StoppedError: It was interrupted; what is done is in the folder.
        DivergedError: A tile diverged before it had any image.
        OutputError: The folder cannot be written to.
    """
    tell: Callback = callback or (lambda event: None)
    check(problem, truth)
    tiling.check(problem)
    place = Place.choose(problem, config, backend, device, notes)
    begins = None if init is None else warm(init, place.config, tiling.image_side).digest
    tiles = tiling.tiles
    done: list[Published] = []
    with ExitStack() as stack:
        if folder is None:
            folder = stack.enter_context(TemporaryDirectory(prefix="flashdip-tiles-"))
        folder = Path(folder)
        _make(folder)
        for tile in tiles:
            label = f"tile {tile.index + 1} of {len(tiles)}"
            part = cut(problem, tiling, tile)
            beside = tiling.neighbour(tile)
            near = None if beside is None else done[beside.index]
            count = tiling.iterations(tile, config.iterations)
            own = replace(place, config=replace(place.config, iterations=count))
            identity = _identity(part, own, begins if near is None else near.fingerprint)
            path = folder / f"{_NAME}{tile.index:05}.safetensors"
            found = _read(path, identity)
            if found is not None:
                tell(Noted(f"{label} is done already"))
                done.append(found)
                continue
            rows, columns = tiling.window(tile)
            running = path.with_suffix(".ckpt")
            try:
                result = fit(
                    part,
                    own.config,
                    backend=backend,
                    device=device,
                    truth=None if truth is None else truth[:, rows, columns].contiguous(),
                    callback=callback,
                    checkpoint=running,
                    init=init if near is None else near.path,
                    interrupted=interrupted,
                    notes=(
                        *(place.notes if tile.index == 0 else ()),
                        f"{label}: from row {rows.start}, column {columns.start}",
                    ),
                )
            except DivergedError as error:
                raise DivergedError(f"{label}: {error}") from None
            if result.stop_reason == "interrupted":
                raise StoppedError(
                    f"stopped in {label}: what is done is in {one_line(folder)}; the same command "
                    "goes on from there"
                )
            if init is None:
                del result.weights["z"]  # it is the seed's, and as large as many images
            done.append(_publish(path, result, identity))
            running.unlink(missing_ok=True)
        result = _joined(problem, place, tiling, done, truth)
        tell(Noted(str(result.record["notes"][-1])))
        return result


def remove_tiles(folder: Path) -> None:
    """Remove what `fit_tiled` left in a folder, and the folder if nothing else is in it."""
    for path in (*folder.glob(f"{_NAME}*.safetensors"), *folder.glob(f"{_NAME}*.ckpt")):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _joined(
    problem: Problem, place: Place, tiling: Tiling, done: list[Published], truth: Tensor | None
) -> Result:
    """Return the result of all tiles together."""

    def image_of(tile: Tile) -> Tensor:
        return done[tile.index].image()

    drawn = tiling.blend(problem.shape[0], image_of)
    seams = tiling.disagreement(image_of)
    image = problem.paste(drawn[None])[0].contiguous()
    records = [tile.record for tile in done]
    worst = max(seams, key=lambda seam: seam.squared)
    total = sum(seam.squared * seam.values for seam in seams) / sum(seam.values for seam in seams)
    agreement, least = decibels(total), decibels(worst.squared)
    height, width = tiling.image_side
    note = (
        f"{len(done)} tiles of {width}x{height} agree to {agreement:.1f} dB where they overlap, at "
        f"worst to {least:.1f} dB (tiles {worst.tiles[0] + 1} and {worst.tiles[1] + 1})"
    )
    reasons = Counter(str(record["stop_reason"]) for record in records)
    reason = "diverged" if "diverged" in reasons else reasons.most_common(1)[0][0]

    def sum_of(key: str) -> Any:
        return sum(record[key] for record in records)

    record = records[0] | {
        "psnr": None if truth is None else psnr(image, truth.cpu()),
        **{key: sum_of(key) for key in ("iterations", "best_iteration", "retries")},
        "stop_reason": reason,
        **{key: sum_of(key) for key in ("seconds_setup", "seconds_fit")},
        "iterations_per_second": sum_of("iterations") / max(sum_of("seconds_fit"), 1e-9),
        "peak_memory_bytes": peak_memory(place.device),
        "sigma": problem.sigma,
        "shape": list(problem.shape),
        "notes": [*place.notes, note],
        "config": place.config.record(),
        "history": {name: [] for name in records[0]["history"]},
        "tiles": {
            "grid": [len(tiling.rows), len(tiling.columns)],
            "side": [height, width],
            "overlap": tiling.factor * tiling.overlap,
            "iterations": [record["iterations"] for record in records],
            "stop_reasons": [record["stop_reason"] for record in records],
            "agreement_db": agreement,
            "least_agreement_db": least,
            "least_agreeing": list(worst.tiles),
        },
    }
    measured = measurement(problem, drawn[None])
    return Result(image, record, {"image": image}, plain_picture(image), measured)


def _identity(problem: Problem, place: Place, start: str | None) -> str:
    name, device = place.backend.name, str(place.device)
    return fingerprint(problem, place.config, name, device, place.precision, start)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{one_line(folder)}: expected a folder for the tiles, got {error.strerror}: choose "
            "another one (--checkpoint)"
        ) from None


def _publish(path: Path, result: Result, identity: str) -> Published:
    """Write image, weights and record, all or nothing."""
    from safetensors.torch import save

    notes = {
        "flashdip": json.dumps(result.record["config"]),
        "tile": json.dumps({"fingerprint": identity, "record": result.record}),
    }
    tensors = {name: tensor.contiguous() for name, tensor in result.weights.items()}
    with atomic(path, force=True) as temporary:
        # Not safetensors' own writer, which hides why a write failed.
        temporary.write_bytes(save(tensors, notes))
    return Published(path, identity, result.record)


def _read(path: Path, identity: str) -> Published | None:
    """Return what was published there; None if nothing was.

    Raises:
        InputError: It is no tile, or another fit's.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads((file.metadata() or {})["tile"])
        found = Published(path, notes["fingerprint"], notes["record"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        raise InputError(
            f"checkpoint: {one_line(path)} is not a tile; give another folder or delete it"
        ) from None
    if found.fingerprint != identity:
        raise InputError(
            f"checkpoint: {one_line(path)} belongs to another picture, other settings or another "
            "backend; give another folder or delete it"
        )
    return found
