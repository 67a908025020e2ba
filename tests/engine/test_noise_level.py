"""Noise levels: estimates from the image alone, and what clipping leaves."""

import numpy as np
import pytest
import torch

from flashdip.engine.noise_level import clipped_variance, estimate_sigma


@pytest.mark.parametrize("sigma", [5 / 255, 25 / 255, 50 / 255])
def test_estimates_white_noise(sigma: float) -> None:
    """Within a tenth on a smooth picture, grey or colour."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0.3, 0.7, 128, dtype=np.float32)[:, None, None]
    for channels in (1, 3):
        noise = rng.normal(0, sigma, (128, 128, channels)).astype(np.float32)
        assert estimate_sigma(ramp + noise) == pytest.approx(sigma, rel=0.1)


def test_flat_images_have_no_noise() -> None:
    """And there is no warning about them."""
    assert estimate_sigma(np.full((32, 32, 3), 0.5, np.float32)) < 1e-12


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.4])
def test_clipped_variance_is_that_of_draws(sigma: float) -> None:
    """Against a million draws, in black, grey and white."""
    x = torch.tensor([0.0, 0.05, 0.5, 0.9, 1.0], dtype=torch.float64)
    draws = torch.randn(1_000_000, 1, generator=torch.Generator().manual_seed(0)).double()
    found = ((x + sigma * draws).clamp(0, 1) - x).square().mean(0)
    torch.testing.assert_close(clipped_variance(x, sigma), found, rtol=0.01, atol=0)
    assert float(clipped_variance(x, 0.0).sum()) == 0
