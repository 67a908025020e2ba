"""The only timer: variants take turns within one run, so that they share the machine's moods.

A sample is the mean time of a step over a block of steps; a round takes one block of each variant.
What is reported is the median over rounds, and the median over rounds of the ratio to a baseline
measured in the same round.

A `Worker` runs a variant in a process of its own: its allocator, threads and peak memory are then
not those that another variant left behind.
"""

import contextlib
import functools
import multiprocessing
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds a step of one variant takes.

    Attributes:
        median: Over rounds, in seconds.
        p10: 10th percentile over rounds, in seconds; `p90` the 90th.
        n: Number of rounds.
        ratio: How many times faster than the baseline: median over rounds of baseline / variant;
            None without a baseline.
        samples: Of each round, in seconds; rounds of variants that took turns go together.
    """

    median: float
    p10: float
    p90: float
    n: int
    ratio: float | None = None
    samples: tuple[float, ...] = ()


def clock(
    step: Callable[[], None],
    *,
    steps: int,
    warmup: int,
    sync: Callable[[], None] | None = None,
) -> float:
    """Return the mean seconds of a step over `steps` of them, after `warmup` untimed ones.

    Args:
        step: What is timed.
        steps: How many are timed together, at least 1.
        warmup: How many are made before, untimed.
        sync: Waits for the device; called before each reading of the clock.
    """
    wait = sync or (lambda: None)
    for _ in range(warmup):
        step()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - start) / steps


def take_turns(
    timers: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    baseline: str | None = None,
    over: Callable[[int], bool] = lambda done: False,
) -> dict[str, Timing]:
    """Ask each timer for one sample a round, and summarise.

    Args:
        timers: Each returns the seconds that a step took.
        rounds: Samples of each, at least 1.
        baseline: Name of the variant that ratios are taken to.
        over: Told how many rounds are done, whether there are to be no more.
    """
    if rounds < 1 or (baseline is not None and baseline not in timers):
        raise ValueError(
            f"measure: expected a round or more and a baseline of {', '.join(timers)}, "
            f"got {rounds} and {baseline!r}"
        )
    rows: list[dict[str, float]] = []
    while len(rows) < rounds and not (rows and over(len(rows))):
        rows.append({name: timer() for name, timer in timers.items()})
    timings = {}
    for name in timers:
        ratio = None
        if baseline is not None:
            ratio = float(np.median([row[baseline] / row[name] for row in rows]))
        timings[name] = summarise([row[name] for row in rows], ratio)
    return timings


def summarise(samples: Sequence[float], ratio: float | None = None) -> Timing:
    """Return the timing of samples, one a round, in seconds."""
    p10, median, p90 = (float(v) for v in np.percentile(samples, (10, 50, 90)))
    return Timing(median, p10, p90, len(samples), ratio, tuple(samples))


def measure(
    variants: Mapping[str, Callable[[], None]],
    *,
    rounds: int,
    steps: int,
    warmup: int,
    sync: Callable[[], None] | None = None,
    baseline: str | None = None,
) -> dict[str, Timing]:
    """Time variants in this process, a block of each a round.

    Args:
        variants: Each makes one step.
        rounds: Samples of each variant.
        steps: Steps that make up a sample.
        warmup: Untimed steps before each sample: the other variants' blocks have cooled the caches.
        sync: Waits for the device.
        baseline: Name of the variant that ratios are taken to.
    """

    def timer(step: Callable[[], None]) -> Callable[[], float]:
        return lambda: clock(step, steps=steps, warmup=warmup, sync=sync)

    timers = {name: timer(step) for name, step in variants.items()}
    return take_turns(timers, rounds=rounds, baseline=baseline)


def peak_memory() -> int:
    """Return the most memory that this process has held at once, in bytes, libraries included.

    From Linux's own record where there is one: `ru_maxrss` of a process starts at the size of the
    one that started it.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass(frozen=True)
class Variant:
    """What a worker runs.

    Attributes:
        step: Makes one step.
        sync: Waits for the device.
        memory: Peak memory so far, in bytes.
        facts: What else there is to tell of the steps made so far, plain values.
    """

    step: Callable[[], None]
    sync: Callable[[], None] | None = None
    memory: Callable[[], int] = peak_memory
    facts: Callable[[], dict[str, Any]] = dict


class Worker:
    """A variant in a process of its own; made by `worker`.

    Attributes:
        limit: Seconds that an answer may take, None for any; then the process is killed.
        setup: Seconds that setting the variant up took.
    """

    def __init__(self, connection: Connection, process: BaseProcess, limit: float | None) -> None:
        self._connection, self._process, self.limit = connection, process, limit
        self.setup = float(self._receive())

    def seconds(self, *, steps: int, warmup: int) -> float:
        """Return the mean seconds of a step; see `clock`."""
        self._connection.send(("seconds", {"steps": steps, "warmup": warmup}))
        return float(self._receive())

    def memory(self) -> int:
        """Return the variant's peak memory so far, in bytes."""
        self._connection.send(("memory", {}))
        return int(self._receive())

    def facts(self) -> dict[str, Any]:
        """Return what else the variant has to tell."""
        self._connection.send(("facts", {}))
        return dict(self._receive())

    def _receive(self) -> Any:
        if self.limit is not None and not self._connection.poll(self.limit):
            self._process.kill()
            raise TimeoutError(f"measure: the worker did not answer within {self.limit:.0f} s")
        try:
            answer = self._connection.recv()
        except EOFError:
            raise RuntimeError("measure: the worker's process ended early") from None
        if isinstance(answer, Exception):
            raise answer
        return answer


@contextlib.contextmanager
def worker(
    make: Callable[..., Variant], *arguments: Any, limit: float | None = None
) -> Iterator[Worker]:
    """Run `make(*arguments)`, a module-level function, in a fresh process and offer its variant.

    An exception of the variant is raised here. Ctrl-C, which a terminal sends to all processes, is
    for this one alone to see; whatever ends the block otherwise than well kills the worker.

    Args:
        make: Sets the variant up.
        arguments: What it is given.
        limit: See `Worker`; it holds for the set-up too.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
    resource_tracker.ensure_running()  # with the first process, and would lift the mask
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes inherit it
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    theirs.close()
    try:
        yield Worker(ours, process, limit)
    except BaseException:
        process.kill()  # nobody waits for its step any more
        raise
    finally:
        ours.close()
        process.join()
        process.close()


def _serve(
    connection: Connection, make: Callable[..., Variant], arguments: tuple[Any, ...]
) -> None:
    """Answer requests in the worker's process until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    try:
        start = time.perf_counter()
        variant = make(*arguments)
        connection.send(time.perf_counter() - start)
        answers: dict[str, Callable[..., Any]] = {
            "seconds": functools.partial(clock, variant.step, sync=variant.sync),
            "memory": variant.memory,
            "facts": variant.facts,
        }
        while True:
            request, options = connection.recv()
            connection.send(answers[request](**options))
    except EOFError:
        return
    except Exception as error:
        connection.send(error)
