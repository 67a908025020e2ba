"""Fits that the tests of exported models share: tiny, and one for each way of input."""

import functools
from dataclasses import replace
from typing import Literal

import torch

from flashdip.engine.config import FitConfig
from flashdip.engine.fit import fit
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result

SIZE = (24, 31)  # no multiple of what the network halves
CONFIG = FitConfig(
    network=SkipConfig(inputs=4, down=(8, 8), upsample="nearest"),
    iterations=60,
    betas=(0.8, 0.9),
    precision="fp32",
    seed=5,
)


@functools.cache
def fitted(kind: Literal["noise", "meshgrid"] = "noise") -> Result:
    """Return a short fit to a smooth picture; its average and its network's output differ."""
    network = replace(CONFIG.network, inputs=2 if kind == "meshgrid" else 4)
    config = replace(CONFIG, network=network, input=kind)
    y, x = torch.meshgrid(*(torch.linspace(0, 6, side) for side in SIZE), indexing="ij")
    image = torch.stack([0.5 + 0.3 * torch.sin(x + c) * torch.cos(y) for c in range(3)])[None]
    problem = Problem(image, (3, *SIZE), sigma=0.01)
    result = fit(problem, config, backend="native", device="cpu")
    result.record.update(task="denoise", preset="quick")
    return result
