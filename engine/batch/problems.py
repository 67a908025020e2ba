"""A batch from Python: problems in, results out as they finish, nothing on disk."""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from flashdip.engine.batch.driver import Listed, drive
from flashdip.engine.batch.jobs import Opened, Outcome
from flashdip.engine.batch.journal import Journal
from flashdip.engine.batch.machine import stations
from flashdip.engine.batch.pool import LocalPool, Pool
from flashdip.engine.batch.worker import Station
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, InputError
from flashdip.engine.files import one_line
from flashdip.engine.fit import check
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result
from flashdip.engine.stopping import Stopping
from flashdip.engine.tasks import Statement


@dataclass(frozen=True, eq=False)
class Failure:
    """A problem whose fit did not come to a result.

    Attributes:
        reason: Why, one line.
    """

    reason: str


@dataclass(frozen=True)
class ProblemJob:
    """One problem, from memory to memory. See `Job`.

    Attributes:
        name: Its index.
        stated: Pickled: problem, config, truth.
        shapes: Of the image and of the observation.
        memory: Not looked at.
    """

    name: str
    stated: bytes
    shapes: tuple[tuple[int, ...], ...]
    memory: int = 0

    @property
    def group(self) -> tuple[Any, ...]:
        """The shapes."""
        return self.shapes

    @property
    def pixels(self) -> int:
        """Of the image."""
        return self.shapes[0][1] * self.shapes[0][2]

    def open(self) -> Opened:
        """Read the problem."""
        problem, config, truth = pickle.loads(self.stated)
        stated = Statement(problem, config, truth, (), picture=None, factor=None)
        return Opened(stated, self._hand_over)

    def _hand_over(self, result: Result) -> Outcome:
        return Outcome(self.name, "done", result=result)


def run(
    problems: Sequence[Problem],
    config: FitConfig,
    *,
    seeds: Sequence[int] | None = None,
    truths: Sequence[Tensor | None] | None = None,
    workers: int | None = None,
    backend: str = "auto",
    device: str = "auto",
    pool: Pool | None = None,
) -> Iterator[tuple[int, Result | Failure]]:
    """Fit a network to each of many problems, on all devices of this machine, or on a pool.

    Workers are processes of their own: operators must be such that another process can import them,
    from an installed package or from a module on `sys.path`.

    Args:
        problems: Single fits (F = 1) of any shapes; equal ones are fitted in one prepared step.
        config: How; the network's outputs are set to each image's channels.
        seeds: Of each problem; None: the config's for all.
        truths: The undamaged images, [C, H, W] each, or None; only to report the PSNR.
        workers: Processes on a CPU; None: one a core, or one for each GPU.
        backend: "auto", or the name of one.
        device: "auto", "cpu", "cuda" (all of them), "cuda:1", "mps", "xpu".
        pool: Where to fit instead, such as a `RayPool`; it is left open.

    Returns:
        An iterator over (index of the problem, its result, or why there is none), in the order in
        which they end. Closing it ends the workers.

    Raises:
        InputError: Problems, config, seeds and truths do not go together.
        UnavailableError: The backend or device cannot be used here, or workers cannot run.
    """
    for name, given in (("seeds", seeds), ("truths", truths)):
        if given is not None and len(given) != len(problems):
            raise ConfigError(
                f"{name}: expected one for each of the {len(problems)} problems, got {len(given)}"
            )
    jobs = []
    for index, problem in enumerate(problems):
        truth = None if truths is None else truths[index]
        check(problem, truth)
        own = config if seeds is None else replace(config, seed=seeds[index])
        Stopping(own, problem.sigma)
        jobs.append(_job(index, problem, own, truth))
    if pool is not None:
        return _results(jobs, pool)
    places = stations(backend, device, [config], workers, len(jobs))
    return _alone(jobs, places) if jobs else iter(())


def _job(index: int, problem: Problem, config: FitConfig, truth: Tensor | None) -> ProblemJob:
    try:
        stated = pickle.dumps((problem, config, truth))
    except Exception as error:  # an operator's own __reduce__ may raise anything
        raise InputError(
            f"problem {index}: expected one that can be sent to another process, got "
            f"{one_line(error)}: define its operator in a module"
        ) from None
    return ProblemJob(str(index), stated, (tuple(problem.shape), tuple(problem.observation.shape)))


def _alone(jobs: list[ProblemJob], places: list[Station]) -> Iterator[tuple[int, Result | Failure]]:
    """Use workers of our own, for as long as somebody asks for results."""
    with closing(LocalPool(places)) as pool:
        yield from _results(jobs, pool)


def _results(jobs: list[ProblemJob], pool: Pool) -> Iterator[tuple[int, Result | Failure]]:
    with Journal(":memory:") as journal:
        for outcome in drive(Listed([(job, "memory") for job in jobs]), pool, journal):
            if outcome is not None:
                failure = Failure(outcome.reason or "")
                yield int(outcome.name), failure if outcome.result is None else outcome.result
