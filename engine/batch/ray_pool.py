"""The same batch on a Ray cluster: jobs become Ray tasks, placed by CPUs, GPUs and memory.

Which node runs what, and when, is Ray's affair; retries are the driver's, as on one machine, so
that one journal tells about all of them. Results go to storage that every node reaches. The nodes
need this version of FlashDIP installed.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from flashdip.engine.batch.jobs import Job, Outcome
from flashdip.engine.batch.pool import Event, Lost
from flashdip.engine.batch.worker import Hopeless, HopelessError, Station, perform, settle
from flashdip.engine.errors import ConfigError, UnavailableError
from flashdip.engine.files import one_line
from flashdip.engine.planning import size

_ASK_SECONDS = 1.0  # between two looks at what the cluster has
_SURPLUS = 0.1  # of tasks that wait, so that an autoscaler sees that there is more to do


class RayPool:
    """Tasks on a cluster. See `Pool`.

    Args:
        address: Of the cluster, such as "10.0.0.1:6379"; "auto" finds the one of this machine. A
            connection that this process has already is used, and kept.
        backend: Name of one, or "auto".
        device: "cpu", "cuda", or "auto": GPUs if the cluster has any.
        threads: CPUs for each task.
        idle: Bytes of memory that a worker takes beside its jobs.
        room: Bytes that a job may take; a picture that needs more is tiled. None: what its node
            has.

    Raises:
        ConfigError: The device is not one of these.
        UnavailableError: Ray is not installed or not reached, or no node is large enough.
    """

    def __init__(
        self,
        address: str,
        *,
        backend: str = "auto",
        device: str = "auto",
        threads: int = 1,
        idle: int = 0,
        room: int | None = None,
    ) -> None:
        try:
            import ray
        except ImportError:
            raise UnavailableError(
                "Ray is not installed: pip install 'flashdip[cluster]'"
            ) from None
        if device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device: expected auto, cpu or cuda with Ray, got {device!r}")
        self._ray: Any = ray  # of which only a part is typed
        self._own = not ray.is_initialized()
        if self._own:
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UnavailableError(
                    f"Ray: expected a cluster at {one_line(address)}, got none: {one_line(error)}"
                ) from None
        gpu = device == "cuda" or (device == "auto" and self._resources().get("GPU", 0) >= 1)
        self._kind = "GPU" if gpu else "CPU"
        self._station = Station("cuda" if gpu else "cpu", backend, threads, room=room, share=room)
        self._needs = {"CPU": float(threads)} | ({"GPU": 1.0} if gpu else {})
        self._idle = idle
        self.together = self._station.together
        # A process serves for many tasks on a GPU, too: steps stay compiled.
        self._work = ray.remote(max_calls=0)(_work)
        self._options = {
            **{"num_cpus": threads, "num_gpus": int(gpu), "num_returns": "streaming"},
            **{"max_retries": 0, "scheduling_strategy": "SPREAD", "name": "flashdip"},
        }
        self._refused: list[Event] = []
        self._running: dict[Any, dict[str, None]] = {}  # by generator: names not told about
        self._size, self._asked = 0, -math.inf
        if not self._hold(self._needs):
            needs = ", ".join(f"{amount:g} {name}" for name, amount in self._needs.items())
            self.close()
            raise UnavailableError(
                f"Ray: expected a node with {needs}, got a cluster without: add such a node"
            )

    def _resources(self) -> dict[str, float]:
        found: dict[str, float] = self._ray.cluster_resources()
        return found

    def _hold(self, needs: Mapping[str, float]) -> bool:
        """Tell whether some node has all of this; elsewhere a task would wait for ever."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return any(
            all(node.get(name, 0) >= amount for name, amount in needs.items()) for node in nodes
        )

    @property
    def size(self) -> int:
        """How many tasks the cluster runs at the same time, as far as CPUs and GPUs go."""
        if time.monotonic() - self._asked > _ASK_SECONDS:
            amount = self._resources().get(self._kind, 0)
            self._size = max(1, int(amount / self._needs[self._kind]))
            self._asked = time.monotonic()
        return self._size

    @property
    def free(self) -> int:
        """How many tasks could be given jobs now."""
        return max(0, self.size + math.ceil(_SURPLUS * self.size) - len(self._running))

    @property
    def busy(self) -> int:
        """How many tasks have jobs."""
        return min(len(self._running), self.size)

    def holds(self, memory: int) -> bool:
        """Leave it to Ray: a task waits until a node has room."""
        return True

    def submit(self, jobs: Sequence[Job]) -> None:
        """Give jobs to a task."""
        needs, options = dict(self._needs), dict(self._options)
        room = self._station.room
        if taken := max(job.memory for job in jobs):
            taken = self._idle + (taken if room is None else min(taken, room))
            needs["memory"] = options["memory"] = taken
        if not self._hold(needs):
            reason = f"expected a node with {size(taken)} of memory, got none so large"
            self._refused += [Outcome(job.name, "failed", f"Ray: {reason}") for job in jobs]
            return
        generator = self._work.options(**options).remote(list(jobs), self._station)
        self._running[generator] = dict.fromkeys(job.name for job in jobs)

    def poll(self, seconds: float) -> list[Event]:
        """Return what happened."""
        refused, self._refused = self._refused, []
        if refused or not self._running:
            time.sleep(0 if refused else seconds)
            return refused
        ready, _ = self._ray.wait(list(self._running), timeout=seconds, fetch_local=False)
        return [event for generator in ready for event in self._events(generator)]

    def _events(self, generator: Any) -> Iterator[Event]:
        """Yield what a task that has something to say says next."""
        names = self._running[generator]
        try:
            said: Outcome | Hopeless = self._ray.get(next(generator))
        except StopIteration:
            del self._running[generator]
            return
        except self._ray.exceptions.RayError as error:
            del self._running[generator]
            yield Lost(tuple(names), f"{type(error).__name__}: {one_line(error)}")
            return
        if isinstance(said, Outcome):
            names.pop(said.name, None)
        yield said

    def close(self) -> None:
        """End all tasks at once; leave the cluster, if this pool has joined it."""
        for generator in self._running:
            with suppress(self._ray.exceptions.RayError, ValueError, TypeError):
                self._ray.cancel(generator, force=True)
        self._running.clear()
        if self._own:
            self._ray.shutdown()


def _work(jobs: list[Job], station: Station) -> Iterator[Outcome | Hopeless]:
    """Do jobs: the task that runs on a node."""
    settle(station)
    try:
        yield from perform(jobs, station)
    except HopelessError as error:
        yield Hopeless(str(error))
