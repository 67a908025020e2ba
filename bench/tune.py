"""Look for the tiles that suit the GPU at hand, and keep them in the user's cache.

    flashdip tune --size 512

Every plan made on that GPU takes them from then on. With `--modelled ARCH` nothing is measured and
no GPU is needed: the cost model judges, and what it prefers goes into the package's own table, for
all GPUs of that architecture.
"""

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from flashdip.engine.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    import torch

    from flashdip.engine.config import FitConfig
    from flashdip.kernels.fused.cost import GPU
    from flashdip.kernels.fused.inspect import Compiled
    from flashdip.kernels.fused.launch import Launch, Tile
    from flashdip.kernels.fused.program import Program
    from flashdip.kernels.fused.tuning import Finding, Judge, Plan

ROUNDS = 5
SAMPLE = 0.01  # seconds of one sample
# How far a step's gradient may be from that with other tiles, relative to its norm: sums taken in
# another order differ, a kernel that is wrong differs far more.
CLOSE = 0.05


def tune(
    task: Annotated[str, typer.Option(help="The preset's task.")] = "denoise",
    preset: Annotated[str, typer.Option(help="Whose network; see 'flashdip presets'.")] = "default",
    size: Annotated[
        list[int] | None,
        typer.Option(metavar="PIXELS", help="Side of the images, 512; may be repeated."),
    ] = None,
    fits: Annotated[int, typer.Option(min=1, help="Fits side by side.")] = 1,
    precision: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
    minutes: Annotated[float, typer.Option(min=0.0, help="Stop after so long.")] = 20.0,
    modelled: Annotated[
        str | None,
        typer.Option(metavar="ARCH", help="Ask the cost model for sm_80, sm_89 or sm_90 instead."),
    ] = None,
) -> None:
    """Look for the tiles that suit the GPU at hand, and keep them.

    What is found is kept at once: stop with Ctrl-C whenever you like, a second call goes on.

    Example: flashdip tune --size 512
    """
    from rich.console import Console

    from flashdip.engine.backends.base import DTYPES
    from flashdip.engine.backends.triton import PRECISIONS
    from flashdip.engine.presets import preset as named

    config, sizes = named(task, preset), size or [512]
    if precision not in PRECISIONS:
        raise ConfigError(f"--precision: expected {', '.join(PRECISIONS)}, got {precision!r}")
    if min(sizes) < 16:
        raise ConfigError(f"--size: expected at least 16 pixels, got {min(sizes)}")
    place = Modelled(modelled) if modelled else Measured()
    console, end = Console(highlight=False), time.monotonic() + 60 * minutes
    for side in sizes:
        console.print(f"{side}x{side}, {place.name}: what became faster is {place.verb}")
        shape = (side, side), DTYPES[precision], fits
        for finding in search_until(end, place, config, *shape):
            console.print(line(finding), soft_wrap=True)
    console.print(f"kept in {place.where}", soft_wrap=True)


class Place(Protocol):
    """For which GPUs tiles are looked for, and who judges them.

    Attributes:
        name: Of the GPU.
        verb: "measured" or "modelled".
        where: The tiles are kept.
        table: Those that are kept so far.
    """

    name: str
    verb: str
    where: str
    table: "Mapping[str, Tile]"

    def plan(
        self, config: "FitConfig", size: tuple[int, int], dtype: "torch.dtype", fits: int
    ) -> "Plan":
        """Return what plans a step with given tiles."""
        ...

    def judge(self, first: "Program") -> "Judge":
        """Return who says what is faster, and computes the same as the first plan."""
        ...

    def keep(self, tiles: "Mapping[str, Tile]") -> None:
        """Keep these beside those that are kept so far."""
        ...


def search_until(
    end: float,
    place: Place,
    config: "FitConfig",
    size: tuple[int, int],
    dtype: "torch.dtype",
    fits: int,
) -> "Iterator[Finding]":
    """Search, keeping each better tile as it is found, until `time.monotonic()` is past `end`."""
    from flashdip.kernels.fused.tuning import search

    plan = place.plan(config, size, dtype, fits)
    for finding in search(plan, place.judge(plan(place.table)), place.table):
        if finding.after != finding.before:
            place.keep({finding.key: finding.after})
        yield finding
        if time.monotonic() > end:
            return


def line(finding: "Finding") -> str:
    """Say in a line what became of a tile."""
    names = ", ".join(finding.launches[:2]) + (", ..." if len(finding.launches) > 2 else "")
    tried = f"{finding.tried} tried, {finding.failed} cannot be used"
    if finding.after == finding.before:
        return f"{names}: as it was ({tried})"
    changes = [
        f"{field} {old} -> {new}"
        for field, old, new in zip(
            finding.before._fields, finding.before, finding.after, strict=True
        )
        if old != new
    ]
    return f"{names}: {finding.faster:.2f} times as fast, {', '.join(changes)} ({tried})"


class Measured:
    """The GPU at hand; its own clock."""

    verb = "measured"

    def __init__(self) -> None:
        from flashdip.bench.gpu import unavailable
        from flashdip.engine.backends import tuned

        reason = unavailable()
        if reason is not None:
            raise UnavailableError(
                f"tune: this measures on an NVIDIA GPU, and there is none to use: {reason}; "
                "or ask the cost model with --modelled sm_90"
            )
        import torch

        self.device = torch.device("cuda", torch.cuda.current_device())
        self.of = tuned.identity(self.device)
        self.name = self.of["gpu"]
        self.table: Mapping[str, Tile] = tuned.load(self.of)
        self.where = str(tuned.path(self.of))

    def plan(
        self, config: "FitConfig", size: tuple[int, int], dtype: "torch.dtype", fits: int
    ) -> "Plan":
        """Return what plans a step of F images on the GPU."""
        from flashdip.engine.backends.plans import architecture, planned

        own = architecture(self.device)

        def plan(table: "Mapping[str, Tile]") -> "Program":
            cut = own._replace(table={**own.table, **table})
            return planned(config, size, dtype, cut, fits, self.device)

        return plan

    def judge(self, first: "Program") -> "Stopwatch":
        """Return a stopwatch that refuses what is wrong."""
        return Stopwatch(self.device, first)

    def keep(self, tiles: "Mapping[str, Tile]") -> None:
        """Write them into the user's cache."""
        from flashdip.engine.backends import tuned

        self.table = {**self.table, **tiles}
        tuned.save(self.of, self.table)


class Stopwatch:
    """Measures launches, each set in a graph of its own, in turns with those they would replace.

    Args:
        device: The GPU; with Triton's interpreter the CPU.
        first: A plan whose step is right.
    """

    def __init__(self, device: "torch.device", first: "Program") -> None:
        self.device = device
        self.gradient = gradient(first)

    def seconds(self, launches: "Sequence[Launch]") -> float:
        """Return how long launches take together."""
        from flashdip.bench.measure import clock

        replay = self._captured(launches)
        once = clock(replay, steps=1, warmup=1, sync=self._wait)
        return clock(replay, steps=max(1, math.ceil(SAMPLE / once)), warmup=1, sync=self._wait)

    def faster(self, base: "Program", others: "Sequence[Program]") -> list[float]:
        """Return how many times as fast the launches that differ are, 0 for what is wrong."""
        return [self._faster(base, other) for other in others]

    def _faster(self, base: "Program", other: "Program") -> float:
        from flashdip.bench.measure import clock, take_turns
        from flashdip.kernels.fused.tuning import differing

        try:
            found = gradient(other)
        except Exception:  # whatever Triton, its assembler or the driver has against such a tile
            return 0.0
        if not (found - self.gradient).norm() <= CLOSE * self.gradient.norm():
            return 0.0
        sets = zip(*differing(base, other), strict=True)
        replays = dict(zip(("base", "other"), map(self._captured, sets), strict=True))
        once = clock(replays["base"], steps=1, warmup=1, sync=self._wait)
        steps = max(1, math.ceil(SAMPLE / once))
        timers = {
            name: lambda replay=replay: clock(replay, steps=steps, warmup=1, sync=self._wait)
            for name, replay in replays.items()
        }
        timings = take_turns(timers, rounds=ROUNDS, baseline="base")
        return timings["other"].ratio or 0.0

    def _captured(self, launches: "Sequence[Launch]") -> "Callable[[], None]":
        from flashdip.engine.backends.graphs import Repeated

        def run() -> None:
            for launch in launches:
                launch()

        return Repeated(run, self.device)

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def gradient(program: "Program") -> "torch.Tensor":
    """Return the gradient of a first step from equal weights, as Adam's first moment keeps it."""
    import torch

    generator = torch.Generator().manual_seed(0)
    count, device = program.parameters.shape[1], program.parameters.device
    weights = 0.1 * torch.randn(count, generator=generator)
    z = 0.1 * torch.rand(program.z.shape[1:], generator=generator)
    program.parameters.copy_(weights.to(device))
    program.copies.copy_(program.parameters)
    program.z.copy_(z.to(device))
    for state in (*program.moments, program.counters):
        state.zero_()
    for launch in (*program.launches, *program.after):
        launch()
    return program.moments[0].clone()


class Modelled:
    """All GPUs of an architecture, as the cost model sees them.

    Args:
        arch: Such as "sm_90".
    """

    verb = "modelled"

    def __init__(self, arch: str) -> None:
        from flashdip.kernels.fused import cost, tables

        known = {gpu.arch: gpu for gpu in cost.GPUS}
        if arch not in known:
            raise ConfigError(f"--modelled: expected {', '.join(known)}, got {arch!r}")
        self.gpu, self.arch = known[arch], arch
        self.name = f"{self.gpu.name} ({arch})"
        self.table: Mapping[str, Tile] = tables.read(arch)
        self.where = str(tables.PATH)

    def plan(
        self, config: "FitConfig", size: tuple[int, int], dtype: "torch.dtype", fits: int
    ) -> "Plan":
        """Return what plans a step without memory."""
        from flashdip.engine.backends.plans import planned
        from flashdip.kernels.fused.tiles import ARCHITECTURES

        watched = dataclasses.replace(config, stop=("es-wmv",))

        def plan(table: "Mapping[str, Tile]") -> "Program":
            cut = ARCHITECTURES[self.arch]._replace(table=table)
            return planned(watched, size, dtype, cut, fits)

        return plan

    def judge(self, first: "Program") -> "Model":
        """Return the cost model."""
        return Model(self.gpu)

    def keep(self, tiles: "Mapping[str, Tile]") -> None:
        """Write them into the package's table."""
        from flashdip.kernels.fused import tables

        self.table = {**self.table, **tiles}
        tables.write(self.arch, self.table)


class Model:
    """Judges by the cost model; what spills, does not fit or is ill compiled is refused."""

    def __init__(self, gpu: "GPU") -> None:
        self.gpu = gpu

    def seconds(self, launches: "Sequence[Launch]") -> float:
        """Return how long launches take together, the gaps between them included."""
        from flashdip.kernels.fused import cost

        pairs = zip(launches, self._compile(launches), strict=True)
        return cost.modelled_step([cost.modelled_seconds(*pair, self.gpu) for pair in pairs])

    def faster(self, base: "Program", others: "Sequence[Program]") -> list[float]:
        """Return how many times as fast the launches that differ are, 0 for what is refused."""
        from flashdip.kernels.fused.tuning import differing

        pairs = [differing(base, other) for other in others]
        with contextlib.suppress(RuntimeError):  # one cannot be compiled: found out below
            self._compile([launch for each in pairs for _, launch in each])  # side by side
        return [self._faster(*zip(*each, strict=True)) for each in pairs]

    def _faster(self, before: "Sequence[Launch]", after: "Sequence[Launch]") -> float:
        from flashdip.kernels.fused import checks

        try:
            compiled = self._compile(after)
        except RuntimeError:
            return 0.0
        if any(checks.breaches(*pair) for pair in zip(after, compiled, strict=True)):
            return 0.0
        return self.seconds(before) / self.seconds(after)

    def _compile(self, launches: "Sequence[Launch]") -> "list[Compiled]":
        from flashdip.kernels.fused import inspect

        wanted = [(launch, self.gpu.arch) for launch in launches]
        return inspect.compile_launches(wanted, os.cpu_count() or 1)
