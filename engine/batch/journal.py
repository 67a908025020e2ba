"""The journal: what became of each job, in SQLite, written by the driver alone.

It tells a person and the summary; what is published is told by the outputs themselves, so that a
lost journal loses nothing. Write-ahead logging with an exclusive lock needs no shared memory, so
that the file may lie on any local disk, and a second driver is refused.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from flashdip.engine.batch.jobs import Outcome
from flashdip.engine.errors import OutputError
from flashdip.engine.files import one_line

_T = TypeVar("_T")
MOST_THUMBNAILS = 2000  # pairs kept for the page; each has a few kB
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
  name TEXT PRIMARY KEY,
  source TEXT NOT NULL,
  run INTEGER NOT NULL,     -- the last one that asked for it
  state TEXT NOT NULL,      -- waiting, running, done, kept, failed
  attempts INTEGER NOT NULL DEFAULT 0,  -- workers that were lost with it, in this run
  reason TEXT,
  record TEXT NOT NULL DEFAULT '{}',
  before BLOB,
  after BLOB,
  changed REAL NOT NULL     -- seconds since 1970
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (run, state);
CREATE TABLE IF NOT EXISTS runs (run INTEGER PRIMARY KEY, begun REAL NOT NULL);
"""


class Journal:
    """One batch's journal, for as long as its driver runs.

    Args:
        path: The file, made if missing; ":memory:" keeps nothing.

    Attributes:
        left: Jobs of this run that were added and have not ended.
        pixels_left: Theirs.
        pixels_done: Of the pictures that this run restored.

    Raises:
        OutputError: It cannot be opened, or another driver has it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.left = self.pixels_left = self.pixels_done = 0
        self._thumbnails = 0
        try:
            self._base = sqlite3.connect(self.path, isolation_level=None, timeout=1.0)
        except sqlite3.Error as error:
            raise self._failure(error) from error

        def begin() -> int:
            self._base.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._base.execute("PRAGMA journal_mode=WAL")
            self._base.execute("PRAGMA synchronous=NORMAL")
            self._base.executescript(_SCHEMA)
            cursor = self._base.execute("INSERT INTO runs (begun) VALUES (?)", (time.time(),))
            return int(cursor.lastrowid or 0)

        self.run = self._do(begin)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(sqlite3.Error):  # a full disk; what was committed stays
            self._base.close()

    def add(self, jobs: Sequence[tuple[str, str, int]]) -> None:
        """Note jobs, each a name, a source and a number of pixels, as waiting in this run."""
        rows = [(name, source, self.run, time.time()) for name, source, _ in jobs]
        self._many(
            "INSERT INTO jobs (name, source, run, state, changed) VALUES (?, ?, ?, 'waiting', ?) "
            "ON CONFLICT (name) DO UPDATE SET source = excluded.source, run = excluded.run, "
            "state = 'waiting', attempts = 0, reason = NULL, record = '{}', before = NULL, "
            "after = NULL, changed = excluded.changed",
            rows,
        )
        self.left += len(rows)
        self.pixels_left += sum(pixels for _, _, pixels in jobs)

    def running(self, names: Sequence[str]) -> None:
        """Note that jobs were given to a worker."""
        self._many(
            "UPDATE jobs SET state = 'running', changed = ? WHERE name = ?",
            [(time.time(), name) for name in names],
        )

    def waiting(self, names: Sequence[str], *, lost: bool) -> None:
        """Note that jobs are to be given out again; `lost`: because their worker was lost."""
        self._many(
            "UPDATE jobs SET state = 'waiting', attempts = attempts + ?, changed = ? "
            "WHERE name = ?",
            [(int(lost), time.time(), name) for name in names],
        )

    def ended(self, outcome: Outcome, pixels: int) -> None:
        """Note how a job of so many pixels ended."""
        before = after = None
        if outcome.thumbnails is not None and self._thumbnails < MOST_THUMBNAILS:
            before, after = outcome.thumbnails
            self._thumbnails += 1
        self.left -= 1
        self.pixels_left -= pixels
        self.pixels_done += pixels if outcome.state == "done" else 0
        record = json.dumps(outcome.record, allow_nan=False)
        self._many(
            "UPDATE jobs SET state = ?, reason = ?, record = ?, before = ?, after = ?, changed = ? "
            "WHERE name = ?",
            [(outcome.state, outcome.reason, record, before, after, time.time(), outcome.name)],
        )

    def counts(self) -> dict[str, int]:
        """Return how many of this run's jobs are in each state."""
        query = "SELECT state, count(*) FROM jobs WHERE run = ? GROUP BY state"
        return dict(self._do(lambda: self._base.execute(query, (self.run,)).fetchall()))

    def rows(self, *, failed_first: bool = False) -> Iterator[dict[str, Any]]:
        """Yield this run's jobs by name: the columns of the table, the record as a dictionary."""
        columns = ("name", "source", "state", "attempts", "reason", "record", "before", "after")
        order = "state != 'failed', name" if failed_first else "name"
        query = f"SELECT {', '.join(columns)} FROM jobs WHERE run = ? ORDER BY {order}"
        for values in self._base.execute(query, (self.run,)):
            row = dict(zip(columns, values, strict=True))
            yield row | {"record": json.loads(row["record"])}

    def _many(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Execute for all rows in one transaction."""

        def execute() -> None:
            self._base.execute("BEGIN IMMEDIATE")
            try:
                self._base.executemany(statement, rows)
                self._base.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._base.execute("ROLLBACK")
                raise

        self._do(execute)

    def _do(self, action: Callable[[], _T]) -> _T:
        try:
            return action()
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _failure(self, error: sqlite3.Error) -> OutputError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the rest are details
        reason = {
            sqlite3.SQLITE_BUSY: "another batch uses it: wait for it to end",
            sqlite3.SQLITE_FULL: "the disk is full: free some space; the same command goes on",
            sqlite3.SQLITE_NOTADB: "it is no journal: delete it, which loses no picture",
            sqlite3.SQLITE_CORRUPT: "it is damaged: delete it, which loses no picture",
        }.get(code, one_line(error))
        return OutputError(f"journal {one_line(self.path)}: cannot be written: {reason}")
