"""Do jobs: those of one shape in one step, many at once where the device has room for them.

`perform` is what a worker does with the jobs it is given, wherever it runs. As a program, this
module is a worker of `LocalPool`: it takes jobs from a socket and tells outcomes, and ends when the
other end is gone, whatever it is doing then.
"""

import dataclasses
import functools
import os
import pickle
import queue
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, TypeVar

from flashdip.engine.batch.jobs import Job, Opened, Outcome
from flashdip.engine.batch.storage import hopeless
from flashdip.engine.errors import FlashDIPError
from flashdip.engine.files import one_line

if TYPE_CHECKING:
    from flashdip.engine.planning import Plan
    from flashdip.engine.task_options import FitOptions

_T = TypeVar("_T")


class HopelessError(Exception):
    """No job can succeed for now, because nothing can be written."""


@dataclass(frozen=True)
class Station:
    """Where a worker runs.

    Attributes:
        device: Such as "cpu" or "cuda:1".
        backend: Name of one, or "auto".
        threads: Of the CPU, that it may use.
        at_once: Fits side by side; None: as many as suit the device.
        room: Bytes of memory that jobs may take here, all workers' together; None: not known.
        share: That of one worker.
    """

    device: str
    backend: str = "auto"
    threads: int = 1
    at_once: int | None = None
    room: int | None = None
    share: int | None = None

    @property
    def together(self) -> int:
        """The most jobs that are worth being given together.

        A step that was compiled and captured, on a GPU, is to serve for many of them.
        """
        return 8 if self.device == "cpu" else 64


def settle(station: Station) -> None:
    """Prepare this process for jobs: import torch, take so many threads."""
    import torch

    torch.set_num_threads(station.threads)


def perform(jobs: Sequence[Job], station: Station) -> Iterator[Outcome]:
    """Do jobs, and yield how each of them ended, in any order.

    Raises:
        HopelessError: The disk is full; what was not yielded is not done.
    """
    alike: dict[Any, list[tuple[Job, Opened]]] = {}
    for job in jobs:
        opened = _tried(job, job.open)
        if isinstance(opened, Outcome):
            yield opened
            continue
        stated = opened.statement
        shapes = tuple(stated.problem.shape), tuple(stated.problem.observation.shape)
        config = dataclasses.replace(stated.config, seed=0)
        alike.setdefault((shapes, config, opened.tile), []).append((job, opened))
    for group in alike.values():
        found = _tried(group[0][0], functools.partial(_tiled, *group[0], station))
        if found is None:
            yield from _fit(group, station)
        elif isinstance(found, Outcome):
            yield from (dataclasses.replace(found, name=job.name) for job, _ in group)
        else:
            for job, opened in group:
                yield _tried(job, functools.partial(_fit_tiled, opened, found, station))


def _options(station: Station) -> "FitOptions":
    return {"backend": station.backend, "device": station.device}


def _tiled(job: Job, opened: Opened, station: Station) -> "Plan | None":
    """Return the plan of a picture that has to be tiled; None: it is fitted as a whole."""
    from flashdip.engine import planning, tasks
    from flashdip.engine.memory import resident

    room, whole = station.room, opened.tile is None
    if whole and job.memory and (room is None or planning.MARGIN * job.memory <= room):
        return None  # the driver sees to it that there is room; to plan would take memory, too
    if opened.statement.factor is None:
        return None
    options = _options(station) | {"tile": opened.tile}
    room = room if job.memory else station.share
    if room is not None:
        options["memory"] = (resident() or 0) + room
    found = tasks.planned(opened.statement, options)
    return None if found.tiling is None else found


def _fit_tiled(opened: Opened, found: "Plan", station: Station) -> Outcome:
    """Fit tile by tile; those that an earlier run left in the scratch folder are gone on from."""
    from flashdip.engine.tasks import solve

    options = _options(station)
    if opened.scratch is None:
        return opened.finish(solve(opened.statement, options, found))
    assert found.tiling is not None
    height, width = found.tiling.side
    folder = f"{opened.scratch}-{width}x{height}"
    outcome = opened.finish(solve(opened.statement, options | {"tiles": folder}, found))
    shutil.rmtree(folder, ignore_errors=True)
    return outcome


def _fit(group: Sequence[tuple[Job, Opened]], station: Station) -> Iterator[Outcome]:
    """Fit what is alike in one step; by itself, each of those that went wrong together."""
    from flashdip.engine.errors import DivergedError
    from flashdip.engine.fit_many import fit_many

    stated = [opened.statement for _, opened in group]
    left = dict(enumerate(group))
    try:
        results = fit_many(
            [each.problem for each in stated],
            stated[0].config,
            at_once=station.at_once,
            seeds=[each.config.seed for each in stated],
            truths=[each.truth for each in stated],
            backend=station.backend,
            device=station.device,
        )
        for index, result in results:
            job, opened = left.pop(index)
            notes = [*opened.statement.notes, *result.record["notes"]]
            noted = dataclasses.replace(result, record=result.record | {"notes": notes})
            yield _tried(job, functools.partial(opened.finish, noted))
    except HopelessError:
        raise
    except DivergedError:
        advice = "expected a finite loss that falls; lower --set learning_rate=0.01"
        for job, _ in left.values():
            yield Outcome(job.name, "failed", f"the fit diverged before it had any image: {advice}")
    except Exception as error:
        for job, opened in left.values():
            if len(left) == 1:
                yield _failed(job, error)
            else:
                yield from _fit([(job, opened)], station)


def _tried(job: Job, action: Callable[[], _T]) -> _T | Outcome:
    """Return what the action returns, or the outcome that it failed."""
    try:
        return action()
    except Exception as error:
        if hopeless(error):
            raise HopelessError(one_line(error)) from error
        return _failed(job, error)


def _failed(job: Job, error: Exception) -> Outcome:
    line = one_line(error)
    if not isinstance(error, FlashDIPError):
        line = f"{type(error).__name__}: {line}"
    return Outcome(job.name, "failed", line)


@dataclass(frozen=True)
class Hello:
    """The first thing that a worker is sent.

    Attributes:
        station: Where it runs.
        path: Where modules are found, as in the process that started it.
    """

    station: Station
    path: list[str]


@dataclass(frozen=True)
class Idle:
    """A worker has nothing to do: it has just started, or has done all it was given."""


@dataclass(frozen=True)
class Hopeless:
    """A worker can write nothing, and waits."""

    reason: str


Said = Outcome | Idle | Hopeless


def serve(connection: Connection) -> None:
    """Do what comes through a connection until its other end is closed."""
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, inbox), daemon=True).start()

    def say(said: Said) -> None:
        # Not Connection.send, which passes tensors through shared memory that a kill would leave.
        connection.send_bytes(pickle.dumps(said))

    hello: Hello = pickle.loads(inbox.get())
    sys.path[:] = hello.path
    settle(hello.station)
    while True:
        say(Idle())
        try:
            for outcome in perform(pickle.loads(inbox.get()), hello.station):
                say(outcome)
        except HopelessError as error:
            say(Hopeless(str(error)))


def _listen(connection: Connection, inbox: "queue.SimpleQueue[bytes]") -> None:
    """Pass on what comes; end the process, in the middle of a fit too, when nobody is there."""
    while True:
        try:
            inbox.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)


if __name__ == "__main__":
    # The classes must be those that the other side pickles, not those of __main__.
    from flashdip.engine.batch import worker

    worker.serve(Connection(int(sys.argv[1])))
