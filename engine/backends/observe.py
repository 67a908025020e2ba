"""What a step watches beside the fit itself: the averaged output and the stopping statistics."""

import math

import torch
from torch import Tensor

from flashdip.engine.backends.base import Statistics
from flashdip.engine.config import FitConfig
from flashdip.engine.noise_level import clipped_variance
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
        sample: Which values of an output enter the window, [n] int64.
        moving_mean: Exponential moving mean of the outputs.
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
        self.observation = place(problem.observation)
        self.truth = None if truth is None else place(truth)
        measured = torch.ones(()) if problem.measured is None else problem.measured
        self.measured = place((measured > 0).expand(self.observation.shape))
        self.sigma, self.clipped = problem.sigma, problem.clipped

        image = place(torch.zeros(problem.fits, *problem.shape))
        self.output, self.average, self.moving_mean = image, image.clone(), image.clone()
        self.loss = place(torch.zeros(problem.fits))
        self.moving_variance = self.loss.clone()
        self.sample = spread(image[0].numel()).to(device)
        length = config.window if "es-wmv" in config.stop else 0
        self.window = place(torch.zeros(length, problem.fits, len(self.sample)))

    def update(self, output: Tensor, loss: Tensor, iteration: int) -> None:
        """Take in the output and loss of an iteration, counted from 1."""
        self.output, self.loss = output, loss
        if self.config.average is not None:
            self.average.lerp_(output, 1 - self.config.average)
        if len(self.window):
            self.window[(iteration - 1) % len(self.window)] = output.flatten(1)[:, self.sample]
        if "es-emv" in self.config.stop:
            distance = (output - self.moving_mean).square().flatten(1).mean(1)
            self.moving_variance.add_(MOVING_RATE * distance).mul_(1 - MOVING_RATE)
            self.moving_mean.lerp_(output, MOVING_RATE)

    def image(self, iteration: int) -> Tensor:
        """Return the averaged output after so many iterations, [F, C, H, W]."""
        if self.config.average is None or iteration == 0:
            return self.output
        return self.average / (1 - self.config.average**iteration)

    def read(self, iteration: int) -> Statistics:
        """Wait for the device; return the statistics, averaged over fits."""
        with torch.no_grad():
            image = self.image(iteration)
            ideal = self.operator(image)
            share = self.measured.mean()
            residual = (ideal - self.observation).square().mean() / share
            nothing = torch.full_like(residual, math.nan)
            expected = nothing
            if self.sigma is not None:
                level = torch.full_like(ideal, self.sigma**2)
                level = clipped_variance(ideal, self.sigma) if self.clipped else level
                expected = (level * self.measured).mean() / share
            full = len(self.window) and iteration >= len(self.window)
            values = [
                self.loss.mean(),
                residual.sqrt(),
                expected.sqrt(),
                self.window.var(dim=0, correction=0).mean() if full else nothing,
                self.moving_variance.mean() if "es-emv" in self.config.stop else nothing,
                nothing if self.truth is None else (image - self.truth).square().mean(),
            ]
            return Statistics(*torch.stack(values).tolist())

    def good(self) -> dict[str, Tensor]:
        """Return what a divergent fit has to go back to; repeated iterations rewrite the window."""
        return {
            "average": self.average,
            "output": self.output,
            "moving_mean": self.moving_mean,
            "moving_variance": self.moving_variance,
        }


def spread(count: int) -> Tensor:
    """Return at most `PIXELS` positions among `count`, evenly spread, [n] int64."""
    positions = min(PIXELS, count)
    return torch.arange(positions) * count // positions
