"""The timer times what it says, and a worker's process is its own."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashdip.bench import measure
from flashdip.bench.measure import Timing, Variant, clock, take_turns, worker

MEBIBYTE = 2**20


@pytest.fixture
def spend(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Replace the clock by one that only this function moves."""
    now = [0.0]

    def move(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return move


def test_warmup_is_not_timed_and_sync_is(spend: Callable[[float], None]) -> None:
    costs: Iterator[float] = iter([100.0, 50.0, 1.0, 2.0, 3.0])
    waits: list[float] = [1000.0, 6.0]
    seconds = clock(lambda: spend(next(costs)), steps=3, warmup=2, sync=lambda: spend(waits.pop(0)))
    assert math.isclose(seconds, (1 + 2 + 3 + 6) / 3)


def test_variants_take_turns(spend: Callable[[float], None]) -> None:
    calls: list[str] = []

    def step(name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            spend(seconds)

        return run

    timings = measure.measure(
        {"slow": step("slow", 3.0), "fast": step("fast", 0.5)},
        rounds=2,
        steps=2,
        warmup=1,
        baseline="slow",
    )
    assert calls == ["slow"] * 3 + ["fast"] * 3 + ["slow"] * 3 + ["fast"] * 3
    assert timings["slow"] == Timing(3.0, 3.0, 3.0, 2, 1.0, (3.0, 3.0))
    assert timings["fast"] == Timing(0.5, 0.5, 0.5, 2, 6.0, (0.5, 0.5))


def test_ratio_is_paired_by_round() -> None:
    """A machine that slows down threefold half way leaves the ratio alone."""
    base, mine = iter([2.0, 2.0, 6.0, 6.0, 6.0]), iter([1.0, 1.0, 3.0, 3.0, 3.0])
    timings = take_turns(
        {"base": lambda: next(base), "mine": lambda: next(mine)}, rounds=5, baseline="base"
    )
    assert timings["mine"].ratio == 2.0
    assert timings["mine"].median == 3.0
    assert timings["mine"].p10 == 1.0
    assert timings["base"].p90 == 6.0


def test_it_ends_when_told_so_after_a_whole_round() -> None:
    timings = take_turns(
        {"one": lambda: 1.0, "two": lambda: 2.0}, rounds=9, over=lambda done: done == 2
    )
    assert [timing.n for timing in timings.values()] == [2, 2]
    assert timings["two"].samples == (2.0, 2.0)
    assert take_turns({"one": lambda: 1.0}, rounds=9, over=lambda done: True)["one"].n == 1


@pytest.mark.parametrize(("rounds", "baseline"), [(0, None), (1, "other")])
def test_nonsense_is_refused(rounds: int, baseline: str | None) -> None:
    with pytest.raises(ValueError, match="measure: expected"):
        take_turns({"one": lambda: 1.0}, rounds=rounds, baseline=baseline)


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a worker's process import this file: it gets the module path of its parent."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))


def hungry(amount: int) -> Variant:
    held = []
    return Variant(lambda: held.append(bytearray(b"x") * amount))


def broken(when: str) -> Variant:
    if when == "made":
        raise KeyError(when)

    def step() -> None:
        raise KeyError(when)

    return Variant(step)


def deadly() -> Variant:
    return Variant(lambda: os._exit(3))


@pytest.mark.usefixtures("importable")
def test_worker_counts_its_own_memory() -> None:
    ours = measure.peak_memory()
    with worker(hungry, 300 * MEBIBYTE) as running:
        before = running.memory()
        assert running.seconds(steps=1, warmup=0) > 0
        grown = running.memory() - before
    assert 290 * MEBIBYTE < grown < 330 * MEBIBYTE
    assert measure.peak_memory() - ours < 100 * MEBIBYTE


@pytest.mark.parametrize("when", ["made", "run"])
@pytest.mark.usefixtures("importable")
def test_errors_come_back_from_a_worker(when: str) -> None:
    with pytest.raises(KeyError, match=when), worker(broken, when) as running:
        running.seconds(steps=1, warmup=0)


def sleepy() -> Variant:
    return Variant(lambda: time.sleep(60), facts=lambda: {"pid": os.getpid()})


@pytest.mark.usefixtures("importable")
def test_an_interrupt_is_for_the_parent_alone_and_does_not_wait() -> None:
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), worker(sleepy) as running:
        pid = running.facts()["pid"]
        os.kill(pid, signal.SIGINT)
        assert running.facts() == {"pid": pid}
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        running.seconds(steps=1, warmup=0)
    assert time.monotonic() - begun < 50
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.usefixtures("importable")
def test_a_worker_that_dies_is_reported() -> None:
    with worker(deadly) as running, pytest.raises(RuntimeError, match="ended early"):
        running.seconds(steps=1, warmup=0)


def endless() -> Variant:
    def step() -> None:
        while True:
            time.sleep(0.01)

    return Variant(step)


@pytest.mark.usefixtures("importable")
def test_ctrl_c_is_for_the_process_that_asks() -> None:
    """A worker goes on; it is ended where nobody waits for it, in the middle of a step too."""
    with worker(hungry, 1) as running:
        os.kill(int(running._process.pid or 0), signal.SIGINT)
        assert running.seconds(steps=1, warmup=0) > 0
    with pytest.raises(KeyboardInterrupt), worker(endless) as running:
        running._connection.send(("seconds", {"steps": 1, "warmup": 0}))
        raise KeyboardInterrupt
