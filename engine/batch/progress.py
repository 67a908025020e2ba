"""Show a batch while it runs, on stderr: done, running, failed, images an hour, time left."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from flashdip.engine.batch.jobs import Outcome
from flashdip.engine.files import one_line
from flashdip.engine.progress import clock

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PLAIN_SECONDS = 60.0  # between two plain lines


@dataclass
class Tally:
    """How far a batch is.

    Attributes:
        left: Jobs that are known and did not end yet.
        running: Workers that have jobs.
        done, kept, failed: Jobs that ended so.
        diverged: Of those done, fits that ended with their last good picture.
        part: How much of the pixels that are to be restored is restored, in [0, 1].
    """

    left: int = 0
    running: int = 0
    done: int = 0
    kept: int = 0
    failed: int = 0
    diverged: int = 0
    part: float = 0.0
    _begun: float = field(default_factory=time.monotonic)

    def count(self, outcome: Outcome) -> None:
        """Count how a job ended."""
        setattr(self, outcome.state, getattr(self, outcome.state) + 1)
        self.diverged += outcome.record.get("stop_reason") == "diverged"

    @property
    def seconds(self) -> float:
        """Since the batch began."""
        return time.monotonic() - self._begun

    @property
    def per_hour(self) -> float:
        """Pictures restored an hour, so far; what earlier runs published does not count."""
        return 3600 * self.done / max(self.seconds, 1e-9)

    @property
    def remaining(self) -> float | None:
        """Seconds that the rest will take at this rate; None: not known yet."""
        return None if self.part == 0 else self.seconds * (1 - self.part) / self.part

    def line(self) -> str:
        """Write everything in one line."""
        parts = [f"{self.done} done"]
        parts += [f"{self.kept} kept"] if self.kept else []
        parts += [f"{self.running} running", f"{self.failed} failed", f"{self.left} left"]
        parts.append(f"{self.per_hour:.0f} an hour")
        if self.left and self.remaining is not None:
            parts.append(f"{clock(self.remaining)} to go")
        return ", ".join(parts)


class Show(Protocol):
    """Is told what happens."""

    def __call__(self, tally: Tally, outcome: Outcome | None) -> None:
        """Show the tally, and an outcome that is new."""
        ...


@contextmanager
def show_batch(*, quiet: bool) -> Iterator[Show]:
    """Yield what shows a batch on stderr.

    A terminal gets a live table, with failures above it; anything else (a file, a pipe, a job's
    log) a plain line a minute and one for each failure; `quiet` shows nothing.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if quiet:
        yield lambda tally, outcome: None
    elif console.is_terminal:
        with _live(console) as show:
            yield show
    else:
        yield _Plain()


def _failure(outcome: Outcome) -> str:
    name, reason = one_line(outcome.name), str(outcome.reason)
    return reason if name in reason else f"{name}: {reason}"


class _Plain:
    """Print lines."""

    def __init__(self) -> None:
        self._next = time.monotonic()

    def __call__(self, tally: Tally, outcome: Outcome | None) -> None:
        if outcome is not None and outcome.state == "failed":
            print(f"batch: {_failure(outcome)}", file=sys.stderr, flush=True)
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _PLAIN_SECONDS
            print(f"batch: {tally.line()}", file=sys.stderr, flush=True)


@contextmanager
def _live(console: "Console") -> Iterator[Show]:
    from rich.live import Live

    with Live(console=console, refresh_per_second=4, transient=True) as live:

        def show(tally: Tally, outcome: Outcome | None) -> None:
            if outcome is not None and outcome.state == "failed":
                live.console.print(_failure(outcome), markup=False)
            live.update(_table(tally))

        yield show


def _table(tally: Tally) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, highlight=False)
    for heading in ("done", "kept", "running", "failed", "left", "an hour", "to go"):
        table.add_column(heading, justify="right")
    to_go = "" if tally.remaining is None else clock(tally.remaining)
    counts = (tally.done, tally.kept, tally.running, tally.failed, tally.left)
    table.add_row(*map(str, counts), f"{tally.per_hour:.0f}", to_go)
    return table
