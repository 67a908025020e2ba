"""What a batch would need: on which devices its workers run, with how many threads each."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flashdip.engine.batch.worker import Station
from flashdip.engine.errors import ConfigError

if TYPE_CHECKING:
    from flashdip.engine.config import FitConfig


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def stations(
    backend: str, device: str, configs: Iterable["FitConfig"], workers: int | None, jobs: int
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
    import torch

    from flashdip.engine.backends import resolve_device, select

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
