"""What a batch needs, before it begins: workers, memory and time."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from flashdip.engine import memory, planning
from flashdip.engine.batch.worker import Station
from flashdip.engine.progress import clock

if TYPE_CHECKING:
    from rich.console import Console

    from flashdip.engine.batch.pictures import PictureJob, Recipe


@dataclass(frozen=True)
class Group:
    """Pictures that are alike.

    Attributes:
        width, height, channels: As their files' headers say; None: not known before they are read.
        pictures: How many.
        tiles: That each is cut into, because it does not fit into memory or is to be; None: none.
        memory_bytes: The most that a worker takes with one, its own included; None: not known.
        seconds: The most that one takes a worker, estimated.
    """

    width: int | None
    height: int | None
    channels: int | None
    pictures: int
    tiles: int | None
    memory_bytes: int | None
    seconds: float | None


@dataclass(frozen=True)
class BatchPlan:
    """What a batch needs.

    Attributes:
        groups: Of pictures, the largest first.
        workers: Where they run.
        available_bytes: Memory there is; None: not known.
        seconds: The most that pictures of known size take together, estimated; stopping rules
            mostly end fits sooner. None: no size is known.
    """

    groups: tuple[Group, ...]
    workers: tuple[Station, ...]
    available_bytes: int | None
    seconds: float | None

    def record(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        pictures = sum(group.pictures for group in self.groups)
        return {"pictures": pictures} | asdict(self)

    def show(self, console: "Console") -> None:
        """Print it as a table and a line."""
        from rich.table import Table

        table = Table(box=None, pad_edge=False, highlight=False)
        for heading in ("pixels", "channels", "pictures", "tiles", "memory", "at most, each"):
            table.add_column(heading, justify="right")
        for group in self.groups:
            table.add_row(
                "not known" if group.width is None else f"{group.width}x{group.height}",
                "" if group.channels is None else str(group.channels),
                str(group.pictures),
                "" if group.tiles is None else str(group.tiles),
                "" if group.memory_bytes is None else planning.size(group.memory_bytes),
                "" if group.seconds is None else _time(group.seconds),
            )
        console.print(table)
        places = Counter((station.device, station.threads) for station in self.workers)
        where = ", ".join(
            f"{count} on {device} with {threads} thread(s)"
            for (device, threads), count in places.items()
        )
        time = "" if self.seconds is None else f"; at most about {_time(self.seconds)} in all"
        console.print(f"workers: {where}{time}")


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def plan(jobs: Sequence["PictureJob"], places: Sequence[Station], idle: int) -> BatchPlan:
    """Plan a batch, without running it; a few iterations are timed for each of its configs.

    Args:
        jobs: All of them.
        places: Where its workers run.
        idle: Bytes of memory that a worker takes beside its jobs.

    Raises:
        UnavailableError: A backend cannot run there.
    """
    counts = Counter((job.recipe.identity, job.looks) for job in jobs)
    samples = {(job.recipe.identity, job.looks): job for job in jobs}
    rates = {
        identity: _rate(job.recipe, counts, places[0]) for (identity, _), job in samples.items()
    }
    groups = [
        _group(samples[kind], count, rates[kind[0]], places[0], idle)
        for kind, count in counts.items()
    ]
    groups.sort(key=lambda group: -(group.width or 0) * (group.height or 0))
    known = [group.seconds * group.pictures for group in groups if group.seconds is not None]
    total = sum(known) / len(places) if known else None
    available = memory.available(torch.device(places[0].device))
    return BatchPlan(tuple(groups), tuple(places), available, total)


def _group(job: "PictureJob", count: int, rate: float | None, place: Station, idle: int) -> Group:
    """Plan pictures like that of a job, for a worker with so much time an iteration and pixel."""
    if job.looks is None or rate is None:
        return Group(None, None, None, count, None, None, None)
    recipe, taken, tiles = job.recipe, job.memory, None
    pixels = recipe.network_pixels(recipe.shape(job.looks))
    iterations = recipe.config.iterations * recipe.config.runs
    tile = recipe.options.get("tile")
    if tile is not None or (place.room is not None and planning.MARGIN * taken > place.room):
        found = planning.plan(
            recipe.config,
            recipe.shape(job.looks),
            backend=place.backend,
            device=place.device,
            timed=False,
            factor=recipe.factor,
            tile=tile,
            limit=None if place.room is None else place.room + (memory.resident() or 0),
        )
        taken, iterations = found.memory_bytes, found.iterations
        pixels = recipe.network_pixels(found.fitted)
        tiles = None if found.tiling is None else len(found.tiling.tiles)
    width, height, channels = job.looks
    whole = taken + idle if taken else None
    return Group(width, height, channels, count, tiles, whole, rate * pixels * iterations)


def _rate(recipe: "Recipe", counts: Counter[Any], place: Station) -> float | None:
    """Return seconds an iteration and pixel, for the size that most of a recipe's work is."""
    own = {
        looks: recipe.network_pixels(recipe.shape(looks)) * count
        for (identity, looks), count in counts.items()
        if identity == recipe.identity and looks is not None
    }
    if not own:
        return None
    looks = max(own, key=lambda each: own[each])
    threads = torch.get_num_threads()
    torch.set_num_threads(place.threads)
    try:
        found = planning.plan(
            recipe.config, recipe.shape(looks), backend=place.backend, device=place.device
        )
    finally:
        torch.set_num_threads(threads)
    each = found.seconds_per_iteration
    return None if each is None else each / recipe.network_pixels(found.fitted)
