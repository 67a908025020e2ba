"""How fast a network fits what is natural and what is not: it resists noise.

Four targets with one network: a picture, the picture with noise, the picture with its pixels
shuffled, and noise (Ulyanov et al., section 2, "high noise impedance").
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flashdip.engine.config import FitConfig
from flashdip.engine.events import Event
from flashdip.engine.fit import fit
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.problems import Problem

SIGMA = 25 / 255
SHARE = 0.1  # of its variance that is left to be fitted when a target counts as fitted
TARGETS = ("image", "image + noise", "shuffled pixels", "noise")


def targets(image: Tensor, seed: int) -> dict[str, Tensor]:
    """Return what is fitted, by the names of `TARGETS`.

    Args:
        image: [1, C, H, W] in [0, 1].
        seed: Of noise and shuffling.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(image.shape, generator=generator)
    count = image.shape[2] * image.shape[3]
    order = torch.randperm(count, generator=generator)
    shuffled = image.flatten(2)[:, :, order].view(image.shape)  # a pixel keeps its colour
    white = torch.rand(image.shape, generator=generator)
    found = (image, (image + SIGMA * noise).clamp(0, 1), shuffled, white)
    return dict(zip(TARGETS, found, strict=True))


def impedance(
    image: Tensor,
    network: SkipConfig,
    *,
    iterations: int,
    seed: int = 0,
    device: str = "auto",
    callback: Callable[[str, Event], None] = lambda name, event: None,
) -> dict[str, Any]:
    """Fit each target, from equal weights, and compare.

    Nothing is averaged or perturbed: what is seen is the network's own reluctance.

    Args:
        image: [1, C, H, W] in [0, 1].
        network: Which network.
        iterations: Of each fit.
        seed: Of everything.
        device: Where to fit.
        callback: Receives the name of a target and the events of its fit.

    Returns:
        For each target: "iterations" and "losses" (mean squared error), "share" (the last loss, of
        the target's variance), and "fitted" (the first iteration read at which `SHARE` of the
        variance is left, or None).
    """
    config = FitConfig(
        network=network,
        iterations=iterations,
        average=None,
        perturbation=0.0,
        read_every=max(1, iterations // 100),
        seed=seed,
    )
    found = {}
    for name, target in targets(image, seed).items():
        problem = Problem(target, (target.shape[1], target.shape[2], target.shape[3]))
        result = fit(problem, config, device=device, callback=partial(callback, name))
        history = result.record["history"]
        variance = float(target.var(dim=(2, 3), correction=0).mean())
        pairs = list(zip(history["iteration"], history["loss"], strict=True))
        found[name] = {
            "iterations": history["iteration"],
            "losses": history["loss"],
            "share": history["loss"][-1] / variance,
            "fitted": next((at for at, loss in pairs if loss <= SHARE * variance), None),
        }
    return found
