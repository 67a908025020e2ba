"""What this machine offers a batch: workers with devices, threads and memory."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from flashdip.engine import memory, planning
from flashdip.engine.backends import resolve_device, select
from flashdip.engine.batch.worker import Station
from flashdip.engine.config import FitConfig, Precision
from flashdip.engine.errors import ConfigError, UnavailableError
from flashdip.engine.fit import fit
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.problems import Problem

if TYPE_CHECKING:
    from flashdip.engine.batch.pictures import Recipe


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def stations(
    backend: str,
    device: str,
    configs: Iterable[FitConfig],
    workers: int | None,
    jobs: int,
    *,
    idle: int = 0,
    limit: str | None = None,
) -> list[Station]:
    """Return where workers run.

    On a CPU there is one for each core, with one thread: fits that share nothing make better use of
    cores than threads that wait for each other. With fewer jobs than cores, with fewer workers
    asked for, or where idle workers would take half of the memory, each has more threads.

    Args:
        backend: Name of one, or "auto".
        device: Name of one; "cuda" and "auto" stand for all GPUs, where there are any.
        configs: Of the fits, which the backend must be able to run.
        workers: On a CPU; None: chosen.
        jobs: How many there are.
        idle: Bytes of memory that each worker takes beside its jobs.
        limit: Memory that all on the CPU may take together, such as "6GB"; None: what there is.

    Raises:
        ConfigError: The number of workers is not one, or is not for this device; or the limit.
        UnavailableError: Backend or device cannot be used here, or there is too little memory.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers: expected a whole number of at least 1, got {workers}")
    found = resolve_device(device)
    for config in configs:
        select(backend, found, config)
    available = cores()
    if found.type == "cpu":
        space = _space(limit)
        most = available if space is None or idle == 0 else min(available, space // (2 * idle))
        count = workers or max(1, min(most, jobs))
        threads, more = divmod(available, count)
        shares = [max(1, threads + (index < more)) for index in range(count)]
        room = None if space is None else space - count * idle
        if room is not None and room <= 0:
            raise UnavailableError(
                f"memory: expected more than {planning.size(count * idle)} for {count} worker(s), "
                f"got {planning.size(space or 0)}: free some, or take fewer (--workers)"
            )
        part = None if room is None else room // count
        return [Station("cpu", backend, share, room=room, share=part) for share in shares]
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
        small = SkipConfig(inputs=16, down=(16, 32, 32), skip=4, upsample="nearest")
        config = FitConfig(network=small, iterations=1, precision=self.precision)
        problem = Problem(torch.zeros(1, 3, 64, 64), (3, 64, 64))
        fit(problem, config, backend=self.backend, device=self.device)
        return memory.resident() or 0

    def bytes(self, recipe: "Recipe", looks: tuple[int, int, int] | None) -> int:
        """Return the host's memory for one picture as a whole, beside the idle worker's, in bytes.

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
            whole = planning.plan(
                recipe.config,
                shape,
                backend=self.backend,
                device=self.device,
                timed=False,
                factor=None,
            )
            self._known[key] = whole.memory_bytes
        return self._known[key]


def _space(limit: str | None) -> int | None:
    """Return the bytes of memory that a batch may take on this machine; None: not known."""
    there = memory.available(torch.device("cpu"))
    if limit is None:
        return there
    most = planning.bytes_of(limit)
    return most if there is None else min(most, there)
