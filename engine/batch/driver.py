"""The driver: one queue to one pool, wherever its workers are; retries, and the journal.

Jobs of one group are given out together, so that a worker fits them in one prepared step. How many
together shrinks towards the end, so that all workers end at about the same time (guided
self-scheduling, Polychronopoulos and Kuck 1987). Jobs whose worker was lost are given out one by
one from then on: of several, one may have been to blame.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flashdip.engine.batch.jobs import Job, Outcome
from flashdip.engine.batch.journal import Journal
from flashdip.engine.batch.pool import Event, Lost, Pool
from flashdip.engine.errors import OutputError

ATTEMPTS = 3  # workers that a job may be lost with before it has failed
_TICK = 0.2  # seconds between two looks at the outside


class Source(Protocol):
    """Where jobs come from."""

    @property
    def over(self) -> bool:
        """Whether no more will come."""
        ...

    def look(self) -> Sequence[tuple[Job, str]]:
        """Return new jobs, each with the name of its source, without waiting for any."""
        ...


class Listed:
    """Jobs that are all known. See `Source`."""

    def __init__(self, jobs: Sequence[tuple[Job, str]]) -> None:
        self._jobs: Sequence[tuple[Job, str]] | None = jobs

    @property
    def over(self) -> bool:
        """Whether they were returned."""
        return self._jobs is None

    def look(self) -> Sequence[tuple[Job, str]]:
        """Return all, once."""
        jobs, self._jobs = self._jobs or (), None
        return jobs


@dataclass
class _Queue:
    """Jobs that wait.

    Attributes:
        groups: Jobs that may be given out together; the largest pictures come first, because a
            long job at the end keeps the others waiting.
        alone: Jobs that a worker was lost with.
        names: Of all of them.
    """

    groups: dict[tuple[Any, ...], deque[Job]] = field(default_factory=dict)
    alone: deque[Job] = field(default_factory=deque)

    names: set[str] = field(default_factory=set)

    def add(self, jobs: Sequence[Job]) -> None:
        """Add jobs, none of which waits already."""
        for job in jobs:
            self.names.add(job.name)
            self.groups.setdefault(job.group, deque()).append(job)
        order = sorted(self.groups.items(), key=lambda item: -item[1][0].pixels)
        self.groups = dict(order)

    @property
    def memory(self) -> int:
        """What the next job takes, in bytes."""
        following = next(iter(self.groups.values()), self.alone)
        return following[0].memory

    def take(self, most: int, workers: int) -> list[Job]:
        """Remove and return jobs for one worker of so many."""
        if self.groups:
            group, waiting = next(iter(self.groups.items()))
            # Not too few, where a step that was compiled and captured is to serve for many.
            share = max(most // 8, len(waiting) // (2 * workers))
            count = min(most, share, len(waiting))
            taken = [waiting.popleft() for _ in range(count)]
            if not waiting:
                del self.groups[group]
        else:
            taken = [self.alone.popleft()]
        self.names -= {job.name for job in taken}
        return taken

    def again(self, job: Job) -> None:
        """Put a job back, to be given out by itself."""
        self.names.add(job.name)
        self.alone.append(job)


def drive(
    source: Source,
    pool: Pool,
    journal: Journal,
    *,
    interrupted: Callable[[], bool] = lambda: False,
) -> Iterator[Outcome | None]:
    """Do all jobs, and yield how each of them ended, as soon as it did.

    Args:
        source: Of the jobs.
        pool: Does them; it is not closed.
        journal: Notes what becomes of them.
        interrupted: Asked now and then; when it returns True, what runs is left.

    Yields:
        Outcomes, and None now and then for whoever shows the state of things.

    Raises:
        OutputError: Nothing can be written; what was not yielded can be done later.
        UnavailableError: Workers cannot run.
    """
    waiting, attempts = _Queue(), dict[str, int]()
    running: dict[str, Job] = {}
    changed: dict[str, tuple[Job, str]] = {}  # came again while they ran
    while not interrupted():
        arrived = [] if source.over else source.look()
        added = []
        for job, name in arrived:
            if job.name in running:
                changed[job.name] = job, name
            elif job.name not in waiting.names:
                added.append((job, name))
        added += [changed.pop(name) for name in list(changed) if name not in running]
        if added:
            journal.add([(job.name, name, job.pixels) for job, name in added])
            waiting.add([job for job, _ in added])
        while pool.free and waiting.names and pool.holds(waiting.memory):
            jobs = waiting.take(pool.together, pool.size)
            journal.running([job.name for job in jobs])
            running |= {job.name: job for job in jobs}
            pool.submit(jobs)
        if source.over and not (running or waiting.names or changed):
            return
        for event in pool.poll(_TICK):
            for outcome in _outcomes(event, running, waiting, attempts, journal):
                journal.ended(outcome, running.pop(outcome.name).pixels)
                yield outcome
        yield None
    journal.waiting(list(running), lost=False)


def _outcomes(
    event: Event,
    running: dict[str, Job],
    waiting: _Queue,
    attempts: dict[str, int],
    journal: Journal,
) -> list[Outcome]:
    """Return what an event ends; put what it loses back into the queue."""
    match event:
        case Outcome():
            return [event]
        case Lost(names=names, reason=reason):
            for name in names:
                attempts[name] = attempts.get(name, 0) + 1
            failed = [name for name in names if attempts[name] >= ATTEMPTS]
            again = [name for name in names if name not in failed]
            journal.waiting(names, lost=True)
            for name in again:
                waiting.again(running.pop(name))
            line = f"given up after {ATTEMPTS} attempts: {reason}"
            return [Outcome(name, "failed", line) for name in failed]
        case _:
            raise OutputError(f"{event.reason}; the same command goes on")
