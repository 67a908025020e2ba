"""The fit: iterate, read statistics now and then, stop, return the selected image."""

import contextlib
import dataclasses
import math
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdip.engine.backends import resolve_device, select
from flashdip.engine.backends.base import Statistics, Step
from flashdip.engine.checkpoint import Checkpoint, fingerprint
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ShapeError
from flashdip.engine.events import Callback, Event, Finished, Progress, Retried, Started
from flashdip.engine.guard import Guard
from flashdip.engine.metrics import psnr
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result, plain_picture
from flashdip.engine.stopping import Reading, Stopping
from flashdip.kernels.memory import kept_pages

CHECKPOINT_SECONDS = 60.0  # between two checkpoints


def fit(
    problem: Problem,
    config: FitConfig,
    *,
    backend: str = "auto",
    device: str = "auto",
    truth: Tensor | None = None,
    callback: Callback | None = None,
    checkpoint: str | Path | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Result:
    """Fit a network to one problem and return the image it draws.

    The same problem, config, seed and machine give the same bits, unless the rule "budget" ends the
    fit.

    Args:
        problem: What to restore; a single fit (F = 1).
        config: How; the network's outputs are set to the image's channels.
        backend: "auto", or the name of one.
        device: "auto", "cpu", "cuda", "cuda:1", "mps", "xpu".
        truth: The undamaged image, [C, H, W] in [0, 1]: only to report the PSNR, never to choose an
            image.
        callback: Receives the events of `flashdip.engine.events`.
        checkpoint: A file to save to every minute and at the end, and to go on from if it exists.
        interrupted: Asked after each iteration; when it returns True the fit ends with its best
            image so far.

    Raises:
        InputError: Problem, config or checkpoint do not go together.
        UnavailableError: The backend or device cannot be used here.
    """
    begun = time.perf_counter()
    tell: Callback = callback or (lambda event: None)
    problem, truth = _check(problem, truth)
    network = dataclasses.replace(config.network, outputs=problem.shape[0])
    config = dataclasses.replace(config, network=network)
    stopping = Stopping(config, problem.sigma)
    place = resolve_device(device)
    chosen, precision, notes = select(backend, place, config.precision)
    step = chosen.prepare(problem, config, place, precision, truth)
    run = _Run(step, stopping, Guard(step, config.retries))
    if checkpoint is not None:
        run.file = Checkpoint(
            Path(checkpoint), fingerprint(problem, config, chosen.name, precision)
        )
        run.resume()
    size, inner = problem.shape[1:], config.network.network_size(*problem.shape[1:])
    tell(
        Started(
            step.iteration,
            config.iterations,
            chosen.name,
            str(place),
            precision,
            size,
            inner,
            tuple(notes),
        )
    )
    setup, run.clock = time.perf_counter() - begun, time.perf_counter() - run.seconds

    with kept_pages() if place.type == "cpu" else contextlib.nullcontext():
        while run.reason is None:
            step()
            if step.iteration % config.read_every == 0 or step.iteration == config.iterations:
                run.read(tell)
            if run.reason is None and interrupted():
                run.reason = "interrupted"
    run.save()

    best = run.best or run.keep()
    tell(Finished(step.iteration, best.iteration, run.reason, run.elapsed()))
    image = problem.paste(best.image)[0].cpu().float().contiguous()
    record = {
        "psnr": None if truth is None else psnr(image, truth[0]),
        "iterations": step.iteration,
        "best_iteration": best.iteration,
        "stop_reason": run.reason,
        "seconds_setup": setup,
        "seconds_fit": run.elapsed(),
        "iterations_per_second": run.iterations_done / max(run.elapsed(), 1e-9),
        "peak_memory_bytes": _peak_memory(place),
        "backend": chosen.name,
        "device": str(place),
        "precision": precision,
        "seed": config.seed,
        "retries": run.guard.total,
        "sigma": problem.sigma,
        "shape": list(problem.shape),
        "notes": list(notes),
        "versions": _versions(),
        "config": config.record(),
        "history": run.history,
    }
    return Result(image, record, best.weights | {"image": image}, plain_picture(image))


@dataclasses.dataclass
class _Best:
    """The image and the network of the selected iteration."""

    iteration: int
    image: Tensor  # [F, C, H, W]
    weights: dict[str, Tensor]


class _Run:
    """What changes while a fit runs, beside the step's own state."""

    def __init__(self, step: Step, stopping: Stopping, guard: Guard) -> None:
        self.step, self.stopping, self.guard = step, stopping, guard
        self.best: _Best | None = None
        self.reason: str | None = None
        self.file: Checkpoint | None = None
        self.seconds = 0.0  # of the fit, before it was resumed
        self.iterations_done = 0  # repeated ones included
        self.clock = self.last_read = self.last_save = time.perf_counter()
        self.history: dict[str, list[float | None]] = {
            "iteration": [], "loss": [], "variance": [], "psnr": []
        }  # fmt: skip

    def elapsed(self) -> float:
        return time.perf_counter() - self.clock

    def keep(self) -> _Best:
        with torch.no_grad():
            return _Best(self.step.iteration, self.step.image().clone(), self.step.fitted())

    def read(self, tell: Callable[[Event], None]) -> None:
        """Read the statistics back; judge, record and tell them."""
        step, at = self.step, self.step.iteration
        statistics = step.read()
        advanced = at - self.guard.good_iteration
        self.iterations_done += advanced
        if not self.guard.accept(statistics):
            if self.guard.exhausted:
                self.reason = "diverged"
            tell(Retried(at, self.guard.total, f"the loss jumped to {statistics.loss:.3g}"))
            return
        reading = Reading(
            at,
            statistics.loss,
            statistics.residual,
            statistics.noise,
            statistics.windowed_variance,
            statistics.moving_variance,
            self.elapsed(),
        )
        selected, self.reason = self.stopping(reading)
        if selected and self.stopping.searches:
            self.best = self.keep()
        variance, quality = self.stopping.watched(reading), _decibels(statistics)
        for name, value in zip(self.history, (at, statistics.loss, variance, quality), strict=True):
            self.history[name].append(value)
        now = time.perf_counter()
        rate, self.last_read = advanced / max(now - self.last_read, 1e-9), now
        tell(
            Progress(
                at,
                self.stopping.config.iterations,
                statistics.loss,
                quality,
                variance,
                reading.seconds,
                rate,
            )
        )
        if now - self.last_save > CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the checkpoint, if one was asked for."""
        if self.file is None:
            return
        tensors = {
            "step": self.step.good_state(),
            "statistics": self.step.statistics_state(),
            "guard": self.guard.good,
        }
        if self.best is not None:
            tensors |= {"best": {"image": self.best.image}, "fitted": self.best.weights}
        notes: dict[str, Any] = {
            "iteration": self.step.iteration,
            "guard": self.guard.state(),
            "rules": self.stopping.state(),
            "best": None if self.best is None else self.best.iteration,
            "history": self.history,
            "seconds": self.elapsed(),
            "iterations_done": self.iterations_done,
            "reason": None if self.reason == "interrupted" else self.reason,
        }
        self.file.write(tensors, notes)
        self.last_save = time.perf_counter()

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        saved = self.file.read() if self.file else None
        if saved is None:
            return
        tensors, notes = saved
        self.step.load(tensors["step"] | tensors["statistics"], notes["iteration"])
        self.guard.load(notes["guard"], tensors["guard"])
        self.stopping.load(notes["rules"])
        if notes["best"] is not None:
            image = tensors["best"]["image"]
            self.best = _Best(notes["best"], image, tensors["fitted"])
        self.history, self.seconds = notes["history"], notes["seconds"]
        self.iterations_done, self.reason = notes["iterations_done"], notes["reason"]


def _check(problem: Problem, truth: Tensor | None) -> tuple[Problem, Tensor | None]:
    if problem.fits != 1:
        raise ShapeError(f"observation: expected a single fit, [1, ...], got {problem.fits} fits")
    if truth is None:
        return problem, None
    if tuple(truth.shape) != problem.shape:
        raise ShapeError(
            f"truth: expected the restored image's shape {problem.shape} (C, H, W), "
            f"got {tuple(truth.shape)}"
        )
    return problem, truth[None]


def _decibels(statistics: Statistics) -> float | None:
    error = statistics.squared_error
    return None if math.isnan(error) else -10 * math.log10(max(error, 1e-20))


def _peak_memory(device: torch.device) -> int:
    """Return the most memory taken so far in bytes: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("flashdip", "torch", "numpy")}
    return packages | {"python": platform.python_version()}
