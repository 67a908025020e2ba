"""A folder that is served: files are taken when they are complete, and again when they change."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flashdip.engine.batch import storage
from flashdip.engine.batch.inputs import Found, Maker, expand
from flashdip.engine.batch.jobs import Job, Opened, Outcome
from flashdip.engine.errors import InputError

SECONDS = 2.0  # between two looks


@dataclass(frozen=True)
class RefusedJob:
    """A picture that no job can be made of. See `Job`.

    Attributes:
        name: What its output would be called.
        reason: Why not.
    """

    name: str
    reason: str
    pixels: int = 1
    memory: int = 0

    @property
    def group(self) -> tuple[Any, ...]:
        """Its own."""
        return (self.name,)

    def open(self) -> Opened | Outcome:
        """Refuse."""
        raise InputError(self.reason)


class Watched:
    """New and changed pictures, for ever. See `Source`.

    A file counts as complete when size and time are the same in two looks.

    Args:
        inputs: Files, folders, patterns; they may name nothing yet.
        maker: Makes jobs of pictures.
    """

    over = False

    def __init__(self, inputs: Sequence[str], maker: Maker) -> None:
        self._inputs, self._maker = inputs, maker
        self._seen: dict[str, tuple[Any, ...]] = {}  # by source, in the last look
        self._taken: dict[str, tuple[Any, ...]] = {}  # by source, when a job was made
        self._names: dict[str, str] = {}  # of outputs, to their source
        self._next = 0.0

    def look(self) -> Sequence[tuple[Job, str]]:
        """Return jobs for what is complete and was not taken as it is now."""
        if time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + SECONDS
        found = {one.source: one for each in self._inputs for one in self._expand(each)}
        before, self._seen = self._seen, {}
        for source in found:
            stamp = storage.signature(source)
            if stamp is not None:
                self._seen[source] = stamp
        return [
            self._job(found[source], stamp)
            for source, stamp in self._seen.items()
            if before.get(source) == stamp and self._taken.get(source) != stamp
        ]

    def _expand(self, each: str) -> list[Found]:
        try:
            return expand([each], self._maker.outputs)
        except InputError:  # there is nothing yet
            return []

    def _job(self, one: Found, stamp: tuple[Any, ...]) -> tuple[Job, str]:
        self._taken[one.source] = stamp
        try:
            ((job, source),) = self._maker.jobs([one])
            other = self._names.setdefault(job.name, source)
            if other != source:
                raise InputError(f"output {job.name}: expected a name that {other} has not taken")
        except InputError as error:
            name, source = (
                each.encode(errors="replace").decode() for each in (one.name, one.source)
            )
            return RefusedJob(name, str(error)), source
        return job, source
