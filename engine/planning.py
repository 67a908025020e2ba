"""What a fit needs on a device, before it begins: memory, and time.

    plan = flashdip.engine.planning.plan(config, (3, 4000, 6000))
    plan.memory_bytes, plan.available_bytes, plan.seconds

Memory is what the backend counts (`Backend.memory`). Time is that of a few iterations on small
images: a convolution's operations are in proportion to the pixels, what else a step does is not, so
that two sizes give both shares.
"""

import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from flashdip.engine import memory
from flashdip.engine.backends import resolve_device, select
from flashdip.engine.backends.base import Backend
from flashdip.engine.config import FitConfig
from flashdip.engine.problems import Problem
from flashdip.engine.progress import clock
from flashdip.kernels.memory import kept_pages

CALIBRATION_SIDES = (128, 256)  # of the images that are timed, where the picture is not smaller
_TIMED = 3  # goes, the fastest of which counts


@dataclass(frozen=True)
class Plan:
    """What a fit needs.

    Attributes:
        backend: The name of the one that would run.
        device: Where.
        precision: What activations are stored in.
        shape: Of the image: channels, height, width.
        memory_bytes: The most of the device's memory that the fit takes, beside what the process
            (see `flashdip.engine.memory.resident`) and the picture have taken.
        available_bytes: What may still be taken there; None where nothing tells.
        iterations: The most that the config allows.
        seconds_per_iteration: Estimated; None where it was not asked for.
    """

    backend: str
    device: str
    precision: str
    shape: tuple[int, int, int]
    memory_bytes: int
    available_bytes: int | None
    iterations: int
    seconds_per_iteration: float | None = None

    @property
    def fits(self) -> bool:
        """Whether there is memory for it, as far as one can tell."""
        return self.available_bytes is None or self.memory_bytes <= self.available_bytes

    @property
    def seconds(self) -> float | None:
        """Estimated time of all iterations."""
        each = self.seconds_per_iteration
        return None if each is None else each * self.iterations

    def record(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        values = asdict(self) | {"fits": self.fits, "seconds": self.seconds}
        return values | {"shape": list(self.shape)}

    def line(self) -> str:
        """Return it in words, as one line."""
        there = self.available_bytes
        free = "" if there is None else f" of {size(there)} available"
        spent = "" if self.seconds is None else f", at most about {clock(self.seconds)}"
        return (
            f"{self.shape[2]}x{self.shape[1]} pixels on {self.device} ({self.backend}, "
            f"{self.precision}): {size(self.memory_bytes)} of memory{free}{spent}"
        )


def plan(
    config: FitConfig,
    shape: tuple[int, int, int],
    *,
    backend: str = "auto",
    device: str = "auto",
    timed: bool = True,
) -> Plan:
    """Plan a fit, without running it.

    Args:
        config: How it would be fitted.
        shape: Of the image: channels, height, width.
        backend: "auto", or the name of one.
        device: "auto", "cpu", "cuda", "cuda:1", "mps", "xpu".
        timed: Whether to run a few iterations on small images, to estimate the time.

    Raises:
        ConfigError: There is no such backend or device.
        UnavailableError: The backend or device cannot be used here.
    """
    config = replace(config, network=replace(config.network, outputs=shape[0]))
    found = resolve_device(device)
    chosen, precision, _ = select(backend, found, config)
    return Plan(
        backend=chosen.name,
        device=str(found),
        precision=precision,
        shape=shape,
        memory_bytes=chosen.memory(config, shape, found, precision),
        available_bytes=memory.available(found),
        iterations=config.iterations,
        seconds_per_iteration=_seconds(chosen, config, shape, found, precision) if timed else None,
    )


def size(count: int) -> str:
    """Write a number of bytes: "812 MB", "6.4 GB"."""
    return f"{count / 1e6:.0f} MB" if count < 1e9 else f"{count / 1e9:.1f} GB"


def _seconds(
    backend: Backend,
    config: FitConfig,
    shape: tuple[int, int, int],
    device: torch.device,
    precision: str,
) -> float:
    """Estimate an iteration, from two smaller images or the picture's own size."""
    config = replace(config, stop=("fixed",))
    network = config.network
    height, width = network.network_size(*shape[1:])
    few, many = (max(network.network_size(side, side)) for side in CALIBRATION_SIDES)

    def timed(height: int, width: int) -> float:
        small = shape[0], height, width
        with kept_pages():
            return _timed(backend, config, small, device, precision)

    if height * width <= many**2:
        return timed(height, width)
    short, long = timed(few, few), timed(many, many)
    # Where the smaller one took no less, all of the larger one's time is taken to be the pixels'.
    slope = (long - short) / (many**2 - few**2) if long > short else long / many**2
    return long + slope * (height * width - many**2)


def _timed(
    backend: Backend,
    config: FitConfig,
    shape: tuple[int, int, int],
    device: torch.device,
    precision: str,
) -> float:
    """Return the seconds of an iteration on an image of this shape: the least of a few."""
    step = backend.prepare(Problem(torch.zeros(1, *shape), shape), config, device, precision, None)

    def go() -> float:
        begun = time.perf_counter()
        step.advance(step.stride)
        step.slots[0].read()  # waits for the device
        return (time.perf_counter() - begun) / step.stride

    go()  # libraries choose and prepare their kernels
    return min(go() for _ in range(_TIMED))
