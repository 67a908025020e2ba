"""Show a fit while it runs, and let Ctrl-C or SIGTERM end it with the image so far.

Everything here goes to stderr: stdout belongs to what a command was asked to print.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

from flashdip.engine.events import Callback, Event, Finished, Noted, Progress, Retried, Started

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_LINES = 10


def clock(seconds: float) -> str:
    """Write a duration as m:ss, or h:mm:ss from one hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(event: Progress) -> str:
    """Write rate, loss, PSNR where it is known and the time left, in one short line."""
    rate = event.iterations_per_second
    speed = f"{rate:.1f} it/s" if rate >= 1 or rate <= 0 else f"{1 / rate:.1f} s/it"
    parts = [speed, f"loss {event.loss:.2e}"]
    if event.psnr is not None:
        parts.append(f"{event.psnr:.2f} dB")
    if rate > 0:
        parts.append(f"{clock((event.iterations - event.iteration) / rate)} left")
    return ", ".join(parts)


@contextmanager
def show_progress(title: str, *, quiet: bool = False) -> Iterator[Callback]:
    """Yield a callback for `fit` that draws its events on stderr.

    A terminal gets one live bar; anything else (a file, a pipe, a job's log) gets about ten plain
    lines; `quiet` shows nothing.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    if quiet:
        yield lambda event: None
    elif console.is_terminal:
        with _live(title, console) as callback:
            yield callback
    else:
        yield _Plain(title)


def _headline(event: Started) -> str:
    height, width = event.size
    return (
        f"{width}x{height} pixels, backend {event.backend} on {event.device}, {event.precision}, "
        f"at most {event.iterations} iterations"
    )


class _Plain:
    """Print the start, the end and every tenth of the way as plain lines."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.next_line = 0

    def __call__(self, event: Event) -> None:
        match event:
            case Started():
                self._print(_headline(event))
                for note in event.notes:
                    self._print(note)
            case Progress() if event.iteration >= self.next_line:
                self.next_line = event.iteration + max(1, event.iterations // _PLAIN_LINES)
                self._print(f"{event.iteration}/{event.iterations}: {describe(event)}")
            case Retried():
                self._print(_retry(event))
            case Noted():
                self._print(event.message)
            case Finished():
                self._print(_end(event))

    def _print(self, line: str) -> None:
        print(f"{self.title}: {line}", file=sys.stderr, flush=True)


def _retry(event: Retried) -> str:
    return f"iteration {event.iteration}: {event.reason}; retry {event.retry}"


def _end(event: Finished) -> str:
    image = f"image of iteration {event.best_iteration}"
    if event.runs > 1:
        image = f"the mean of {event.runs} runs"
    return (
        f"{event.iterations} iterations in {clock(event.seconds)}, ended by {event.stop_reason}, "
        f"{image}"
    )


@contextmanager
def _live(title: str, console: "Console") -> Iterator[Callback]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Bar(*columns, console=console, transient=False) as bar:
        task = bar.add_task(title, total=None, status="setting up")

        def callback(event: Event) -> None:
            match event:
                case Started():
                    bar.console.print(f"{title}: {_headline(event)}", markup=False)
                    for note in event.notes:
                        bar.console.print(f"{title}: {note}", markup=False)
                    bar.update(
                        task,
                        completed=event.iteration,
                        total=event.iterations,
                        status="first iterations",
                    )
                case Progress():
                    bar.update(task, completed=event.iteration, status=describe(event))
                case Retried():
                    bar.console.print(f"{title}: {_retry(event)}", markup=False)
                case Noted():
                    bar.console.print(f"{title}: {event.message}", markup=False)
                case Finished():
                    bar.update(task, status=_end(event))

        yield callback


class Interruption:
    """Note the first SIGINT or SIGTERM for `fit` to see; let a second one end the program.

    Use it as a context manager around a fit and pass it as `interrupted`. A signal that comes
    before the fit has begun ends the program at once: there is no image yet to write.

    Attributes:
        signal: Number of the signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._armed = False
        self._previous: dict[int, object] = {}

    def __call__(self) -> bool:
        """Tell whether a signal came."""
        return self.signal is not None

    def arm(self) -> None:
        """Note that there is from now on something worth ending well."""
        self._armed = True

    def watch(self, callback: Callback) -> Callback:
        """Return a callback that passes events on and notes that the fit has begun."""

        def watching(event: Event) -> None:
            if isinstance(event, Started):
                self.arm()
            callback(event)

        return watching

    def __enter__(self) -> "Interruption":
        # Python lets only the main thread set handlers; elsewhere the host program has its own.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None or not self._armed:
            raise SystemExit(128 + number)
        self.signal = number
