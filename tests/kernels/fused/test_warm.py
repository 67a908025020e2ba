"""Warm starts on the Triton kernels: the same as on the reference."""

from dataclasses import replace

import pytest
import torch

from flashdip.engine.config import FitConfig
from flashdip.engine.fit import fit
from flashdip.engine.problems import Problem
from tests.kernels.fused.test_many import SHAPE, TINY, image


@pytest.mark.parametrize("stop", [("fixed",), ("es-wmv",)])
def test_launches_begin_with_given_weights(stop: tuple[str, ...]) -> None:
    """Also the 16-bit copies, and biases that the kernels do not use."""
    config: FitConfig = replace(TINY, stop=stop)  # type: ignore[arg-type]
    problem = Problem(image(0), SHAPE, sigma=0.1)
    earlier = fit(problem, replace(config, seed=3), backend="reference", device="cpu")
    expected, found = (
        fit(problem, config, backend=backend, device="cpu", init=earlier)
        for backend in ("reference", "triton")
    )
    torch.testing.assert_close(found.image, expected.image, rtol=0, atol=1e-4)
    still = replace(config, learning_rate=0.0)
    kept = fit(problem, still, backend="triton", device="cpu", init=earlier)
    names = earlier.weights.keys() - {"image"}
    assert all(torch.equal(kept.weights[name], earlier.weights[name]) for name in names)
