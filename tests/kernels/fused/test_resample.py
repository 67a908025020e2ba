"""Downsampling in front of the loss, in Triton's interpreter, against autograd."""

import pytest
import torch
from torch import Tensor

from flashdip.kernels.fused import resample
from flashdip.kernels.resample import Kernel, downsample
from tests.kernels.fused.judge import Scratch, poisoned


class Case:
    """An image, what was measured, and what the kernels made of them."""

    def __init__(self, shape: tuple[int, int, int, int], kernel: Kernel, factor: int) -> None:
        generator = torch.Generator().manual_seed(factor)
        self.kernel, self.factor = kernel, factor
        scratch = Scratch()
        self.image = torch.rand(shape, generator=generator)
        small = (*shape[:2], shape[2] // factor, shape[3] // factor)
        self.target = torch.rand(small, generator=generator)
        self.residual, self.loss, self.dimage = (
            poisoned(written, torch.float32) for written in (small, shape[:1], shape)
        )
        how = kernel, factor, scratch
        launch = resample.residual("", self.image, self.target, self.residual, self.loss, *how)
        launch()
        scratch.check()
        resample.adjoint("", self.residual, self.dimage, *how)()

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Residual, loss and the loss's gradient with respect to the image."""
        image = self.image.double().requires_grad_()
        residual = downsample(image, self.kernel, self.factor) - self.target
        loss = residual.square().mean((1, 2, 3))
        (gradient,) = torch.autograd.grad(loss.sum(), image)
        return residual.detach(), loss.detach(), gradient


@pytest.mark.parametrize(
    ("shape", "kernel", "factor"),
    [
        ((2, 3, 12, 20), "lanczos2", 4),
        ((1, 1, 10, 15), "lanczos3", 5),
        ((1, 2, 21, 15), "lanczos2", 3),
        ((2, 1, 10, 6), "gauss12", 2),
        ((1, 1, 30, 20), "gauss1sq2", 10),
        ((1, 3, 4, 6), "box", 2),
    ],
)
def test_residual_and_adjoint(
    shape: tuple[int, int, int, int], kernel: Kernel, factor: int
) -> None:
    """All kernels; at borders, where the repeated pixels gather; pixels that no tap sees."""
    case = Case(shape, kernel, factor)
    found = case.residual, case.loss, case.dimage
    for actual, exact in zip(found, case.exact(), strict=True):
        scale = float(exact.abs().max())
        torch.testing.assert_close(actual.double(), exact, rtol=0, atol=1e-6 * scale)


def test_in_any_order(reversed_order: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever program is last, the loss has the same bits."""
    mirrored = Case((1, 3, 20, 20), "lanczos2", 2)
    monkeypatch.undo()
    plain = Case((1, 3, 20, 20), "lanczos2", 2)
    assert torch.equal(mirrored.loss, plain.loss)
    assert torch.equal(mirrored.dimage, plain.dimage)
