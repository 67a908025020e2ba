"""What a fit needs on a device, before it begins: memory, and time.

    plan = flashdip.engine.planning.plan(config, (3, 4000, 6000))
    plan.memory_bytes, plan.available_bytes, plan.seconds

Memory is what the backend counts (`Backend.memory`). Time is that of a few iterations on small
images: a convolution's operations are in proportion to the pixels, what else a step does is not, so
that two sizes give both shares.
"""

import bisect
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from flashdip.engine import memory
from flashdip.engine.backends import resolve_device, select
from flashdip.engine.backends.base import Backend
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, UnavailableError
from flashdip.engine.files import one_line
from flashdip.engine.problems import Problem
from flashdip.engine.progress import clock
from flashdip.engine.tiling import LEAST, Tiling
from flashdip.kernels.memory import kept_pages

CALIBRATION_SIDES = (128, 256)  # of the images that are timed, where the picture is not smaller
MARGIN = 1.15  # a fit may take so much more than planned
_TIMED = 3  # goes, the fastest of which counts


@dataclass(frozen=True)
class Plan:
    """What a fit needs.

    Attributes:
        backend: The name of the one that would run.
        device: Where.
        precision: What activations are stored in.
        shape: Of the image: channels, height, width.
        memory_bytes: The most of the device's memory that the fit, of a tile if it is tiled, takes,
            beside what the process (see `flashdip.engine.memory.resident`) and the picture have
            taken.
        available_bytes: What may still be taken there; None where nothing tells.
        iterations: The most that the config allows, of all runs and tiles together.
        seconds_per_iteration: Estimated; None where it was not asked for.
        tiling: How the picture is cut; None: it is fitted as a whole.
    """

    backend: str
    device: str
    precision: str
    shape: tuple[int, int, int]
    memory_bytes: int
    available_bytes: int | None
    iterations: int
    seconds_per_iteration: float | None = None
    tiling: Tiling | None = None

    @property
    def fits(self) -> bool:
        """Whether there is memory for it, as far as one can tell."""
        return self.available_bytes is None or MARGIN * self.memory_bytes <= self.available_bytes

    @property
    def fitted(self) -> tuple[int, int, int]:
        """Shape of what is fitted at once: the image, or a tile of it."""
        return self.shape if self.tiling is None else (self.shape[0], *self.tiling.image_side)

    @property
    def seconds(self) -> float | None:
        """Estimated time of all iterations."""
        each = self.seconds_per_iteration
        return None if each is None else each * self.iterations

    def record(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        values = asdict(self) | {"fits": self.fits, "seconds": self.seconds}
        tiles = None
        if self.tiling is not None:
            tiles = {
                "grid": [len(self.tiling.rows), len(self.tiling.columns)],
                "side": list(self.tiling.image_side),
                "overlap": self.tiling.factor * self.tiling.overlap,
            }
        del values["tiling"]
        return values | {"shape": list(self.shape), "tiles": tiles}

    def line(self) -> str:
        """Return it in words, as one line."""
        cut = ""
        if self.tiling is not None:
            height, width = self.tiling.image_side
            cut = f" in {len(self.tiling.tiles)} tiles of {width}x{height}"
        spent = "" if self.seconds is None else f", at most about {clock(self.seconds)}"
        return (
            f"{self.shape[2]}x{self.shape[1]} pixels{cut} on {self.device} ({self.backend}, "
            f"{self.precision}): {self.needs()}{spent}"
        )

    def needs(self) -> str:
        """Return the memory it takes in words."""
        there = self.available_bytes
        free = "" if there is None else f" of {size(there)} available"
        return f"takes about {size(self.memory_bytes)} of memory{free}"


def plan(
    config: FitConfig,
    shape: tuple[int, int, int],
    *,
    backend: str = "auto",
    device: str = "auto",
    timed: bool = True,
    factor: int | None = 1,
    tile: int | None = None,
    limit: int | str | None = None,
) -> Plan:
    """Plan a fit, without running it.

    What does not fit into the memory that is available is to be tiled.

    Args:
        config: How it would be fitted.
        shape: Of the image: channels, height, width.
        backend: "auto", or the name of one.
        device: "auto", "cpu", "cuda", "cuda:1", "mps", "xpu".
        timed: Whether to run a few iterations on small images, to estimate the time.
        factor: How many times larger the image is than the observation, which is cut; None: the
            operator reaches too far for tiles.
        tile: Side of a tile in pixels of the image, whatever the memory; None: as the memory asks.
        limit: Bytes, or text such as "6GB", that this process may have in all, or on a GPU the fit;
            None: what is there.

    Raises:
        ConfigError: There is no such backend or device, or `tile` or `limit` is none.
        UnavailableError: The backend or device cannot be used here, or has too little memory.
    """
    config = replace(config, network=replace(config.network, outputs=shape[0]))
    found = resolve_device(device)
    chosen, precision, _ = select(backend, found, config)
    room = _room(found, limit)

    def need(tiling: Tiling | None) -> int:
        one = shape if tiling is None else (shape[0], *tiling.image_side)
        return chosen.memory(config, one, found, precision)

    tiling = None
    if tile is not None:
        tiling = None if tile >= max(shape[1:]) else Tiling.of(shape, factor or 1, tile)
    elif factor is not None and room is not None and MARGIN * need(None) > room:
        unit = math.lcm(factor, 1 << config.network.levels)
        tiling = _largest(shape, factor, unit, room, need)
    iterations = config.iterations
    if tiling is not None:
        iterations = sum(tiling.iterations(each, iterations) for each in tiling.tiles)
    iterations *= config.runs
    planned = Plan(
        backend=chosen.name,
        device=str(found),
        precision=precision,
        shape=shape,
        memory_bytes=need(tiling),
        available_bytes=room,
        iterations=iterations,
        tiling=tiling,
    )
    if not timed:
        return planned
    seconds = _seconds(chosen, config, planned.fitted, found, precision)
    return replace(planned, seconds_per_iteration=seconds)


def _room(device: torch.device, limit: int | str | None) -> int | None:
    """Return the bytes that a fit may take."""
    there = memory.available(device)
    if limit is None:
        return there
    most = bytes_of(limit)
    taken = memory.resident() or 0 if device.type == "cpu" else 0
    left = max(0, most - taken)
    return left if there is None else min(left, there)


def _largest(
    shape: tuple[int, int, int],
    factor: int,
    unit: int,
    room: int,
    need: Callable[[Tiling], int],
) -> Tiling:
    """Return the fewest tiles that fit into the memory, as small as they can then be.

    Raises:
        UnavailableError: Even the smallest do not.
    """
    sides = range(-(-LEAST // unit) * unit, max(shape[1:]), unit)

    def asked(side: int) -> int:
        return round(MARGIN * need(Tiling.of(shape, factor, side)))

    count = bisect.bisect_right(sides, room, key=asked)
    if count == 0:
        least = asked(sides[0] if sides else LEAST)
        raise UnavailableError(
            f"memory: expected at least {size(least)} for the smallest tiles, got "
            f"{size(room)}: free some, raise --memory, or take a smaller preset"
        )
    return Tiling.of(shape, factor, sides[count - 1]).tightened(unit // factor)


def bytes_of(text: int | str) -> int:
    """Return a number of bytes: 6000000000, "6GB", "800 MB", "5.5GiB".

    Raises:
        ConfigError: It is none, or not above zero.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*(?:([kmgt])(i?)b?|b)?\s*", str(text).lower())
    try:
        if found is None:
            raise ValueError
        step = 1024 if found[3] else 1000
        count = int(float(found[1]) * step ** " kmgt".index(found[2] or " "))
        if count <= 0:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"memory: expected bytes such as 6GB or 800MB, got {one_line(text)}"
        ) from None
    return count


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
