"""Results as a fit leaves them, made without one."""

from typing import Any

import numpy as np
import torch

from flashdip.engine.config import FitConfig
from flashdip.engine.result import Result, plain_picture


def result(
    channels: int = 3, height: int = 48, width: int = 64, factor: int = 1, **record: Any
) -> Result:
    """Return the result of a fit that took white noise of sigma 20 off a smooth picture.

    Args:
        channels, height, width: Of the observation.
        factor: How much larger the image is.
        record: Values in place of the record's.
    """
    y, x = np.mgrid[: height * factor, : width * factor] / (height * factor)
    waves = [0.5 + 0.3 * np.sin(5 * x + c) * np.cos(4 * y) for c in range(channels)]
    image = torch.from_numpy(np.stack(waves).astype(np.float32))
    noise = np.random.default_rng(0).normal(0, 20 / 255, (channels, height, width))
    residual = torch.from_numpy(noise.astype(np.float32))
    observation = image[:, ::factor, ::factor] + residual
    steps = list(range(10, 110, 10))
    history = {
        "iteration": steps,
        "loss": [0.1 / step for step in steps],
        "variance": [None, None, *(1e-3 / step for step in steps[2:])],
        "psnr": [20 + step / 20 for step in steps],
    }
    values: dict[str, Any] = {
        "psnr": 25.0,
        "iterations": 100,
        "best_iteration": 90,
        "stop_reason": "es-wmv",
        "seconds_setup": 0.5,
        "seconds_fit": 12.0,
        "iterations_per_second": 8.33,
        "peak_memory_bytes": 1 << 28,
        "backend": "native",
        "device": "cpu",
        "precision": "fp32",
        "seed": 0,
        "retries": 0,
        "sigma": 20 / 255,
        "shape": list(image.shape),
        "notes": [],
        "versions": {"flashdip": "0.1.0"},
        "config": FitConfig().record(),
        "history": history,
    }
    measurement = {"observation": observation, "residual": residual}
    return Result(image, values | record, {}, plain_picture(image), measurement)
