"""Where jobs run, as the driver sees it; and the pool of this machine's own processes."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import IO, Protocol

from flashdip.engine.batch.jobs import Job, Outcome
from flashdip.engine.batch.worker import Hello, Hopeless, Idle, Said, Station
from flashdip.engine.errors import UnavailableError
from flashdip.engine.files import one_line
from flashdip.engine.planning import MARGIN

_MOST_FALSE_STARTS = 3  # of each worker, on average, before the pool gives up


@dataclass(frozen=True)
class Lost:
    """A worker died; these of its jobs it had not told about."""

    names: tuple[str, ...]
    reason: str


Event = Outcome | Lost | Hopeless


class Pool(Protocol):
    """Workers, on this machine or elsewhere."""

    @property
    def size(self) -> int:
        """How many workers there are, dead ones that are being replaced included."""
        ...

    @property
    def together(self) -> int:
        """The most jobs that a worker should be given at a time."""
        ...

    @property
    def free(self) -> int:
        """How many could be given jobs now."""
        ...

    @property
    def busy(self) -> int:
        """How many have jobs."""
        ...

    def holds(self, memory: int) -> bool:
        """Tell whether there is room for another job that takes so many bytes, as far as known."""
        ...

    def submit(self, jobs: Sequence[Job]) -> None:
        """Give jobs to a free worker, together."""
        ...

    def poll(self, seconds: float) -> list[Event]:
        """Return what happened; wait so long for something to happen.

        Raises:
            UnavailableError: Workers cannot run.
        """
        ...

    def close(self) -> None:
        """End all workers at once, whatever they do."""
        ...


@dataclass(eq=False)
class _Worker:
    """A process, and what it was given.

    Attributes:
        idle: It waits for jobs; False too while it starts.
        names: Of its jobs that it has not told about, with the memory that each takes.
    """

    station: Station
    process: subprocess.Popen[bytes]
    connection: Connection
    errors: IO[bytes]
    started: bool = False
    idle: bool = False
    names: dict[str, int] = field(default_factory=dict)


class LocalPool:
    """Processes of this machine, one for each station. See `Pool`.

    They are started afresh (a fork would copy threads and a GPU's context), live as long as the
    pool, and end by themselves when this process is gone.

    Args:
        stations: Where they run. A job that takes more memory than their room runs alone.
    """

    def __init__(self, stations: Sequence[Station]) -> None:
        self._room = stations[0].room
        self.together = max(station.together for station in stations)
        self._false_starts = 0
        self._workers: list[_Worker] = []
        try:
            self._workers.extend(_start(station) for station in stations)
        except BaseException:
            self.close()
            raise

    @property
    def size(self) -> int:
        """How many workers there are."""
        return len(self._workers)

    @property
    def free(self) -> int:
        """How many could be given jobs now."""
        return sum(worker.idle for worker in self._workers)

    @property
    def busy(self) -> int:
        """How many have jobs."""
        return sum(bool(worker.names) for worker in self._workers)

    def holds(self, memory: int) -> bool:
        """Tell whether there is room for another job."""
        taken = [max(worker.names.values()) for worker in self._workers if worker.names]
        return self._room is None or not taken or MARGIN * (sum(taken) + memory) <= self._room

    @property
    def processes(self) -> list[int]:
        """Their numbers."""
        return [worker.process.pid for worker in self._workers]

    def submit(self, jobs: Sequence[Job]) -> None:
        """Give jobs to a free worker."""
        worker = next(worker for worker in self._workers if worker.idle)
        worker.idle, worker.names = False, {job.name: job.memory for job in jobs}
        with suppress(OSError):  # it died; `poll` will see it
            worker.connection.send_bytes(pickle.dumps(list(jobs)))

    def poll(self, seconds: float) -> list[Event]:
        """Return what happened."""
        wait([worker.connection for worker in self._workers], seconds)
        return [event for worker in list(self._workers) for event in self._events(worker)]

    def _events(self, worker: _Worker) -> list[Event]:
        # Asked before its last words are read: a process may outlive the connection, or its
        # children may hold the connection open after it.
        ended = worker.process.poll() is not None
        events: list[Event] = []
        try:
            while worker.connection.poll():
                said: Said = pickle.loads(worker.connection.recv_bytes())
                match said:
                    case Idle():
                        worker.started, worker.idle, self._false_starts = True, True, 0
                    case Hopeless():
                        events.append(said)
                    case Outcome():
                        worker.names.pop(said.name, None)
                        events.append(said)
        except (EOFError, OSError):
            ended = True
        return [*events, self._replace(worker)] if ended else events

    def _replace(self, worker: _Worker) -> Lost:
        """Start another worker in place of a dead one."""
        _end(worker)
        reason = _last_words(worker)
        if not worker.started:
            self._false_starts += 1
            if self._false_starts >= _MOST_FALSE_STARTS * self.size:
                raise UnavailableError(
                    f"workers: expected processes that start, got {self._false_starts} in a row "
                    f"that did not: {reason}"
                )
        self._workers[self._workers.index(worker)] = _start(worker.station)
        worker.errors.close()
        return Lost(tuple(worker.names), reason)

    def close(self) -> None:
        """Kill all workers. What they publish appears whole or not at all."""
        for worker in self._workers:
            _end(worker)
            worker.errors.close()
        self._workers.clear()


def _start(station: Station) -> _Worker:
    """Start a process.

    Raises:
        UnavailableError: The system does not let it.
    """
    ours, theirs = Pipe()
    with theirs, ExitStack() as undo:
        undo.callback(ours.close)
        try:
            errors = undo.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "flashdip.engine.batch.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=os.environ | {"OMP_NUM_THREADS": str(station.threads)},
                process_group=0,  # Ctrl-C is for the driver alone
            )
        except OSError as error:
            raise UnavailableError(f"workers: cannot be started: {one_line(error)}") from error
        undo.pop_all()
    with suppress(OSError):  # it died; `poll` will see it
        ours.send_bytes(pickle.dumps(Hello(station, sys.path)))
    return _Worker(station, process, ours, errors)


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.wait()
    worker.connection.close()


def _last_words(worker: _Worker) -> str:
    """Say how a process ended."""
    code = worker.process.returncode
    if code < 0:
        line = f"its worker was ended by {signal.Signals(-code).name}"
        line += ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
    else:
        line = f"its worker ended with code {code}"
    worker.errors.seek(0)
    lines = worker.errors.read()[-4000:].decode(errors="replace").strip().splitlines()
    return one_line(f"{line}: {lines[-1]}" if lines else line)
