"""The quality of a fit over its iterations, of the published network and of presets for denoising.

Recorded is at each reading the PSNR of what a fit that ended there would return, the averaged
output with the preset's share of the residual: of the published network in float32, and of each
preset of ours in the precision that suits the device. A preset of several runs is fitted side by
side, and its image is the mean of theirs. The truth judges, and ends a fit that is
long past its peak; it chooses nothing.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdip.bench import machine
from flashdip.bench.cases import PUBLISHED, SIGMA
from flashdip.bench.parity.suites import find
from flashdip.bench.recipes import damaged, picture
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import DivergedError, InputError
from flashdip.engine.events import Callback, Finished
from flashdip.engine.files import one_line
from flashdip.engine.fit import Place
from flashdip.engine.metrics import psnr
from flashdip.engine.presets import names, preset
from flashdip.engine.problems import Problem
from flashdip.engine.run import Run, iterate

PAST = 500  # iterations without a better image, after which the peak was passed
SUITE = "denoise25"  # of pairs, sigma 25
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")  # in scikit-image's wheel
BACKEND = "native"


def ours() -> list[str]:
    """Return the presets for denoising that are not the paper's."""
    return [name for name in names("denoise") if not name.startswith("published")]


def fitted(name: str, seed: int = 0) -> FitConfig:
    """Return the config that a preset is recorded with: nothing but its iterations ends a fit.

    What only decides when a fit ends, or what is done when it diverges, is as in any other config.
    The published network is that of bench/published.py as it runs today: PyTorch has begun the
    norms' scales with ones since 1.2, and the preset does as the PyTorch of the paper did.
    """
    own, usual = preset("denoise", name), FitConfig()
    idle = ("stop", "budget", "window", "patience", "discrepancy", "retries")
    config = replace(own, seed=seed, **{field: getattr(usual, field) for field in idle})
    if name != PUBLISHED:
        return config
    return replace(config, precision="fp32", network=replace(config.network, scale="one"))


def subject(name: str, size: int, data: Path | None) -> tuple[Problem, Tensor]:
    """Return a noisy picture, and without its noise, [3, size, size].

    Args:
        name: Of a photograph in scikit-image, shrunk, noise added; or of a pair, cut out of.
        size: Pixels a side.
        data: A folder of pairs as `flashdip parity` reads it.

    Raises:
        InputError: There is no such picture, or it is too small or grey.
    """
    from skimage import data as photographs

    if hasattr(photographs, name):
        clean = picture(name, size, None)
        problem = damaged("denoise", clean, 0)
    elif data is None:
        raise InputError(
            f"{one_line(name)}: expected a photograph of scikit-image, such as {PHOTOGRAPHS[0]}, "
            f"or one of a folder that --data names"
        )
    else:
        (case,) = find(data, (SUITE,), (name,))
        least = min(case.truth.shape[:2])
        if least < size:
            raise InputError(f"{name}: expected sides of {size} pixels at least, got {least}")
        top, left = ((side - size) // 2 for side in case.truth.shape[:2])
        clean, noisy = (
            torch.from_numpy(pixels).movedim(-1, 0)[:, top : top + size, left : left + size]
            for pixels in (case.truth, case.observed)
        )
        clean = clean.contiguous()
        problem = Problem(noisy[None].contiguous(), (clean.shape[0], size, size), sigma=SIGMA)
    if clean.shape[0] != 3:
        raise InputError(f"{name}: expected three channels, got {clean.shape[0]}")
    return problem, clean


def curve(
    problem: Problem,
    clean: Tensor,
    config: FitConfig,
    *,
    device: str = "auto",
    past: int = PAST,
    tell: Callback = lambda event: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Fit all runs of a config side by side; return the quality of their mean over iterations.

    Args:
        problem: A single fit.
        clean: The truth, [C, H, W] in [0, 1].
        config: How to fit.
        device: Where to fit.
        past: Iterations without a better image, after which the fit ends.
        tell: Receives the events of the first run.
        interrupted: Ends the fit when it returns True.

    Returns:
        "iterations" of each run at each reading, those that had to be repeated included;
        "decibels" there; "ended": why; and "backend", "device" and "precision".

    Raises:
        DivergedError: There was no image.
    """
    observation = problem.observation.expand(config.runs, -1, -1, -1).contiguous()
    many = replace(problem, observation=observation)
    place = Place.choose(many, config, BACKEND, device, ())
    step = place.prepare(many, clean[None])
    runs = {
        index: Run(
            slot,
            place.config,
            problem.sigma,
            place.precision,
            (lambda event: None) if index else tell,
        )
        for index, slot in enumerate(step.slots)
    }
    iterations: list[int] = []
    quality: list[float] = []

    def look() -> bool:
        done = max(run.done for run in runs.values())
        over = any(run.reason is not None for run in runs.values())
        last = iterations[-1] if iterations else 0
        if done >= last + config.read_every or (over and done > last):
            drawn = torch.cat([slot.image() for slot in step.slots]).mean(0, keepdim=True)
            iterations.append(done)
            image = problem.finish(drawn, config.add_back)[0]
            quality.append(round(psnr(image.cpu(), clean), 3))
        return interrupted() or (bool(quality) and done - peak(iterations, quality)[1] >= past)

    tell(place.started(0))
    with place.memory():
        passed = iterate(step, runs, look)
    reasons = sorted({str(run.reason) for run in runs.values() if run.reason != "interrupted"})
    if not iterations and "diverged" in reasons:
        raise DivergedError("quality: the fit diverged before it had an image")
    ended = "interrupted" if interrupted() else "past its peak" if passed else ", ".join(reasons)
    last = iterations[-1] if iterations else 0
    tell(Finished(last, peak(iterations, quality)[1] if last else 0, ended, runs[0].elapsed()))
    return {
        "iterations": iterations,
        "decibels": quality,
        "ended": ended,
        "backend": place.backend.name,
        "device": str(place.device),
        "precision": place.precision,
    }


def peak(iterations: Sequence[int], quality: Sequence[float]) -> tuple[float, int]:
    """Return the highest PSNR, and the iteration at which it was."""
    best = max(range(len(quality)), key=quality.__getitem__)
    return quality[best], iterations[best]


def entry(
    name: str, problem: Problem, clean: Tensor, wanted: str, seed: int, **options: Any
) -> dict[str, Any]:
    """Fit a preset to a picture; return what quality.json keeps of it.

    Args:
        name: Of the picture.
        problem: See `subject`, as is `clean`.
        wanted: The preset.
        seed: Of the fit; further runs have the next ones.
        **options: See `curve`.
    """
    config = fitted(wanted, seed)
    return {
        "picture": name,
        "preset": wanted,
        "seed": seed,
        "runs": config.runs,
        **curve(problem, clean, config, **options),
        "commit": machine.commit(),
        "source": machine.source(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "config": config.record(),
    }
