"""What a step watches beside the fit itself: the averaged output and the stopping statistics."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flashdip.engine.backends.base import Statistics
from flashdip.engine.config import FitConfig
from flashdip.engine.noise_level import clipped_variance
from flashdip.engine.operators import Each
from flashdip.engine.problems import Problem

PIXELS = 65_536  # of an output enter its windowed variance, so that the window stays small
MOVING_RATE = 0.1  # of the exponential moving variance (Wang et al. 2023)


class Observer:
    """Averages and variances of the outputs of F fits, on their device.

    Args:
        problem: What is fitted.
        config: How.
        device: Where the fits run.
        dtype: Of images and sums: float32, or float64.
        truth: The undamaged images, [F or 1, C, H, W], or None.

    Attributes:
        output: The last output, [F, C, H, W].
        average: Its exponential average, started at 0 and not corrected for that.
        loss: Of the last output, [F].
        window: The last outputs at `sample`, in a ring, [window, F, n].
        truth: The undamaged images, [F, C, H, W]; NaN where they are unknown.
        measured: Which entries of the observation were measured, 1 or 0, [F, ...].
        sample: Which values of an output enter the window, [n] int64.
        moving_mean: Exponential moving mean of the outputs; without values unless asked for.
        moving_variance: Exponential moving variance about it, [F].
    """

    def __init__(
        self,
        problem: Problem,
        config: FitConfig,
        device: torch.device,
        dtype: torch.dtype,
        truth: Tensor | None,
    ) -> None:
        def place(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype)

        self.config, self.operator = config, problem.operator
        self.observation = place(problem.observation).contiguous()
        image = place(torch.zeros(problem.fits, *problem.shape))
        self.truth = torch.full_like(image, math.nan)
        if truth is not None:
            self.truth.copy_(truth)
        measured = torch.ones(()) if problem.measured is None else problem.measured
        self.measured = place((measured > 0).expand(self.observation.shape)).contiguous()
        self.sigma, self.clipped = ([of] * problem.fits for of in (problem.sigma, problem.clipped))

        self.output, self.average = image, image.clone()
        self.moving_mean = image.clone() if "es-emv" in config.stop else image[:, :0].clone()
        self.loss = place(torch.zeros(problem.fits))
        self.moving_variance = self.loss.clone()
        self.sample = spread(image[0].numel()).to(device)
        length = config.window if "es-wmv" in config.stop else 0
        self.window = place(torch.zeros(length, problem.fits, len(self.sample)))

    def replace(self, fit: int, problem: Problem, truth: Tensor | None) -> None:
        """Watch another problem, a single one, in place of a fit; see `Slot.replace`."""
        assert isinstance(self.operator, Each)
        self.operator.operators[fit] = problem.operator
        self.observation[fit].copy_(problem.observation[0])
        measured = torch.ones(()) if problem.measured is None else problem.measured
        self.measured[fit].copy_((measured > 0).expand(problem.observation.shape)[0])
        self.sigma[fit], self.clipped[fit] = problem.sigma, problem.clipped
        self.truth[fit] = math.nan if truth is None else truth.to(self.truth)

    def update(self, output: Tensor, loss: Tensor, iterations: Sequence[int]) -> None:
        """Take in the outputs and losses of an iteration, for each fit counted from 1."""
        self.output, self.loss = output, loss
        if self.config.average is not None:
            self.average.lerp_(output, 1 - self.config.average)
        self.vary(iterations)

    def vary(self, iterations: Sequence[int]) -> None:
        """Take the last outputs, of these iterations, into the variances that rules ask for."""
        output = self.output
        if len(self.window):
            sampled = output.flatten(1)[:, self.sample]
            for fit, iteration in enumerate(iterations):
                self.window[(iteration - 1) % len(self.window), fit] = sampled[fit]
        if "es-emv" in self.config.stop:
            distance = (output - self.moving_mean).square().flatten(1).mean(1)
            self.moving_variance.add_(MOVING_RATE * distance).mul_(1 - MOVING_RATE)
            self.moving_mean.lerp_(output, MOVING_RATE)

    def averaged(self, average: Tensor, output: Tensor) -> Tensor:
        """Return of the two what is returned in the end, before it is corrected."""
        return output if self.config.average is None else average

    def corrected(self, image: Tensor, iteration: int) -> Tensor:
        """Return an average after so many iterations, corrected for having started at 0."""
        if self.config.average is None or iteration == 0:
            return image.clone()
        return image / (1 - self.config.average**iteration)

    def image(self, fit: int, iteration: int) -> Tensor:
        """Return the averaged output of a fit after so many iterations, [1, C, H, W]."""
        image = self.averaged(self.average, self.output)[fit : fit + 1]
        return self.corrected(image, iteration)

    def read(self, iterations: Sequence[int], parameters: Tensor) -> list[Statistics]:
        """Wait for the device, once; return the statistics of each fit after so many iterations.

        Args:
            iterations: Of each fit.
            parameters: [F, P].
        """
        with torch.no_grad():
            images = [self.image(fit, iteration) for fit, iteration in enumerate(iterations)]
            ideals = self.operator(images[0] if len(images) == 1 else torch.cat(images)).split(1)
            values = torch.stack(
                [
                    self._statistics(fit, iteration, image, ideal)
                    for fit, (iteration, image, ideal) in enumerate(
                        zip(iterations, images, ideals, strict=True)
                    )
                ]
            )
            values = torch.cat([values, parameters.square().sum(1, keepdim=True)], 1)
            rows = zip(iterations, values.tolist(), strict=True)
            return [Statistics(iteration, *row) for iteration, row in rows]

    def _statistics(self, fit: int, iteration: int, image: Tensor, ideal: Tensor) -> Tensor:
        """Return the inner fields of `Statistics` for one fit, still on the device.

        Args:
            fit: Its place.
            iteration: Iterations done.
            image: Its averaged output, [1, C, H, W].
            ideal: What would be measured of that, [1, ...].
        """
        own = slice(fit, fit + 1)
        measured, sigma = self.measured[own], self.sigma[fit]
        share = measured.mean()
        residual = (ideal - self.observation[own]).square().mean() / share
        nothing = torch.full_like(residual, math.nan)
        expected = nothing
        if sigma is not None:
            level = torch.full_like(ideal, sigma**2)
            level = clipped_variance(ideal, sigma) if self.clipped[fit] else level
            expected = (level * measured).mean() / share
        full = len(self.window) and iteration >= len(self.window)
        return torch.stack(
            [
                self.loss[fit],
                residual.sqrt(),
                expected.sqrt(),
                self.window[:, own].var(dim=0, correction=0).mean() if full else nothing,
                self.moving_variance[fit] if "es-emv" in self.config.stop else nothing,
                (image - self.truth[own]).square().mean(),
            ]
        )

    def good(self) -> dict[str, Tensor]:
        """Return what a divergent fit has to go back to; repeated iterations rewrite the window."""
        images = {"average": self.average, "output": self.output}
        if "es-emv" not in self.config.stop:
            return images
        return images | {"moving_mean": self.moving_mean, "moving_variance": self.moving_variance}


def spread(count: int) -> Tensor:
    """Return at most `PIXELS` positions among `count`, evenly spread, [n] int64."""
    positions = min(PIXELS, count)
    return torch.arange(positions) * count // positions
