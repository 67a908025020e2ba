"""Backward of a 1x1 convolution, in Triton's interpreter, against float64 autograd."""

import pytest
import torch
from torch import Tensor

from flashdip.kernels import reference
from flashdip.kernels.fused.launch import Gradient, Map, Norm, Tile
from flashdip.kernels.fused.pointwise import backward
from flashdip.kernels.opset import EPS, Activation
from tests.kernels.fused.judge import Scratch, judge, poisoned, round_through

half, brain, single = torch.float16, torch.bfloat16, torch.float32


class Case:
    """A layer's stored tensors, and buffers of NaN for its gradients."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        outputs: int,
        dtype: torch.dtype,
        act: Activation | None,
        programs: int = 3,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(shape) + outputs)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        fits, height, width, inputs = shape
        self.dtype, self.act, self.programs = dtype, act, programs
        self.raw = (3 * draw(*shape) + draw(fits, 1, 1, inputs)).to(dtype)
        # Parameters lie in one flat buffer, each fit's in its row.
        flat = draw(fits, inputs * outputs + 2 * inputs)
        self.weight = flat[:, : inputs * outputs].view(fits, 1, 1, inputs, outputs).to(dtype)
        gamma, beta = flat[:, inputs * outputs :].view(fits, 2, inputs).unbind(1)
        found = torch.full_like(flat, float("nan"))
        self.norm = Norm(gamma, beta, found[:, :inputs], found[:, inputs : 2 * inputs])
        self.dy = Gradient(
            draw(fits, height, width, outputs).to(dtype),
            draw(fits, height, width, outputs).to(dtype),
            0.5 * draw(fits, 3, outputs),
        )

    def affine(self) -> Tensor:
        """The affine that the layer before x has left, [F, 4, I]."""
        raw = self.raw.double()
        mean, variance = raw.mean((1, 2)), raw.var((1, 2), correction=0)
        inverse = (variance + EPS).rsqrt()
        scale = self.norm.gamma * inverse
        return torch.stack([scale, self.norm.beta - mean * scale, mean, inverse], 1).float()

    def exact(self, dtype: torch.dtype, storage: torch.dtype | None) -> dict[str, Tensor]:
        """Gradients by autograd; `storage` rounds what an eager run would store."""

        def store(x: Tensor) -> Tensor:
            return x if storage is None else round_through(x, storage)

        raw, weight, gamma, beta = (
            t.to(dtype).requires_grad_()
            for t in (self.raw, self.weight, self.norm.gamma, self.norm.beta)
        )
        u = value = raw
        if self.act is not None:
            mean = raw.mean((1, 2), keepdim=True)
            variance = raw.var((1, 2), correction=0, keepdim=True)
            u = (raw - mean) * (variance + EPS).rsqrt()
            u = store(u * gamma[:, None, None] + beta[:, None, None])
            value = store(reference.activate(u, self.act))
        u.retain_grad()
        y = torch.einsum("fhwi,fio->fhwo", value, weight[:, 0, 0])
        du, of_y, pull = (t.to(dtype) for t in self.dy)
        a, b, c = (row[:, None, None] for row in pull.unbind(1))
        y.backward(store(a * du + b * of_y + c))
        leaves = {"dx": u, "dweight": weight}
        if self.act is not None:
            leaves |= {"raw": raw, "dgamma": gamma, "dbeta": beta}
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def run(self) -> dict[str, Tensor]:
        """Gradients by the kernel."""
        fits, _, _, inputs = self.raw.shape
        x, pull = Map(self.raw), None
        if self.act is not None:
            x = Map(self.raw, self.affine(), self.act)
            pull = poisoned((fits, 3, inputs), single)
        dx = poisoned(tuple(self.raw.shape), self.dtype)
        dweight = poisoned((fits, self.programs, *self.weight.shape[1:]), single)
        scratch = Scratch()
        norm = None if self.act is None else self.norm
        tile = Tile(rows=2, columns=8, outputs=16, warps=4)
        launch = backward("", x, self.weight, self.dy, dx, norm, pull, dweight, tile, scratch)
        launch()
        scratch.check()
        found = {"dx": dx, "dweight": dweight.sum(1)}
        if pull is not None:
            a, b, c = (row[:, None, None] for row in pull.unbind(1))
            found |= {"raw": a * dx.float() + b * self.raw.float() + c}
            found |= {"dgamma": self.norm.dgamma, "dbeta": self.norm.dbeta}
        return found


@pytest.mark.parametrize(
    ("shape", "outputs", "dtype", "act", "programs"),
    [
        ((2, 7, 11, 20), 16, half, "LeakyReLU", 3),
        ((1, 7, 11, 20), 5, single, "Swish", 2),
        ((1, 3, 5, 4), 20, brain, "LeakyReLU", 1),
        ((2, 2, 2, 5), 4, half, "ELU", 2),
        ((1, 2, 3, 16), 33, half, "none", 1),
        ((1, 7, 11, 4), 16, half, None, 3),
        ((2, 3, 5, 20), 4, brain, None, 2),
        ((1, 3, 5, 256), 256, half, "LeakyReLU", 2),
    ],
)
def test_gradients(
    shape: tuple[int, int, int, int],
    outputs: int,
    dtype: torch.dtype,
    act: Activation | None,
    programs: int,
) -> None:
    """All gradients; blocks of inputs, tiles that reach beyond the map, programs without any."""
    case = Case(shape, outputs, dtype, act, programs)
    found = case.run()
    exact = case.exact(torch.float64, None)
    rounded = case.exact(single, dtype)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        judge(value, exact[name], rounded[name], dtype)


def test_the_order_of_programs_does_not_matter(request: pytest.FixtureRequest) -> None:
    """Where the first program arrives last, the bits are the same."""
    forwards = Case((2, 7, 11, 20), 16, half, "LeakyReLU").run()
    request.getfixturevalue("reversed_order")
    backwards = Case((2, 7, 11, 20), 16, half, "LeakyReLU").run()
    for name, value in forwards.items():
        assert torch.equal(value, backwards[name])
