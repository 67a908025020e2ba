"""The fit: iterate, read statistics now and then, stop, return the selected image."""

import contextlib
import dataclasses
import functools
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from flashdip.engine.backends import resolve_device, select
from flashdip.engine.backends.base import Backend, Step
from flashdip.engine.checkpoint import Checkpoint, fingerprint
from flashdip.engine.config import FitConfig
from flashdip.engine.ensemble import fit_runs
from flashdip.engine.errors import ShapeError
from flashdip.engine.events import Callback, Finished, Started
from flashdip.engine.metrics import psnr
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result, plain_picture
from flashdip.engine.run import Run, iterate
from flashdip.engine.warm import Init, Warm, warm
from flashdip.kernels.memory import kept_pages


def fit(
    problem: Problem,
    config: FitConfig,
    *,
    backend: str = "auto",
    device: str = "auto",
    providers: Sequence[str] = (),
    truth: Tensor | None = None,
    callback: Callback | None = None,
    checkpoint: str | Path | None = None,
    init: Init | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    notes: Sequence[str] = (),
) -> Result:
    """Fit a network to one problem and return the image it draws; of several runs, their mean.

    On a CPU the same problem, config, seed, number of threads and machine give the same bits,
    unless a budget ends the fit. (PyTorch's CUDA kernels for padding are not deterministic.)

    Args:
        problem: What to restore; a single fit (F = 1).
        config: How; the network's outputs are set to the image's channels.
        backend: "auto", or the name of one.
        device: "auto", "cpu", "cuda", "cuda:1", "mps", "xpu".
        providers: Of ONNX Runtime, in order, for the backend "onnx": "cpu", "cuda", "tensorrt", ...
        truth: The undamaged image, [C, H, W] in [0, 1]: only to report the PSNR, never to choose an
            image.
        callback: Receives the events of `flashdip.engine.events`.
        checkpoint: A file to save to every minute and at the end, and to go on from if it exists;
            further runs have files of their own beside it.
        init: A fit to begin with: its result, or the folder that `Result.save` wrote. The network
            and the picture's size must be the same. None: random weights.
        interrupted: Asked after each iteration, or after ten where they take no time; when it
            returns True the fit ends with its best image so far.
        notes: Lines that a person should see with the start of the fit and in the record.

    Raises:
        InputError: Problem, config or checkpoint do not go together.
        UnavailableError: The backend or device cannot be used here.
        DivergedError: The fit diverged before it had any image.
    """
    begun = time.perf_counter()
    tell: Callback = callback or (lambda event: None)
    check(problem, truth)
    if config.runs > 1:
        once = functools.partial(
            fit,
            problem,
            backend=backend,
            device=device,
            providers=providers,
            truth=truth,
            init=init,
            notes=notes,
        )
        first = None if checkpoint is None else Path(checkpoint)
        return fit_runs(once, config, truth, tell, first, interrupted)
    place = Place.choose(problem, config, backend, device, notes, providers)
    config = place.config
    start = None if init is None else warm(init, config, place.size)
    if start is not None:
        note = f"begins with the weights of {start.source}"
        place = dataclasses.replace(place, notes=(*place.notes, note))
    file, saved = None, None
    if checkpoint is not None:
        name, precision = place.backend.name, place.precision
        begins = None if start is None else start.digest
        identity = fingerprint(problem, config, name, str(place.device), precision, begins)
        file = Checkpoint(Path(checkpoint), identity)
        saved = file.read()
    if saved is not None:
        place = dataclasses.replace(place, precision=saved[1]["precision"])
    given = None if truth is None else truth[None]
    step = place.prepare(problem, given, start)
    place = dataclasses.replace(place, notes=(*place.notes, *step.notes))
    run = Run(step.slots[0], config, problem.sigma, place.precision, tell, file, saved)
    tell(place.started(run.iterations))
    setup = time.perf_counter() - begun

    run.start()
    with place.memory():
        iterate(step, {0: run}, interrupted)
        if run.overflowed and (wider := place.wider()):
            state = run.slot.state()
            del step  # two of them may not fit
            place = wider
            step = place.prepare(problem, given, start)
            run.widen(step.slots[0], state, place.precision)
            iterate(step, {0: run}, interrupted)
    return outcome(run, problem, truth, place, setup, start)


@dataclass(frozen=True)
class Place:
    """Where and how problems of one shape are fitted.

    Attributes:
        config: With as many outputs as the images have channels.
        size: Height and width of the images.
        backend: The one chosen.
        device: Where it runs.
        precision: What the config's stands for there.
        notes: Lines that a person should see with the start of a fit and in the record.
    """

    config: FitConfig
    size: tuple[int, int]
    backend: Backend
    device: torch.device
    precision: str
    notes: tuple[str, ...]

    @classmethod
    def choose(
        cls,
        problem: Problem,
        config: FitConfig,
        backend: str,
        device: str,
        notes: Sequence[str],
        providers: Sequence[str] = (),
    ) -> "Place":
        """Choose; see `fit` for the arguments."""
        channels, height, width = problem.shape
        network = dataclasses.replace(config.network, outputs=channels)
        config = dataclasses.replace(config, network=network)
        found = resolve_device(device)
        chosen, precision, passed_over = select(backend, found, config, providers)
        return cls(config, (height, width), chosen, found, precision, (*notes, *passed_over))

    def prepare(self, problem: Problem, truth: Tensor | None, start: Warm | None = None) -> Step:
        """Build the step; see `Backend.prepare`. With a start, the first slot begins with it."""
        step = self.backend.prepare(problem, self.config, self.device, self.precision, truth)
        if start is not None:
            step.slots[0].warm(start.weights)
        return step

    def started(self, iteration: int) -> Started:
        """Return the event that a fit begins, or goes on, after so many iterations."""
        config, name, device = self.config, self.backend.name, str(self.device)
        inner = config.network.network_size(*self.size)
        limit = config.iterations
        return Started(iteration, limit, name, device, self.precision, self.size, inner, self.notes)

    def wider(self) -> "Place | None":
        """Return the same place with float32 numbers, if these are of 16 bits."""
        narrow = self.precision in ("fp16", "bf16")
        return dataclasses.replace(self, precision="fp32") if narrow else None

    def memory(self) -> contextlib.AbstractContextManager[None]:
        """Return the context to iterate in."""
        return kept_pages() if self.device.type == "cpu" else contextlib.nullcontext()


def outcome(
    run: Run,
    problem: Problem,
    truth: Tensor | None,
    place: Place,
    setup: float,
    start: Warm | None = None,
) -> Result:
    """Return the result of a run that is over, after saving it and telling so.

    Args:
        run: Its `reason` is set.
        problem: What was fitted.
        truth: The undamaged image, [C, H, W], or None.
        place: Where it was fitted.
        setup: Seconds before the first iteration.
        start: The weights that it began with; None: random ones.

    Raises:
        DivergedError: There is no image.
    """
    assert run.reason is not None
    iterations, seconds = run.iterations, run.elapsed()
    run.save()
    best = run.finish()
    run.tell(Finished(iterations, best.iteration, run.reason, seconds))
    image = problem.finish(best.image, run.config.add_back)[0].cpu().float().contiguous()
    record = {
        "psnr": None if truth is None else psnr(image, truth.cpu()),
        "iterations": iterations,
        "best_iteration": best.iteration,
        "stop_reason": run.reason,
        "seconds_setup": setup,
        "seconds_fit": seconds,
        "iterations_per_second": run.done / max(seconds, 1e-9),
        "peak_memory_bytes": peak_memory(place.device),
        "backend": place.backend.name,
        "device": str(place.device),
        "precision": place.precision,
        "seed": run.config.seed,
        "init": None if start is None else start.record(),
        "retries": run.guard.total,
        "sigma": problem.sigma,
        "shape": list(problem.shape),
        "notes": [*place.notes, *run.notes],
        "versions": _versions(),
        "config": run.config.record(),
        "history": run.history,
    }
    weights = best.weights | {"image": image}
    return Result(image, record, weights, plain_picture(image), measurement(problem, best.image))


def measurement(problem: Problem, image: Tensor) -> dict[str, Tensor]:
    """Return `Result.measurement` for the image [1, C, H, W] that was drawn, nothing pasted."""

    def plain(tensor: Tensor) -> Tensor:
        return tensor[0].to("cpu", torch.float32).contiguous()

    with torch.no_grad():
        observation = problem.observation.to(image)
        residual = observation - problem.operator(image)
    found = {"observation": plain(observation), "residual": plain(residual)}
    if problem.measured is None:
        return found
    measured = (problem.measured.to(image.device) > 0).expand(residual.shape)
    found["residual"] = plain(residual * measured)
    return found | {"measured": measured[0].cpu().contiguous()}


def check(problem: Problem, truth: Tensor | None) -> None:
    """Refuse what is no single fit, and a truth that is not its image's.

    Raises:
        ShapeError: It is so.
    """
    if problem.fits != 1:
        raise ShapeError(f"observation: expected a single fit, [1, ...], got {problem.fits} fits")
    if truth is not None and tuple(truth.shape) != tuple(problem.shape):
        raise ShapeError(
            f"truth: expected the restored image's shape {tuple(problem.shape)} (C, H, W), "
            f"got {tuple(truth.shape)}"
        )


def peak_memory(device: torch.device) -> int:
    """Return the most memory taken so far in bytes: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("flashdip", "torch", "numpy")}
    return packages | {"python": platform.python_version()}
