"""What a batch needs: on which devices its workers run, how much memory, and how long it takes."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from flashdip.engine import memory, planning
from flashdip.engine.backends import resolve_device, select
from flashdip.engine.batch.worker import Station
from flashdip.engine.config import FitConfig, Precision
from flashdip.engine.errors import ConfigError
from flashdip.engine.fit import fit
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.problems import Problem
from flashdip.engine.progress import clock

if TYPE_CHECKING:
    from rich.console import Console

    from flashdip.engine.batch.pictures import PictureJob, Recipe

_SHARE = 0.9  # of the memory that is available now


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def stations(
    backend: str, device: str, configs: Iterable[FitConfig], workers: int | None, jobs: int
) -> list[Station]:
    """Return where workers run.

    On a CPU there is one for each core, with one thread: fits that share nothing make better use of
    cores than threads that wait for each other. With fewer jobs than cores, and with fewer workers
    asked for, each has more threads.

    Args:
        backend: Name of one, or "auto".
        device: Name of one; "cuda" and "auto" stand for all GPUs, where there are any.
        configs: Of the fits, which the backend must be able to run.
        workers: On a CPU; None: chosen.
        jobs: How many there are.

    Raises:
        ConfigError: The number of workers is not one, or is not for this device.
        UnavailableError: Backend or device cannot be used here.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers: expected a whole number of at least 1, got {workers}")
    found = resolve_device(device)
    for config in configs:
        select(backend, found, config)
    available = cores()
    if found.type == "cpu":
        count = workers or max(1, min(available, jobs))
        threads, more = divmod(available, count)
        shares = [max(1, threads + (index < more)) for index in range(count)]
        return [Station("cpu", backend, share) for share in shares]
    if found.index is not None:
        names = [str(found)]
    else:
        names = [f"{found.type}:{index}" for index in range(torch.accelerator.device_count())]
    if workers is not None and workers != len(names):
        raise ConfigError(
            f"workers: expected one for each device, {len(names)} of type {found.type}, got "
            f"{workers}: leave it out, or choose --device cpu"
        )
    return [Station(name, backend, max(1, available // len(names))) for name in names]


@dataclass
class Needs:
    """How much memory a worker takes, looked up once for each kind of picture.

    Attributes:
        backend: Name of one, or "auto".
        device: Of the workers.
        precision: Of most fits.
    """

    backend: str = "auto"
    device: str = "auto"
    precision: Precision = "auto"
    _known: dict[tuple[Any, ...], int] = field(default_factory=dict)

    @cached_property
    def idle(self) -> int:
        """Bytes of memory that a worker takes beside its jobs; 0: not known.

        Those of this process, once a small fit has brought the libraries that any fit uses.
        """
        small = SkipConfig(inputs=4, down=(8, 8), skip=2)
        config = FitConfig(network=small, iterations=1, precision=self.precision)
        problem = Problem(torch.zeros(1, 3, 32, 32), (3, 32, 32))
        fit(problem, config, backend=self.backend, device=self.device)
        return memory.resident() or 0

    def bytes(self, recipe: "Recipe", looks: tuple[int, int, int] | None) -> int:
        """Return the host's memory for one picture, beside the idle worker's own, in bytes.

        Args:
            recipe: How it is restored.
            looks: Its width, height and channels; None: not known.

        Returns:
            0 where it is not known, and for fits on another device than the CPU.
        """
        if looks is None or resolve_device(self.device).type != "cpu":
            return 0
        key = (recipe.identity, looks)
        if key not in self._known:
            _ = self.idle  # before this process grows by asking
            shape = recipe.shape(looks)
            plan = planning.plan(
                recipe.config, shape, backend=self.backend, device=self.device, timed=False
            )
            self._known[key] = plan.memory_bytes
        return self._known[key]


def room(workers: int, idle: int) -> int | None:
    """Return the bytes that the jobs of so many workers here may take now; None: not known.

    Args:
        workers: How many there will be.
        idle: Bytes of memory that each takes beside its jobs.
    """
    available = memory.available(torch.device("cpu"))
    return None if available is None else max(0, int(_SHARE * available) - workers * idle)


@dataclass(frozen=True)
class Group:
    """Pictures that are alike.

    Attributes:
        width, height, channels: As their files' headers say; None: not known before they are read.
        pictures: How many.
        memory_bytes: The most that a worker takes with one, its own included.
        seconds: The most that one takes a worker, estimated.
    """

    width: int | None
    height: int | None
    channels: int | None
    pictures: int
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
        for heading in ("pixels", "channels", "pictures", "memory of a worker", "at most, each"):
            table.add_column(heading, justify="right")
        for group in self.groups:
            table.add_row(
                "not known" if group.width is None else f"{group.width}x{group.height}",
                "" if group.channels is None else str(group.channels),
                str(group.pictures),
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
    recipes = {job.recipe.identity: job.recipe for job in jobs}
    memories = {(job.recipe.identity, job.looks): job.memory for job in jobs}
    rates = {each: _rate(recipes[each], counts, places[0]) for each in recipes}
    groups = []
    for (identity, looks), count in counts.items():
        recipe, rate = recipes[identity], rates[identity]
        width, height, channels = (None, None, None) if looks is None else looks
        seconds = None
        if looks is not None and rate is not None:
            seconds = rate * recipe.network_pixels(looks) * recipe.config.iterations
        taken = memories[identity, looks]
        groups.append(
            Group(width, height, channels, count, taken + idle if taken else None, seconds)
        )
    groups.sort(key=lambda group: -(group.width or 0) * (group.height or 0))
    known = [group.seconds * group.pictures for group in groups if group.seconds is not None]
    total = sum(known) / len(places) if known else None
    available = memory.available(torch.device(places[0].device))
    return BatchPlan(tuple(groups), tuple(places), available, total)


def _rate(recipe: "Recipe", counts: Counter[Any], place: Station) -> float | None:
    """Return seconds an iteration and pixel, for the size that most of a recipe's work is."""
    own = {
        looks: recipe.network_pixels(looks) * count
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
    return None if each is None else each / recipe.network_pixels(looks)
