"""Measure variants in turns, each in a process of its own, in the time that there is.

What cannot be set up, fails or takes too long is left out with the reason, and does not hold the
others up.
"""

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from flashdip.bench.measure import Variant, Worker, take_turns, worker
from flashdip.engine.files import one_line

PATIENCE = 10.0  # times what a sample should take; then its worker hangs
FEWEST = 3  # rounds; with less there is no spread to tell

Make = tuple[Callable[..., Variant], tuple[Any, ...]]


@dataclass(frozen=True)
class Plan:
    """How long things are measured.

    Attributes:
        seconds: That everything may take, set-up included.
        rounds: The most samples of each variant.
        block: Seconds of a sample, about; one step at least.
        setup: Seconds until a variant has made its first step.
        warm: Whether untimed steps come before each sample; else a sample is one step.
        energy_block: Seconds over which energy is measured: NVML's counter moves a few times a
            second.
        limits: Instead of `setup`, for the variants that are named.
    """

    seconds: float
    rounds: int = 15
    block: float = 0.5
    setup: float = 180.0
    warm: bool = True
    energy_block: float = 3.0
    limits: Mapping[str, float] = field(default_factory=dict)


def compare(
    made: Mapping[str, tuple[Make, int]],
    plan: Plan,
    *,
    baseline: str = "published",
    start: Callable[..., contextlib.AbstractContextManager[Worker]] | None = None,
    meter: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Measure variants in turns; those that cannot be set up or take too long are left out.

    Where there is no time for `FEWEST` rounds of all, samples are shorter, and if that does not do,
    the slowest are left out.

    Args:
        made: How each is made, and how many iterations of one fit its step makes.
        plan: How long.
        baseline: What ratios are taken to, where it is among them.
        start: Starts a worker; None: `measure.worker`.
        meter: Joules that the device has used so far; None: energy is not measured.

    Returns:
        "rows" by name: seconds an iteration of one fit takes ("median", "p10", "p90", "n",
        "samples", and "ratio": how many times as fast as the baseline), "setup" and "first_step" in
        seconds, "memory" in bytes, "joules" an iteration of one fit, "watts" and "facts"; and
        "left_out" by name, with the reason.
    """
    deadline = time.monotonic() + plan.seconds
    rows: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        entries: dict[str, _Entry] = {}
        fewest = min(FEWEST, plan.rounds)
        for name, (how, fits) in made.items():
            kept = fewest * sum(each.step for each in entries.values())  # for those before it
            allowed = min(plan.limits.get(name, plan.setup), deadline - time.monotonic() - kept)
            if allowed <= 0:
                left_out[name] = "no time was left for it"
                continue
            try:
                entries[name] = _set_up(how, fits, plan, stack, start or worker, allowed)
            except TimeoutError:
                left_out[name] = f"no first step within {allowed:.0f} s: cut"
            except Exception as error:  # out of memory, most likely; the others are to go on
                left_out[name] = one_line(f"{type(error).__name__}: {error}")

        metered = 0.0 if meter is None else plan.energy_block
        left = _leave_out(entries, left_out, fewest, metered, deadline)
        if not entries:
            return {"rows": {}, "left_out": left_out}
        begun = time.monotonic()

        def over(done: int) -> bool:
            spent = time.monotonic() - begun
            return done >= FEWEST and spent + spent / done > left  # no other round would fit

        def timer(name: str) -> Callable[[], float]:
            def sample() -> float:
                if name in left_out:
                    return math.nan
                try:
                    return entries[name].sample()
                except Exception as error:  # as above
                    left_out[name] = one_line(f"{type(error).__name__}: {error}")
                    return math.nan

            return sample

        timings = take_turns(
            {name: timer(name) for name in entries},
            rounds=plan.rounds,
            baseline=baseline if baseline in entries else None,
            over=over,
        )
        for name, each in entries.items():
            if name in left_out:
                continue
            timing = (
                timings[name] if baseline not in left_out else replace(timings[name], ratio=None)
            )
            rows[name] = {"setup": each.worker.setup, "first_step": each.first} | asdict(timing)
            rows[name] |= {"memory": each.worker.memory(), "facts": each.worker.facts()}
            if meter is not None:
                rows[name] |= each.energy(meter, plan.energy_block)
    return {"rows": rows, "left_out": left_out}


@dataclass(frozen=True)
class _Entry:
    """A variant in its worker, set up and warm.

    Attributes:
        worker: That runs it.
        end: Ends the worker.
        fits: Iterations of one fit that a step makes.
        first: Seconds of the first step.
        step: Seconds of another one.
        count: Steps of a sample.
        warmup: Untimed steps before it.
    """

    worker: Worker
    end: Callable[[], None]
    fits: int
    first: float
    step: float
    count: int
    warmup: int

    @property
    def turn(self) -> float:
        """Seconds of a sample, with what comes before it."""
        return (self.count + self.warmup) * self.step

    def sample(self) -> float:
        """Return the mean seconds of an iteration of one fit, over one block."""
        return self.worker.seconds(steps=self.count, warmup=self.warmup) / self.fits

    def energy(self, meter: Callable[[], float], block: float) -> dict[str, float]:
        """Return joules of an iteration of one fit, and watts, over a block of so many seconds."""
        count = max(1, math.ceil(block / self.step))
        before = meter()
        taken = self.worker.seconds(steps=count, warmup=0)
        used = (meter() - before) / count
        return {"joules": used / self.fits, "watts": used / taken}


def _set_up(
    made: Make,
    fits: int,
    plan: Plan,
    stack: contextlib.ExitStack,
    start: Callable[..., contextlib.AbstractContextManager[Worker]],
    limit: float,
) -> _Entry:
    """Start a variant in its worker, make its first steps, and choose how it is sampled."""
    make, arguments = made
    deadline = time.monotonic() + limit
    with contextlib.ExitStack() as own:
        running = own.enter_context(start(make, *arguments, limit=max(1.0, limit)))
        running.limit = max(1.0, deadline - time.monotonic())
        first = step = running.seconds(steps=1, warmup=0)
        if plan.warm:
            short = first < plan.block
            running.limit = max(1.0, deadline - time.monotonic())
            step = running.seconds(steps=3 if short else 1, warmup=int(short))
        end = stack.enter_context(own.pop_all()).close
    block = plan.block if plan.warm else 0.0
    count = max(1, math.ceil(block / step))
    # A step that is longer than a block warms itself.
    warmup = math.ceil(0.1 * count) if step < block else 0
    entry = _Entry(running, end, fits, first, step, count, warmup)
    running.limit = max(limit, PATIENCE * max(entry.turn, plan.energy_block))
    return entry


def _leave_out(
    entries: dict[str, _Entry],
    left_out: dict[str, str],
    rounds: int,
    metered: float,
    deadline: float,
) -> float:
    """Fit so many rounds into the time, or leave out the slowest; return the seconds left.

    Samples become shorter first, single steps at last.

    Args:
        entries: By name; they are replaced, and what is ended is taken out.
        left_out: Is told why, by name.
        rounds: That there have to be.
        metered: Seconds over which the energy of each is measured afterwards; 0: it is not.
        deadline: On the clock of `time.monotonic`.
    """
    while True:
        left = deadline - time.monotonic()
        if metered:
            left -= sum(max(metered, each.step) for each in entries.values())
        needed = rounds * sum(each.turn for each in entries.values())
        if needed <= left or not entries:
            return left
        least = rounds * sum(each.step for each in entries.values())
        if least <= left:
            for name, each in entries.items():
                count = max(1, math.floor(each.count * left / needed))
                entries[name] = replace(each, count=count, warmup=min(each.warmup, count - 1))
            continue
        slowest = max(entries, key=lambda name: entries[name].step)
        left_out[slowest] = (
            f"{rounds} rounds of {', '.join(entries)} need {least:.0f} s, and "
            f"{max(left, 0.0):.0f} s were left: the slowest is left out"
        )
        entries.pop(slowest).end()
