"""Pooling ahead of a norm, in Triton's interpreter, against float64 autograd."""

import pytest
import torch
from torch import Tensor

from flashdip.kernels import reference
from flashdip.kernels.fused import pool
from flashdip.kernels.fused.launch import Gradient, Norm, Tile
from flashdip.kernels.opset import EPS, Down
from tests.kernels.fused.judge import Scratch, poisoned, round_through
from tests.kernels.fused.test_join import check

half, brain, single = torch.float16, torch.bfloat16, torch.float32
TILE = Tile(rows=1, columns=16, outputs=16, warps=4)


class Case:
    """A map [F, 2 H, 2 W, C], the norm of what it is pooled to, and the gradient of that."""

    def __init__(
        self, shape: tuple[int, int, int, int], dtype: torch.dtype, down: Down = "avg"
    ) -> None:
        generator = torch.Generator().manual_seed(sum(shape))
        fits, height, width, channels = shape
        self.shape, self.dtype, self.down = shape, dtype, down

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.x = (4 * draw(fits, 2 * height, 2 * width, channels) + 3).to(dtype)
        self.dy = Gradient(
            draw(*shape).to(dtype), draw(*shape).to(dtype), 0.5 * draw(fits, 3, channels)
        )
        # Parameters lie in one flat buffer, each fit's in its row.
        gamma, beta = draw(fits, 2 * channels + 5)[:, : 2 * channels].chunk(2, 1)
        self.norm = Norm(gamma, beta, gamma, beta)

    def run(self) -> dict[str, Tensor]:
        """By the kernels."""
        fits, _, _, channels = self.shape
        y, out = poisoned(self.shape, self.dtype), poisoned(tuple(self.x.shape), self.dtype)
        affine = poisoned((fits, 4, channels), single)
        scratch = Scratch()
        largest = None
        if self.down == "max":
            largest = torch.full(self.shape, 255, dtype=torch.uint8)
        pool.forward("", self.x, y, self.down, largest, self.norm, affine, TILE, scratch)()
        pool.backward("", self.dy, out, self.down, largest, TILE, Scratch())()
        scratch.check()
        scale, shift, mean, inverse = affine.unbind(1)
        return dict(y=y, scale=scale, shift=shift, mean=mean, inverse=inverse, out=out)

    def exact(self, dtype: torch.dtype, storage: torch.dtype | None) -> dict[str, Tensor]:
        """By autograd; `storage` rounds what an eager run would store."""

        def store(x: Tensor) -> Tensor:
            return x if storage is None else round_through(x, storage)

        x = self.x.to(dtype).requires_grad_()
        pooled = reference.pool(store(x).permute(0, 3, 1, 2), 2, self.down)
        y = store(pooled.permute(0, 2, 3, 1))
        a, b, c = (row[:, None, None] for row in self.dy.pull.to(dtype).unbind(1))
        y.backward(store(a * self.dy.du.to(dtype) + b * self.dy.y.to(dtype) + c))
        y = y.detach()
        mean, variance = y.mean((1, 2)), y.var((1, 2), correction=0)
        inverse = (variance + EPS).rsqrt()
        scale = self.norm.gamma.to(dtype) * inverse
        shift = self.norm.beta.to(dtype) - mean * scale
        assert x.grad is not None
        return dict(y=y, scale=scale, shift=shift, mean=mean, inverse=inverse, out=x.grad)


@pytest.mark.parametrize(
    "case",
    [
        Case((1, 1, 1, 4), half),
        Case((2, 3, 5, 20), half),
        Case((1, 7, 11, 5), single),
        Case((2, 2, 3, 16), brain),
        Case((2, 3, 5, 20), half, "max"),
        Case((1, 7, 1, 5), single, "max"),
        # Of small maps a tap may see the outermost row from either side.
        Case((1, 1, 2, 4), half, "lanczos2"),
        Case((1, 3, 2, 5), single, "lanczos3"),
        Case((2, 7, 5, 4), half, "lanczos2"),
        Case((1, 6, 3, 4), brain, "lanczos3"),
    ],
    ids=lambda case: f"{case.down}-{case.shape}-{case.dtype}",
)
def test_pooled_and_their_gradient(case: Case) -> None:
    found, exact, rounded = (
        case.run(),
        case.exact(torch.float64, None),
        case.exact(single, case.dtype),
    )
    for name, value in found.items():
        check(value, exact[name], rounded[name], case.dtype)


def test_equal_pixels() -> None:
    """Of equal pixels the first is the largest."""
    case = Case((1, 3, 5, 4), single, "max")
    case.x.copy_(case.x.sign())
    found, exact = case.run(), case.exact(single, None)
    torch.testing.assert_close(found["out"], exact["out"])


def test_the_order_of_programs_does_not_matter(request: pytest.FixtureRequest) -> None:
    """Where the first program arrives last, the bits are the same."""
    forwards = Case((2, 7, 11, 20), half).run()
    request.getfixturevalue("reversed_order")
    for name, value in Case((2, 7, 11, 20), half).run().items():
        assert torch.equal(value, forwards[name])
