"""The stopping statistics on the device, against those of the eager backends."""

from dataclasses import replace

import pytest
import torch

from flashdip.engine.backends.observe import MOVING_RATE, Observer
from flashdip.engine.config import FitConfig, StopRule
from flashdip.engine.problems import Problem
from flashdip.kernels.fused.observe import observe
from tests.kernels.fused.judge import Scratch


@pytest.mark.parametrize("stop", [("es-wmv",), ("es-emv",), ("es-wmv", "es-emv")], ids="+".join)
def test_statistics(stop: tuple[StopRule, ...]) -> None:
    """A ring that is written over, two fits, more values than one program takes in."""
    config = replace(FitConfig(), stop=stop, window=3, average=None)
    problem = Problem(torch.zeros(2, 3, 31, 29), (3, 31, 29))
    watched, plain = (
        Observer(problem, config, torch.device("cpu"), torch.float32, None) for _ in range(2)
    )
    counters, output = torch.zeros(2, dtype=torch.int32), torch.zeros(2, 3, 31, 29)
    windowed, moving = "es-wmv" in stop, "es-emv" in stop
    launch = observe(
        "observe",
        output,
        counters,
        Scratch(),
        window=watched.window if windowed else None,
        sample=watched.sample if windowed else None,
        mean=watched.moving_mean if moving else None,
        variance=watched.moving_variance if moving else None,
        rate=MOVING_RATE,
    )
    for step in range(5):
        output.copy_(torch.rand(output.shape, generator=torch.Generator().manual_seed(step)))
        launch()
        counters += 1
        plain.update(output.clone(), torch.zeros(2), [step + 1] * 2)
        torch.testing.assert_close(watched.window, plain.window, rtol=0, atol=0)
        torch.testing.assert_close(watched.moving_mean, plain.moving_mean)
        torch.testing.assert_close(watched.moving_variance, plain.moving_variance)
