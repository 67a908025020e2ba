"""The separable downsampler is the published dense one."""

import pytest
import torch

from flashdip.kernels.resample import KERNELS, Kernel, downsample, taps
from tests import golden


@pytest.mark.parametrize("name", golden.downsample_cases())
def test_agrees_with_the_published_code(name: str) -> None:
    """To 1e-8: the published code keeps its float64 taps in float32."""
    known = golden.downsample_case(name)
    kernel: Kernel = known.kernel  # type: ignore[assignment]
    small = downsample(golden.downsample_input(), kernel, known.factor)
    assert tuple(small.shape) == known.shape
    torch.testing.assert_close(golden.sample(small), known.output_sample, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kernel", ["lanczos2", "lanczos3", "box"])
@pytest.mark.parametrize("factor", [2, 3, 4, 5])
def test_stays_centred(kernel: Kernel, factor: int) -> None:
    """A ramp becomes the ramp of the blocks' centres, away from the border."""
    ramp = torch.arange(16.0 * factor).expand(1, 1, 16 * factor, 16 * factor).double()
    small = downsample(ramp, kernel, factor)[0, 0, 8]
    centres = factor * torch.arange(16.0).double() + (factor - 1) / 2
    torch.testing.assert_close(small[4:-4], centres[4:-4], rtol=0, atol=0.02 * factor)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_constants_stay(kernel: Kernel, factor: int) -> None:
    """Taps sum to one and the border is replicated, so that a flat image stays flat."""
    assert sum(taps(kernel, factor)) == pytest.approx(1, abs=1e-12)
    small = downsample(torch.full((1, 2, 6 * factor, 4 * factor), 0.3), kernel, factor)
    torch.testing.assert_close(small, torch.full((1, 2, 6, 4), 0.3))
