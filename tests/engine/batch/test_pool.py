"""Processes of this machine: started afresh, replaced when they die, gone when they should be."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from flashdip.engine.batch import run
from flashdip.engine.batch.jobs import Opened, Outcome
from flashdip.engine.batch.pool import Event, LocalPool, Lost
from flashdip.engine.batch.problems import Failure
from flashdip.engine.batch.worker import Station
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, InputError, UnavailableError
from flashdip.engine.fit import fit
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result
from tests.batches import alive

TINY = FitConfig(
    network=SkipConfig(inputs=4, down=(8, 8), skip=2, upsample="nearest"),
    iterations=6,
    read_every=2,
    precision="fp32",
)


@dataclass(frozen=True)
class Act:
    """A job that does something in the worker: dies, or tells about it."""

    name: str
    action: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    pixels: int = 1
    memory: int = 0

    @property
    def group(self) -> tuple[Any, ...]:
        return ()

    def open(self) -> Opened | Outcome:
        return Outcome(self.name, "done", record={"said": self.action(*self.arguments)})


def until(pool: LocalPool, wanted: Callable[[list[Event]], bool]) -> list[Event]:
    events: list[Event] = []
    end = time.monotonic() + 60
    while not wanted(events):
        assert time.monotonic() < end, events
        events += pool.poll(0.1)
    return events


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    pool = LocalPool([Station("cpu", threads=3)])
    yield pool
    processes = pool.processes
    pool.close()
    assert not any(map(alive, processes))


def test_a_worker_has_the_threads_of_its_station(pool: LocalPool) -> None:
    until(pool, lambda events: pool.free == 1)
    pool.submit([Act("a", torch.get_num_threads), Act("b", os.getpid)])
    assert (pool.free, pool.busy) == (0, 1)
    a, b = until(pool, lambda events: pool.free == 1)
    assert isinstance(a, Outcome)
    assert isinstance(b, Outcome)
    assert a.record["said"] == 3
    assert b.record["said"] in pool.processes
    assert b.record["said"] != os.getpid()


@pytest.mark.parametrize(
    ("action", "arguments", "words"),
    [(signal.raise_signal, (signal.SIGSEGV,), "SIGSEGV"), (os._exit, (7,), "code 7")],
)
def test_a_dead_worker_is_replaced_and_its_jobs_are_told(
    pool: LocalPool, action: Callable[..., Any], arguments: tuple[Any, ...], words: str
) -> None:
    until(pool, lambda events: pool.free == 1)
    pool.submit([Act("a", os.getpid), Act("b", action, arguments), Act("c", os.getpid)])
    first, lost = until(pool, lambda events: pool.free == 1)
    assert isinstance(first, Outcome)
    assert isinstance(lost, Lost)
    assert lost.names == ("b", "c")
    assert words in lost.reason
    pool.submit([Act("c", os.getpid)])
    (again,) = until(pool, lambda events: pool.free == 1)
    assert isinstance(again, Outcome)
    assert again.record["said"] != first.record["said"]


def test_jobs_share_the_memory_there_is() -> None:
    with closing(LocalPool([Station("cpu", room=115)] * 2)) as pool:
        until(pool, lambda events: pool.free == 2)
        assert pool.holds(116)  # by itself
        pool.submit([Act("a", time.sleep, (60,), memory=60), Act("b", os.getpid, memory=10)])
        assert pool.holds(40)
        assert not pool.holds(41)


def test_workers_that_cannot_start_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        closing(LocalPool([Station("cpu")])) as pool,
        pytest.raises(UnavailableError, match="expected processes that start"),
    ):
        until(pool, lambda events: False)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(UnavailableError, match="cannot be started"):
        LocalPool([Station("cpu")])


def problem(seed: int, height: int = 16) -> Problem:
    noise = torch.rand(1, 3, height, 20, generator=torch.Generator().manual_seed(seed))
    return Problem(noise, (3, height, 20))


def test_problems_from_python_come_back_as_they_end() -> None:
    problems = [problem(0), problem(1, 24), problem(2), problem(3)]
    seeds = [5, 6, 7, 8]
    found = dict(run(problems, TINY, seeds=seeds, workers=2, truths=[None, None, None, _TRUTH]))
    assert sorted(found) == [0, 1, 2, 3]
    for index, result in found.items():
        assert isinstance(result, Result)
        alone = fit(problems[index], FitConfig(**{**vars(TINY), "seed": seeds[index]}))
        torch.testing.assert_close(result.image, alone.image, atol=1e-4, rtol=0)
        assert result.record["seed"] == seeds[index]
        assert result.weights.keys() == alone.weights.keys()
        assert (result.psnr is not None) == (index == 3)


_TRUTH = torch.full((3, 16, 20), 0.5)


class Broken(torch.nn.Module):
    """An operator that works once: when the problem is stated."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("the instrument is broken")
        return x


def test_a_problem_that_fails_does_not_end_the_others() -> None:
    problems = [problem(0), Problem(problem(1).observation, (3, 16, 20), Broken()), problem(2)]
    found = dict(run(problems, TINY, workers=2))
    failure = found[1]
    assert isinstance(failure, Failure)
    assert "the instrument is broken" in failure.reason
    assert all(isinstance(found[index], Result) for index in (0, 2))


def test_what_cannot_be_done_is_refused_before_anything_starts() -> None:
    with pytest.raises(InputError, match="problem 1: expected one that can be sent"):
        run([problem(0), Problem(problem(1).observation, (3, 16, 20), lambda x: x)], TINY)
    with pytest.raises(ConfigError, match="seeds"):
        run([problem(0)], TINY, seeds=[1, 2])
    with pytest.raises(ConfigError, match="workers"):
        run([problem(0)], TINY, workers=0)
    with pytest.raises(ConfigError, match="backend"):
        run([problem(0)], TINY, backend="nothing")
    assert list(run([], TINY)) == []
