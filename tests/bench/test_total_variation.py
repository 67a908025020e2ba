"""The solver finds minima: known ones, scikit-image's, and less variation than the truth's."""

import numpy as np
import torch
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor

from flashdip.bench.total_variation import least_variation
from flashdip.engine.demo import add_noise, photograph
from flashdip.engine.operators import Downsample, Identity, Mask


def picture(size: int = 32) -> Tensor:
    return torch.from_numpy(photograph(size) / 255).permute(2, 0, 1)[None].float()


def variation(x: Tensor) -> float:
    down = torch.nn.functional.pad(x.diff(dim=2), (0, 0, 0, 1))
    across = torch.nn.functional.pad(x.diff(dim=3), (0, 1))
    return float((down.square() + across.square()).sqrt().sum())


def test_denoising_agrees_with_scikit_image() -> None:
    noisy = add_noise(photograph(32), 25, 0) / 255
    ours = least_variation(
        Identity(),
        torch.from_numpy(noisy).permute(2, 0, 1)[None].double(),
        (3, 32, 32),
        weight=0.1,
        iterations=2000,
    )
    theirs = denoise_tv_chambolle(noisy, weight=0.1, eps=1e-9, max_num_iter=20000, channel_axis=-1)
    np.testing.assert_allclose(np.moveaxis(ours[0].numpy(), 0, 2), theirs, atol=2e-3)


def test_a_step_loses_contrast_as_the_theory_says() -> None:
    """Each half of a two-valued image moves by weight * (length of the edge) / (its area)."""
    x = torch.zeros(1, 1, 16, 20, dtype=torch.float64)
    x[..., 10:] = 1
    found = least_variation(Identity(), x, (1, 16, 20), weight=0.5, iterations=1500)
    expected = torch.where(x > 0.5, 0.95, 0.05).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_holes_in_a_cartoon_are_closed_exactly() -> None:
    x = torch.full((1, 1, 24, 24), 0.2)
    x[..., 12:] = 0.7
    known = (torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    known[..., 11:13] = 1
    found = least_variation(Mask(known), known * x, (1, 24, 24), iterations=1500)
    torch.testing.assert_close(found, x, rtol=0, atol=2e-3)


def test_measurements_are_met_with_less_variation_than_the_truth() -> None:
    """A weight of 0: of all images that agree with what was measured, one of least variation."""
    truth = picture()
    known = (torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    for operator in (Mask(known), Downsample(2)):
        measured = operator(truth)
        found = least_variation(operator, measured, (3, 32, 32), iterations=2000)
        assert float((operator(found) - measured).square().mean().sqrt()) < 1e-3
        assert variation(found) < 0.95 * variation(truth)
