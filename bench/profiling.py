"""A real fit under torch's profiler: where an iteration's time goes, and what is to be gained.

The fit is that of `flashdip.fit`: the same step, the same readings, the same rules. It warms up,
is timed without the profiler, and then goes on under it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from flashdip.bench import attribution, machine
from flashdip.bench.attribution import Event
from flashdip.bench.baselines import variant
from flashdip.bench.ceilings import Ceilings, ceilings
from flashdip.bench.marks import READ, STEP, mark, span
from flashdip.bench.measure import clock
from flashdip.bench.work import Work, count
from flashdip.engine.backends.base import Step
from flashdip.engine.backends.eager import EagerStep
from flashdip.engine.backends.triton import TritonStep
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import UnavailableError
from flashdip.engine.fit import Place
from flashdip.engine.problems import Problem
from flashdip.engine.run import Run

WARM_UP = 3  # iterations
TIMED = 5  # iterations without the profiler
POINTS = 2000  # of the memory's timeline


@dataclass(frozen=True)
class Profile:
    """What came of a profile.

    Attributes:
        record: Plain values for JSON: "setting", "machine", "ceilings", "step", "parts", "gaps",
            "allocator", "waits", "memory".
        trace: Writes the trace for Chrome or Perfetto to a file.
    """

    record: dict[str, Any]
    trace: Callable[[str], None]


def profile_fit(
    problem: Problem,
    config: FitConfig,
    *,
    backend: str = "auto",
    device: str = "auto",
    iterations: int = 10,
    limits: Ceilings | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Profile:
    """Profile a fit.

    Args:
        problem: What is restored; a single fit (F = 1).
        config: How.
        backend: Its name, or "auto".
        device: Where.
        iterations: Under the profiler.
        limits: What the device reaches; None: measured first.
        tell: Is told what is being done.

    Raises:
        UnavailableError: The backend cannot run here, or its kernels cannot be told apart.
    """
    place = Place.choose(problem, config, backend, device, ())
    tell("measuring what the machine can do at most")
    limits = limits or ceilings(place.device, [place.precision])
    step = place.prepare(problem, None)
    if isinstance(step, TritonStep) and place.device.type == "cpu":
        raise UnavailableError("profile: Triton's interpreter tells nothing about its kernels")
    if not isinstance(step, EagerStep | TritonStep):
        raise UnavailableError(
            f"profile: torch's profiler sees nothing of what backend {place.backend.name} computes"
            ": use native, reference or triton"
        )
    run = Run(step.slots[0], place.config, problem.sigma, place.precision, lambda event: None)
    before = machine.state(place.device)
    with place.memory():
        tell(f"warming up, {WARM_UP} iterations; then {TIMED} are timed")
        _advance(step, run, place.device, WARM_UP)
        sync = variant(step, place.device).sync
        seconds = clock(
            lambda: _advance(step, run, place.device, 1), steps=TIMED, warmup=0, sync=sync
        )
        if isinstance(step, EagerStep):
            mark(step, place.device)
        tell(f"profiling {iterations} iterations")
        on_gpu = place.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with profile(activities=activities, profile_memory=True) as seen:
            _advance(step, run, place.device, iterations)
            if sync is not None:
                sync()
    tell("reading the profile")
    found = attribution.events(seen, on_gpu)
    record = {
        "setting": {
            "backend": place.backend.name,
            "precision": place.precision,
            "device": str(place.device),
            "size": list(place.size),
            "iterations": iterations,
            "config": place.config.record(),
        },
        "machine": machine.survey(place.device)
        | {"before": before, "after": machine.state(place.device)},
        "ceilings": limits.record(),
        **_judged(found, step, place, limits, iterations, seconds),
        **_memory(seen, found, iterations, place.device),
    }
    return Profile(record, seen.export_chrome_trace)


def _advance(step: Step, run: Run, device: torch.device, iterations: int) -> None:
    """Make iterations as `flashdip.fit` does, whatever its rules say."""
    for _ in range(iterations):
        with span(STEP, device):
            step()
        if run.due():
            with span(READ, device):
                for _, statistics in step.measure([0]):
                    run.read(statistics)


def _judged(
    found: list[Event],
    step: Step,
    place: Place,
    limits: Ceilings,
    iterations: int,
    seconds: float,
) -> dict[str, Any]:
    """Return parts, gaps and waits; times in milliseconds an iteration."""
    steps = attribution.spans(found, STEP)
    spent, counts = _parts(found, step, place)
    each = 1e3 * iterations  # microseconds of all iterations to milliseconds of one
    took = sum(spent.values()) / each
    if place.device.type == "cuda":
        gaps, kernels = attribution.idle(found)
        gap, launches = gaps / each, kernels / iterations
        whole = took + gap
    else:
        whole = sum(end - start for start, end in steps) / each
        gap, launches = whole - took, None
    parts = []
    for (name, direction), microseconds in sorted(spent.items(), key=lambda pair: -pair[1]):
        work, ms = counts.get((name, direction)), microseconds / each
        roof = None if work is None else 1e3 * work.roof(limits, place.precision)
        parts.append(
            {
                "name": name,
                "pass": direction,
                "ms": ms,
                "share": ms / whole,
                "flops": None if work is None else work.flops,
                "bytes": None if work is None else work.bytes,
                "roof_ms": roof,
                "roof_share": None if roof is None or ms == 0 else roof / ms,
            }
        )
    return {
        "step": {"ms": 1e3 * seconds, "profiled_ms": whole},
        "parts": parts,
        "gaps": {"ms": gap, "share": gap / whole, "launches": launches},
        "waits": {
            "in_iterations": attribution.waits(found, steps),
            "in_readings": attribution.waits(found, attribution.spans(found, READ)),
        },
    }


def _parts(
    found: list[Event], step: Step, place: Place
) -> tuple[dict[tuple[str, str], float], dict[tuple[str, str], Work]]:
    """Return the microseconds of each part, and what it has to do at least."""
    if isinstance(step, TritonStep):
        listed = [*step.program.launches, *step.program.after]
        names = [launch.kernel.__name__ for launch in listed]
        spent = attribution.by_order(found, names, [launch.name for launch in listed])
        counts = {(each.name, ""): Work(each.flops, each.bytes) for each in listed}
        return {(name, ""): time for name, time in spent.items()}, counts
    return attribution.by_layer(found), count(place.config, place.size, place.precision)


def _memory(seen: Any, found: list[Event], iterations: int, device: torch.device) -> dict[str, Any]:
    """Return what the allocator did: by iteration, and over time."""
    kineto = seen.profiler.kineto_results
    begun, kind = kineto.trace_start_ns(), device.type.upper()
    changes = sorted(
        ((event.start_ns() - begun) / 1e3, event.nbytes())
        for event in kineto.events()
        if event.name() == "[memory]" and kind in str(event.device_type())
    )
    steps = attribution.spans(found, STEP)
    taken = [size for at, size in changes if size > 0 and any(a <= at < b for a, b in steps)]
    held, peak = 0, 0
    timeline = []
    for at, size in changes:
        held += size
        peak = max(peak, held)
        timeline.append([at / 1e3, held])
    every = max(1, len(timeline) // POINTS)
    return {
        "allocator": {
            "allocations": len(taken) / iterations,
            "bytes": sum(taken) / iterations,
            "peak_bytes": peak,
        },
        "memory": timeline[::every],
    }
