"""One run of a fit: what changes while it goes on, beside the state on the device."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flashdip.engine.backends.base import Slot, Statistics, Step
from flashdip.engine.checkpoint import Checkpoint, Saved
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import DivergedError, OutputError
from flashdip.engine.events import Callback, Noted, Progress, Retried
from flashdip.engine.guard import Guard, finite
from flashdip.engine.metrics import decibels
from flashdip.engine.stopping import Reading, Stopping

CHECKPOINT_SECONDS = 60.0  # between two checkpoints


@dataclass
class Best:
    """The image and the network of the selected iteration."""

    iteration: int
    image: Tensor  # [1, C, H, W]
    weights: dict[str, Tensor]


class Run:
    """Judges the statistics: asks guard and rules, keeps the history and the checkpoint.

    Args:
        slot: The fit, freshly prepared.
        config: How it is done.
        sigma: Standard deviation of the noise, or None.
        precision: What activations are stored in.
        tell: Receives the events.
        file: Where to save to, or None.
        saved: What to go on from, or None.

    Attributes:
        reason: Why the fit is over; None while it is not.
        overflowed: Whether it is over because numbers were not finite, again and again.
        best_iteration: The best so far, where a rule searches; None: none yet.
        history: Iteration, loss, variance and PSNR, one entry a reading.
        notes: Lines that a person should see.
    """

    def __init__(
        self,
        slot: Slot,
        config: FitConfig,
        sigma: float | None,
        precision: str,
        tell: Callback,
        file: Checkpoint | None = None,
        saved: Saved | None = None,
    ) -> None:
        self.slot, self.config, self.file, self.tell = slot, config, file, tell
        self.precision = precision
        self.stopping = Stopping(config, sigma)
        self.guard = Guard(slot, config.retries)
        self.best_iteration: int | None = None
        self.reason: str | None = None
        self.overflowed = False
        self.notes: list[str] = []
        self.history: dict[str, list[float | None]] = {
            name: [] for name in ("iteration", "loss", "variance", "psnr")
        }
        self._seconds = 0.0  # of the fit, before it was resumed
        self._done = 0  # iterations up to the last reading, repeated ones included
        if saved is not None:
            self._resume(*saved)
        self.start()

    def start(self) -> None:
        """Start the clock."""
        self._clock = self._last_save = self._last_read = time.perf_counter()
        self._clock -= self._seconds

    def elapsed(self) -> float:
        """Return the seconds that the fit took so far, resumed ones included."""
        return time.perf_counter() - self._clock

    @property
    def iterations(self) -> int:
        """Iterations that lead to where the fit is; the device may have gone further."""
        running = self.reason in (None, "interrupted")
        return self.slot.iteration if running else self.guard.good_iteration

    @property
    def done(self) -> int:
        """Iterations done, repeated ones included."""
        return self._done + max(0, self.iterations - self.guard.good_iteration)

    def ahead(self) -> int:
        """Return how many iterations lie before the next reading."""
        iteration, every = self.slot.iteration, self.config.read_every
        return min(every - iteration % every, max(1, self.config.iterations - iteration))

    def due(self) -> bool:
        """Return whether the statistics are to be read after this iteration."""
        iteration = self.slot.iteration
        return iteration % self.config.read_every == 0 or iteration == self.config.iterations

    def stale(self) -> bool:
        """Return whether it is time for a checkpoint."""
        return self.file is not None and time.perf_counter() - self._last_save > CHECKPOINT_SECONDS

    def read(self, statistics: Statistics) -> None:
        """Judge, record and tell the statistics of an iteration."""
        at = statistics.iteration
        advanced = at - self.guard.good_iteration
        self._done += advanced
        if not self.guard.accept(statistics):
            if self.guard.exhausted:
                self.reason, self.overflowed = "diverged", not finite(statistics)
            else:
                self.tell(Retried(at, self.guard.total, _jump(statistics)))
            return
        seconds = self.elapsed()
        reading = Reading(*statistics[:-2], seconds)
        selected, stop = self.stopping(reading)
        self.reason = stop or self.reason
        if selected and self.stopping.searches:
            self.slot.select()
            self.best_iteration = at
        variance = self.stopping.watched(reading)
        error = statistics.squared_error
        quality = None if error != error else decibels(error)  # NaN without a truth
        for name, value in zip(self.history, (at, statistics.loss, variance, quality), strict=True):
            self.history[name].append(value)
        now = time.perf_counter()
        rate, self._last_read = advanced / max(now - self._last_read, 1e-9), now
        limit = self.config.iterations
        self.tell(Progress(at, limit, statistics.loss, quality, variance, seconds, rate))

    def finish(self) -> Best:
        """Return the selected image; without a selection, the last one that is sound.

        Raises:
            DivergedError: There is none.
        """
        good, last = self.guard.good_iteration, self.slot.iteration
        if self.best_iteration is not None:
            return Best(self.best_iteration, *self.slot.result("best", self.best_iteration))
        if self.reason == "interrupted" and last > good and self.guard.sound(self.slot.read()):
            return Best(last, *self.slot.result("last", last))
        if good == 0:
            raise DivergedError(
                "fit: expected a finite loss that falls, got another one before the first image, "
                f"{self.guard.total} retries included; lower the learning rate "
                "(--set learning_rate=0.001)"
            )
        return Best(good, *self.slot.result("good", good))

    def save(self) -> None:
        """Write the checkpoint, if one was asked for; a failure is noted and the fit goes on."""
        if self.file is None:
            return
        self._last_save = time.perf_counter()
        state = self.slot.state()
        if self.reason not in (None, "interrupted"):
            del state["step"]  # the device may have gone further than what counts
        notes: dict[str, Any] = {
            "iteration": self.iterations,
            "guard": self.guard.state(),
            "rules": self.stopping.state(),
            "best": self.best_iteration,
            "precision": self.precision,
            "history": self.history,
            "seconds": self.elapsed(),
            "done": self._done,
            "notes": self.notes,
            "reason": None if self.reason == "interrupted" else self.reason,
        }
        try:
            self.file.write(state, notes)
        except OutputError as error:
            self._note(f"no checkpoint was written: {error}")

    def widen(self, slot: Slot, state: dict[str, dict[str, Tensor]], precision: str) -> None:
        """Go on from the last good state with numbers that reach further.

        Args:
            slot: Another one, freshly prepared for the same problem.
            state: Of the one so far.
            precision: What activations are stored in there.
        """
        guard, before = self.guard, self.precision
        self.slot = guard.slot = slot
        guard.in_a_row, self.reason, self.overflowed, self.precision = 0, None, False, precision
        numbers = guard.state() | {"rate_scale": 1.0}
        del state["step"]
        slot.resume(state, guard.good_iteration, numbers, self.stopping.state())
        self._note(
            f"iteration {guard.failed_at}: numbers were not finite in {before} after "
            f"{self.config.retries} retries; {precision} from iteration {guard.good_iteration} on"
        )

    def _note(self, line: str) -> None:
        self.notes.append(line)
        self.tell(Noted(line))

    def _resume(self, state: dict[str, dict[str, Tensor]], notes: dict[str, Any]) -> None:
        self.guard.load(notes["guard"])
        self.stopping.load(notes["rules"])
        self.slot.resume(state, notes["iteration"], notes["guard"], notes["rules"])
        self.best_iteration, self.notes = notes["best"], notes["notes"]
        self.history, self._seconds = notes["history"], notes["seconds"]
        self._done, self.reason = notes["done"], notes["reason"]


def iterate(step: Step, runs: Mapping[int, Run], interrupted: Callable[[], bool]) -> bool:
    """Iterate until some run is over.

    Args:
        step: Advances all of them.
        runs: By index of their slots.
        interrupted: Asked now and then; when it returns True all of them are over.

    Returns:
        Whether they were interrupted.
    """

    def judge(readings: Iterable[tuple[int, Statistics]]) -> None:
        for index, statistics in readings:
            if index in runs:
                runs[index].read(statistics)

    stop = False
    while not stop and all(run.reason is None for run in runs.values()):
        step.advance(min(step.stride, *(run.ahead() for run in runs.values())))
        due = [index for index, run in runs.items() if run.due()]
        if due:
            judge(step.measure(due))
        stop = interrupted()
        saving = due and any(run.stale() for run in runs.values())
        if stop or saving or any(run.reason is not None for run in runs.values()):
            judge(step.drain())
        for run in runs.values():
            if stop and run.reason is None:
                run.reason = "interrupted"
            if saving and run.stale():
                run.save()
    return stop


def _jump(statistics: Statistics) -> str:
    line = f"a loss of {statistics.loss:.3g} and a residual of {statistics.residual:.3g}"
    return line if math.isfinite(statistics.weights) else f"{line}, and weights that are not finite"
