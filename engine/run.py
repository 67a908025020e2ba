"""One run of a fit: what changes while it goes on, beside the state on the device."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashdip.engine.backends.base import Slot, Statistics
from flashdip.engine.checkpoint import Checkpoint
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import DivergedError, OutputError
from flashdip.engine.events import Callback, Noted, Progress, Retried
from flashdip.engine.guard import Guard
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
    """Judges the statistics: asks guard and rules, keeps the best, the history and the checkpoint.

    Args:
        slot: The fit, freshly prepared.
        config: How it is done.
        sigma: Standard deviation of the noise, or None.
        file: Where to save to and go on from, or None.
        tell: Receives the events.

    Attributes:
        reason: Why the fit is over; None while it is not.
        history: Iteration, loss, variance and PSNR, one entry a reading.
        notes: Lines that a person should see.
    """

    def __init__(
        self,
        slot: Slot,
        config: FitConfig,
        sigma: float | None,
        file: Checkpoint | None,
        tell: Callback,
    ) -> None:
        self.slot, self.config, self.file, self.tell = slot, config, file, tell
        self.stopping = Stopping(config, sigma)
        self.guard = Guard(slot, config.retries)
        self.best: Best | None = None
        self.reason: str | None = None
        self.notes: list[str] = []
        self.history: dict[str, list[float | None]] = {
            name: [] for name in ("iteration", "loss", "variance", "psnr")
        }
        self._seconds = 0.0  # of the fit, before it was resumed
        self._done = 0  # iterations up to the last reading, repeated ones included
        if file is not None:
            self._resume(file)
        self.start()

    def start(self) -> None:
        """Start the clock."""
        self._clock = self._last_save = self._last_read = time.perf_counter()
        self._clock -= self._seconds

    def elapsed(self) -> float:
        """Return the seconds that the fit took so far, resumed ones included."""
        return time.perf_counter() - self._clock

    @property
    def done(self) -> int:
        """Iterations done, repeated ones included."""
        return self._done + max(0, self.slot.iteration - self.guard.good_iteration)

    def ahead(self) -> int:
        """Return how many iterations lie before the next reading."""
        iteration, every = self.slot.iteration, self.config.read_every
        return min(every - iteration % every, max(1, self.config.iterations - iteration))

    def due(self) -> bool:
        """Return whether the statistics are to be read after this iteration."""
        iteration = self.slot.iteration
        return iteration % self.config.read_every == 0 or iteration == self.config.iterations

    def read(self, statistics: Statistics) -> None:
        """Judge, record and tell the statistics that were read after this iteration."""
        at = self.slot.iteration
        advanced = at - self.guard.good_iteration
        self._done += advanced
        if not self.guard.accept(statistics):
            if self.guard.exhausted:
                self.reason = "diverged"
            else:
                self.tell(Retried(at, self.guard.total, _jump(statistics)))
            return
        seconds = self.elapsed()
        reading = Reading(at, *statistics[:-1], seconds)
        selected, self.reason = self.stopping(reading)
        if selected and self.stopping.searches:
            self.best = self._keep()
        variance = self.stopping.watched(reading)
        error = statistics.squared_error
        quality = None if error != error else decibels(error)  # NaN without a truth
        for name, value in zip(self.history, (at, statistics.loss, variance, quality), strict=True):
            self.history[name].append(value)
        now = time.perf_counter()
        rate, self._last_read = advanced / max(now - self._last_read, 1e-9), now
        limit = self.config.iterations
        self.tell(Progress(at, limit, statistics.loss, quality, variance, seconds, rate))
        if now - self._last_save > CHECKPOINT_SECONDS:
            self.save()

    def finish(self) -> Best:
        """Return the selected image; without a selection, the last one that is sound.

        Raises:
            DivergedError: There is none.
        """
        if self.best is not None:
            return self.best
        if self.reason == "interrupted" and not self.guard.sound(self.slot.read()):
            self.guard.go_back()
        if self.slot.iteration == 0:
            raise DivergedError(
                "fit: expected a finite loss that falls, got another one before the first image, "
                f"{self.guard.total} retries included; lower the learning rate "
                "(--set learning_rate=0.001)"
            )
        return self._keep()

    def save(self) -> None:
        """Write the checkpoint, if one was asked for; a failure is noted and the fit goes on."""
        if self.file is None:
            return
        self._last_save = time.perf_counter()
        tensors = {
            "step": self.slot.good_state(),
            "statistics": self.slot.statistics_state(),
            "guard": self.guard.good,
        }
        if self.best is not None:
            tensors |= {"best": {"image": self.best.image}, "fitted": self.best.weights}
        notes: dict[str, Any] = {
            "iteration": self.slot.iteration,
            "guard": self.guard.state(),
            "rules": self.stopping.state(),
            "best": None if self.best is None else self.best.iteration,
            "history": self.history,
            "seconds": self.elapsed(),
            "done": self._done,
            "reason": None if self.reason == "interrupted" else self.reason,
        }
        try:
            self.file.write(tensors, notes)
        except OutputError as error:
            self.notes.append(f"no checkpoint was written: {error}")
            self.tell(Noted(self.notes[-1]))

    def _resume(self, file: Checkpoint) -> None:
        saved = file.read()
        if saved is None:
            return
        tensors, notes = saved
        self.slot.load(tensors["step"] | tensors["statistics"], notes["iteration"])
        self.guard.load(notes["guard"], tensors["guard"])
        self.stopping.load(notes["rules"])
        if notes["best"] is not None:
            self.best = Best(notes["best"], tensors["best"]["image"], tensors["fitted"])
        self.history, self._seconds = notes["history"], notes["seconds"]
        self._done, self.reason = notes["done"], notes["reason"]

    def _keep(self) -> Best:
        with torch.no_grad():
            return Best(self.slot.iteration, self.slot.image().clone(), self.slot.fitted())


def _jump(statistics: Statistics) -> str:
    return f"a loss of {statistics.loss:.3g} and a residual of {statistics.residual:.3g}"
