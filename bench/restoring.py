"""Whole restorations, timed until they are good enough: each step is one, with another seed.

A photograph with noise of sigma 25 is denoised until the averaged output reaches a PSNR. It is
looked at as often as a fit reads its statistics; the truth stops the clock and chooses nothing.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from flashdip.bench.baselines import keep_pages, variant
from flashdip.bench.cases import SIGMA, configuration
from flashdip.bench.measure import Variant
from flashdip.bench.published import PublishedLoop
from flashdip.engine.backends import resolve_device, select
from flashdip.engine.demo import photograph
from flashdip.engine.metrics import psnr
from flashdip.engine.operators import Each, Identity
from flashdip.engine.problems import Problem

LOOK_EVERY = 10  # iterations
MOST = 3000  # iterations, the published number


class MissedError(RuntimeError):
    """A restoration did not become good enough."""


def noisy(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a photograph with noise, [1, 3, size, size], and without, [3, size, size]."""
    truth = torch.from_numpy(photograph(size).astype(np.float32) / 255).permute(2, 0, 1)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed))
    return (truth + SIGMA * noise).clamp(0, 1)[None].contiguous(), truth.contiguous()


def published(size: int, device: str, target: float) -> Variant:
    """Set the published loop up, without its host work."""
    place = resolve_device(device)
    observation, truth = noisy(size)

    def start(seed: int) -> tuple[Callable[[], None], Callable[[], Tensor]]:
        loop = PublishedLoop(observation.to(place), seed=seed)

        def image() -> Tensor:
            assert loop.average is not None
            return loop.average[0].cpu()

        return loop.step, image

    return _variant(start, truth, target, place)


def engine(
    size: int, device: str, target: float, backend: str, precision: str, name: str
) -> Variant:
    """Set a backend up, with a preset for denoising; its one slot is taken by fit after fit."""
    place = resolve_device(device)
    config = configuration(precision, name)
    chosen, exact, _ = select(backend, place, config)
    observation, truth = noisy(size)
    problem = Problem(observation, (3, size, size), Each([Identity()]))
    step = chosen.prepare(problem, config, place, exact, None)
    keep_pages(place)
    slot, single = step.slots[0], Problem(observation, (3, size, size))

    def start(seed: int) -> tuple[Callable[[], None], Callable[[], Tensor]]:
        slot.replace(single, seed, None)
        return step, lambda: slot.image()[0].cpu()

    return _variant(start, truth, target, place)


def _variant(
    start: Callable[[int], tuple[Callable[[], None], Callable[[], Tensor]]],
    truth: Tensor,
    target: float,
    place: torch.device,
) -> Variant:
    """Return the variant of restorations.

    Args:
        start: Begins a fit with a seed; returns what advances it, and what returns its average.
        truth: [3, size, size].
        target: PSNR, in dB.
        place: Where they run.
    """
    iterations: list[int] = []

    def restore() -> None:
        advance, image = start(len(iterations))
        for iteration in range(1, MOST + 1):
            advance()
            if iteration % LOOK_EVERY == 0 and psnr(image(), truth) >= target:
                iterations.append(iteration)
                return
        raise MissedError(f"{target:g} dB were not reached within {MOST} iterations")

    made = variant(restore, place)
    return replace(made, facts=lambda: {"iterations": iterations, "target_db": target})
