"""The head, the loss and all gradients, in Triton's interpreter, against float64 autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flashdip.kernels import reference
from flashdip.kernels.fused import head
from flashdip.kernels.fused.launch import Launch, Map, Norm, Tile
from flashdip.kernels.opset import EPS, Activation
from tests.kernels.fused.judge import Scratch, judge, poisoned, round_through

half, brain, single = torch.float16, torch.bfloat16, torch.float32
DECAY, SCALE = 0.9, 64.0


class Case:
    """A map, a head, an image to compare with, and buffers of NaN for all that is written."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        outputs: int,
        dtype: torch.dtype,
        *,
        act: Activation = "LeakyReLU",
        crop: tuple[int, int] = (0, 0),
        mask: bool = False,
        bias: bool = True,
        sigmoid: bool = True,
        programs: int = 3,
    ) -> None:
        generator = torch.Generator().manual_seed(sum(shape) + outputs)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        fits, height, width, inputs = shape
        self.dtype, self.act, self.sigmoid = dtype, act, sigmoid
        self.tile = Tile(rows=2, columns=8, splits=programs, warps=4)
        self.raw = (3 * draw(*shape) + draw(fits, 1, 1, inputs)).to(dtype)
        # Parameters lie in one flat buffer, each fit's in its row; the weight's copy likewise.
        count = inputs * outputs
        flat = draw(fits, count + outputs + 2 * inputs)
        found = poisoned(tuple(flat.shape), single)
        self.weight = flat.to(dtype)[:, :count].view(fits, 1, 1, inputs, outputs)
        self.dweight = found[:, :count].view(self.weight.shape)
        self.bias = flat[:, count : count + outputs] if bias else None
        self.dbias = found[:, count : count + outputs] if bias else None
        gamma, beta = flat[:, count + outputs :].view(fits, 2, inputs).unbind(1)
        self.norm = Norm(gamma, beta, *found[:, count + outputs :].view(fits, 2, inputs).unbind(1))
        image = (fits, outputs, height - crop[0], width - crop[1])
        self.target = draw(*image).sigmoid()
        self.mask = draw(*image).sigmoid().round() if mask else None
        self.doutput = draw(*image) / self.target[0].numel()
        self.before = draw(*image).sigmoid()
        self.output, self.average = poisoned(image, single), self.before.clone()
        self.loss = poisoned((fits,), single)
        self.dx = poisoned(shape, dtype)
        self.pull = poisoned((fits, 3, inputs), single)
        self.scratch = Scratch()

    def map(self) -> Map:
        """The head's input, with the affine that the layer before it has left."""
        raw = self.raw.double()
        mean, variance = raw.mean((1, 2)), raw.var((1, 2), correction=0)
        inverse = (variance + EPS).rsqrt()
        scale = self.norm.gamma * inverse
        affine = torch.stack([scale, self.norm.beta - mean * scale, mean, inverse], 1).float()
        return Map(self.raw, affine, self.act)

    def exact(
        self, dtype: torch.dtype, storage: torch.dtype | None, doutput: Tensor | None = None
    ) -> dict[str, Tensor]:
        """All results by autograd; `storage` rounds what an eager run would store."""

        def store(x: Tensor) -> Tensor:
            return x if storage is None else round_through(x, storage)

        given = (self.raw, self.weight, self.norm.gamma, self.norm.beta, self.bias)
        raw, weight, gamma, beta, bias = (
            None if t is None else t.to(dtype, copy=True).requires_grad_() for t in given
        )
        assert raw is not None and weight is not None and gamma is not None and beta is not None
        mean, variance = raw.mean((1, 2), keepdim=True), raw.var((1, 2), correction=0, keepdim=True)
        u = (raw - mean) * (variance + EPS).rsqrt() * gamma[:, None, None] + beta[:, None, None]
        u = store(u)
        u.retain_grad()
        y = torch.einsum("fhwi,fio->fohw", store(reference.activate(u, self.act)), weight[:, 0, 0])
        if bias is not None:
            y = y + bias[:, :, None, None]
        output = torch.sigmoid(store(y)) if self.sigmoid else store(y)
        height, width = self.target.shape[2:]
        output = output[:, :, :height, :width]
        residual = (1 if self.mask is None else self.mask.to(dtype)) * output - self.target
        loss = residual.square().mean((1, 2, 3))
        if doutput is None:
            (SCALE * loss.sum()).backward()
        else:
            output.backward(SCALE * doutput.to(dtype))
        average = DECAY * self.before.to(dtype) + (1 - DECAY) * output
        found = {"output": output, "average": average, "loss": loss}
        leaves = {"dx": u, "raw": raw, "dweight": weight, "dgamma": gamma, "dbeta": beta}
        if bias is not None:
            leaves["dbias"] = bias
        gradients = {name: t.grad for name, t in leaves.items() if t.grad is not None}
        return {name: t.detach() for name, t in (found | gradients).items()}

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of `head.head` from `dx` on."""
        return self.dx, self.norm, self.pull, self.dweight, self.dbias

    def head(self) -> Launch:
        """The one launch for operators that keep pixels apart."""
        images = self.target, self.mask, self.output, self.average, self.loss
        return head.head(
            "head",
            self.map(),
            self.weight,
            self.bias,
            *images,
            *self.arguments(),
            decay=DECAY,
            loss_scale=SCALE,
            sigmoid=self.sigmoid,
            tile=self.tile,
            memory=self.scratch,
        )

    def found(self) -> dict[str, Tensor]:
        """What was written."""
        self.scratch.check()
        a, b, c = (row[:, None, None] for row in self.pull.unbind(1))
        raw = a * self.dx.float() + b * self.raw.float() + c
        found = {"output": self.output, "average": self.average, "loss": self.loss, "raw": raw}
        found |= {"dx": self.dx, "dweight": self.dweight}
        found |= {"dgamma": self.norm.dgamma, "dbeta": self.norm.dbeta}
        return found if self.dbias is None else found | {"dbias": self.dbias}


def check(case: Case, names: Callable[[str], bool], doutput: Tensor | None = None) -> None:
    """Judge everything whose name is asked for."""
    exact = case.exact(torch.float64, None, doutput)
    rounded = case.exact(single, case.dtype, doutput)
    for name, actual in case.found().items():
        if names(name):
            judge(actual, exact[name], rounded[name], case.dtype)


@pytest.mark.parametrize(
    "case",
    [
        Case((2, 7, 11, 20), 3, half, crop=(1, 2)),
        Case((1, 13, 11, 20), 3, single, mask=True, programs=40),
        Case((2, 3, 5, 4), 1, brain, mask=True, programs=1),
        Case((1, 2, 2, 16), 4, half, act="Swish", bias=False),
        Case((1, 2, 3, 5), 2, single, act="ELU", sigmoid=False, programs=2),
        Case((1, 3, 5, 256), 3, half, programs=2),
    ],
    ids=lambda case: f"{tuple(case.raw.shape)}-{case.dtype}",
)
def test_head(case: Case) -> None:
    """Image, average, loss and every gradient."""
    case.head()()
    check(case, lambda name: True)


def test_more_programs_than_one_group() -> None:
    """Sums are put together in groups; empty programs do no harm."""
    case = Case((1, 23, 24, 4), 3, half, programs=35)
    case.tile = Tile(rows=1, columns=16, splits=35, warps=4)
    case.head()()
    check(case, lambda name: True)


@pytest.mark.parametrize("dtype", [half, single])
def test_in_two_launches(dtype: torch.dtype) -> None:
    """With an operator in between: draw, then the gradients from what it returns."""
    case = Case((2, 7, 11, 20), 3, dtype, crop=(1, 1))
    x = case.map()
    head.draw(
        "draw",
        x,
        case.weight,
        case.bias,
        case.output,
        case.average,
        decay=DECAY,
        sigmoid=True,
        tile=case.tile,
    )()
    head.backward(
        "backward",
        x,
        case.weight,
        case.bias,
        case.doutput,
        *case.arguments(),
        loss_scale=SCALE,
        sigmoid=True,
        tile=case.tile,
        memory=case.scratch,
    )()
    check(case, lambda name: name != "loss", case.doutput)


def test_without_an_average() -> None:
    """No average is kept where none is wanted."""
    case = Case((1, 2, 3, 4), 1, half)
    launch = head.draw(
        "draw",
        case.map(),
        case.weight,
        case.bias,
        case.output,
        None,
        decay=None,
        sigmoid=True,
        tile=case.tile,
    )
    launch()
    check(case, lambda name: name == "output")


def test_in_any_order(reversed_order: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever program is last, the bits are the same."""
    mirrored, plain = (Case((2, 7, 11, 20), 3, half) for _ in range(2))
    mirrored.head()()
    monkeypatch.undo()
    plain.head()()
    for name, bits in mirrored.found().items():
        assert torch.equal(bits, plain.found()[name]), name
