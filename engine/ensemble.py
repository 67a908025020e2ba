"""Several runs of one fit with different seeds: a better image, and where to doubt it.

What a network invents differs from seed to seed and averages out; what the observation tells stays.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from flashdip.engine.config import FitConfig
from flashdip.engine.errors import DivergedError
from flashdip.engine.events import Callback, Event, Finished, Noted, Progress, Started
from flashdip.engine.metrics import psnr
from flashdip.engine.result import Result, plain_picture

TOLD = ("seed", "psnr", "iterations", "best_iteration", "stop_reason", "seconds_fit")


class FitOnce(Protocol):
    """Fits one run of the problem; see `flashdip.engine.fit.fit`."""

    def __call__(
        self,
        config: FitConfig,
        *,
        callback: Callback,
        checkpoint: Path | None,
        interrupted: Callable[[], bool],
    ) -> Result:
        """Return the result of a config with one run."""
        ...


def fit_runs(
    once: FitOnce,
    config: FitConfig,
    truth: Tensor | None,
    callback: Callback,
    checkpoint: Path | None,
    interrupted: Callable[[], bool],
) -> Result:
    """Fit `config.runs` times and return the mean of the images.

    A budget is shared out equally. A run that diverges is left out, and so is one that was
    interrupted, unless there is no other.

    Args:
        once: Fits one run.
        config: Of all runs; run r has the seed `config.seed + r`.
        truth: The undamaged image, [C, H, W], or None.
        callback: Receives the events of all runs as those of one long fit.
        checkpoint: The first run's file; those of the others end in .1, .2, ...
        interrupted: See `fit`.

    Returns:
        The mean of the images; its `uncertainty` is the standard deviation over the runs. Network
        and history are those of the first run; "runs" in its record tells of each.

    Raises:
        DivergedError: No run has an image.
    """
    results: list[Result] = []
    lost: list[str] = []
    share = None if config.budget is None else config.budget / config.runs
    for run in range(config.runs):
        own = dataclasses.replace(config, runs=1, seed=config.seed + run, budget=share)
        file = checkpoint if run == 0 or checkpoint is None else _numbered(checkpoint, run)
        try:
            result = once(
                own,
                callback=_Chapter(callback, run, config),
                checkpoint=file,
                interrupted=interrupted,
            )
        except DivergedError as error:
            lost.append(f"run {run + 1} of {config.runs} is left out: {error}")
            callback(Noted(lost[-1]))
            continue
        results.append(result)
        if result.stop_reason == "interrupted":
            break
    if not results:
        raise DivergedError(lost[0])
    found = mean(results, config, truth, lost)
    record = found.record
    callback(
        Finished(
            record["iterations"],
            record["best_iteration"],
            record["stop_reason"],
            record["seconds_fit"],
            len(record["runs"]),
        )
    )
    return found


def mean(
    results: Sequence[Result],
    config: FitConfig,
    truth: Tensor | None,
    notes: Sequence[str],
) -> Result:
    """Return the mean of runs; see `fit_runs`.

    Args:
        results: Of the runs, at least one, in the order of their seeds.
        config: Of all of them.
        truth: The undamaged image, [C, H, W], or None.
        notes: Lines for its record.
    """
    whole = [result for result in results if result.stop_reason != "interrupted"]
    if len(whole) < len(results):
        stopped = "interrupted"
        if whole:
            cut = (result.record["seed"] for result in results if result not in whole)
            notes = [*notes, *(_left_out(seed - config.seed) for seed in cut)]
            results = whole
    else:
        stopped = Counter(result.stop_reason for result in results).most_common(1)[0][0]
    first, *_ = results
    images = torch.stack([result.image for result in results])  # [runs, C, H, W]
    image = images.mean(0)
    records = [result.record for result in results]
    iterations = sum(record["iterations"] for record in records)
    seconds = sum(record["seconds_fit"] for record in records)
    done = sum(record["iterations_per_second"] * record["seconds_fit"] for record in records)
    record = first.record | {
        "psnr": None if truth is None else psnr(image, truth.cpu()),
        "iterations": iterations,
        "stop_reason": stopped,
        "seconds_setup": sum(record["seconds_setup"] for record in records),
        "seconds_fit": seconds,
        "iterations_per_second": done / max(seconds, 1e-9),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
        "seed": config.seed,
        "retries": sum(record["retries"] for record in records),
        "notes": [*first.record["notes"], *notes],
        "config": {**first.record["config"], "runs": config.runs, "budget": config.budget},
        "runs": [{key: record[key] for key in TOLD} for record in records],
    }
    measurement = dict(first.measurement)
    residuals = [result.measurement["residual"] for result in results]
    measurement["residual"] = torch.stack(residuals).mean(0)
    spread = images.std(0, correction=0)
    weights = first.weights | {"image": image}
    return Result(image, record, weights, plain_picture(image), measurement, spread)


def _left_out(run: int) -> str:
    return f"run {run + 1} was interrupted and is left out"


def _numbered(path: Path, run: int) -> Path:
    return path.with_name(f"{path.name}.{run}")


class _Chapter:
    """Tells one run's events as a part of a longer fit.

    Args:
        tell: Receives them.
        run: Which it is, from 0.
        config: Of all runs.
    """

    def __init__(self, tell: Callback, run: int, config: FitConfig) -> None:
        self.tell, self.run = tell, run
        self.before, self.limit = run * config.iterations, config.runs * config.iterations
        self.runs = config.runs

    def __call__(self, event: Event) -> None:
        match event:
            case Started() | Progress():
                at = self.before + event.iteration
                event = dataclasses.replace(event, iteration=at, iterations=self.limit)
                if isinstance(event, Progress) or self.run == 0:
                    self.tell(event)
            case Finished():
                pass
            case _:
                self.tell(event)
