"""Fit a network to the picture that its own fit returned.

A fit returns an average of outputs, which no single network drew. A few more iterations, without
perturbation and from the weights at hand, give a network that draws it.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flashdip.engine.config import FitConfig
from flashdip.engine.events import Callback, Finished, Progress
from flashdip.engine.fit import Place
from flashdip.engine.metrics import decibels
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result
from flashdip.engine.warm import warm

TARGET = 45.0  # dB against the picture; rounding to 8 bits leaves 59
STEPS = 200
_EVERY = 5  # steps between two looks at the output

# A short memory of the second moment reached the target soonest, in 50 to 110 steps on three fits.
_RATE, _BETAS = 0.01, (0.8, 0.9)


@dataclass(frozen=True, eq=False)
class Distilled:
    """A network that draws a picture.

    Attributes:
        weights: Parameters by name in their published shapes, and the network's input "z".
        psnr: Of what it draws against the picture, in dB.
        steps: Iterations that led to it.
        interrupted: Whether it was ended before its time.
    """

    weights: dict[str, Tensor]
    psnr: float
    steps: int
    interrupted: bool


def distil(
    result: Result,
    steps: int = STEPS,
    *,
    device: str = "auto",
    callback: Callback = lambda event: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Distilled:
    """Fit the network of a result to the result's image, until `TARGET` or so many steps.

    The best network seen is returned, be it the one that was given.

    Args:
        result: Of a single fit.
        steps: The most iterations.
        device: See `fit`.
        callback: Receives the events of `flashdip.engine.events`.
        interrupted: Asked every few steps.

    Raises:
        InputError: The result has no network, or not the one that its config describes.
    """
    config = FitConfig.from_record(result.record["config"])
    config = dataclasses.replace(
        config,
        iterations=max(1, steps),
        learning_rate=_RATE,
        betas=_BETAS,
        schedule="cosine",
        perturbation=0.0,
        average=None,
        stop=("fixed",),
        precision="fp32",
    )
    image = result.image[None]
    problem = Problem(image, tuple(result.image.shape))  # type: ignore[arg-type]
    place = Place.choose(problem, config, "native", device, ())
    begin = warm(result, place.config, place.size)
    step = place.prepare(problem, None, begin)
    slot, seen, clock = step.slots[0], Distilled(begin.weights, -1.0, 0, False), time.perf_counter()
    callback(place.started(0))
    with place.memory():
        while True:
            weights, at = slot.fitted(), slot.iteration
            step.advance(1)  # whose loss is that of the weights before it
            loss = slot.read().loss
            if decibels(loss) > seen.psnr:
                seen = Distilled(weights, decibels(loss), at, False)
            seconds = time.perf_counter() - clock
            callback(Progress(at, steps, loss, decibels(loss), None, seconds, (at + 1) / seconds))
            stop = interrupted()
            if seen.psnr >= TARGET or at >= steps or stop:
                break
            step.advance(max(0, min(_EVERY - 1, steps - slot.iteration)))
    reason = "interrupted" if stop else "target" if seen.psnr >= TARGET else "iterations"
    callback(Finished(at, seen.steps, reason, time.perf_counter() - clock))
    return dataclasses.replace(seen, interrupted=stop)
