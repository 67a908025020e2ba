"""Backward of convolutions, in Triton's interpreter, against float64 autograd."""

from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flashdip.kernels.fused.conv_backward import Scale, Side, backward
from flashdip.kernels.fused.geometry import FOLDED, Geometry
from flashdip.kernels.fused.launch import Gradient, Map, Norm, Tile
from flashdip.kernels.opset import EPS, Activation
from flashdip.kernels.reference import activate
from tests.kernels.fused.judge import Scratch, judge, poisoned, round_through

half, brain, single = torch.float16, torch.bfloat16, torch.float32
NEAREST = Geometry("nearest", 2)
BILINEAR = Geometry("bilinear", 2)


class Seen(NamedTuple):
    """What an output row is computed from: a group's weights, and an input row for each slot."""

    group: int
    rows: list[int | None]


def seen(geometry: Geometry, side: int) -> list[Seen]:
    """Say for each output row what it sees, by thinking of the enlarged and padded map."""

    def reflected(row: int, side: int) -> int | None:
        if geometry.pad == "zero" and not 0 <= row < side:
            return None
        row = abs(row)
        return min(row, 2 * (side - 1) - row)

    if geometry.kind == "conv":
        starts = range(0, geometry.members(side) * geometry.stride, geometry.stride)
        slots = range(-geometry.before, geometry.size - geometry.before)
        return [Seen(0, [reflected(start + slot, side) for slot in slots]) for start in starts]
    beyond = int(geometry.kind == "bilinear")
    found = []
    for out in range(-beyond, 2 * side + beyond):
        taps = [reflected(out + tap, 2 * side) for tap in (-1, 0, 1)]
        small = [None if tap is None else tap // 2 for tap in taps]
        group = {-1: 0, 2 * side: 1}.get(out, out % 2)
        rows = [{small[tap] for tap in summed} for summed in FOLDED[group]]
        assert all(len(row) == 1 for row in rows)  # summed taps see the same row
        found.append(Seen(group, [row.pop() for row in rows]))
    return found


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Convolve x [F, H, W, I], output pixel by output pixel."""
    if geometry.groups == 1:
        weight = weight[:, None, None]
    y = []
    for row in seen(geometry, x.shape[1]):
        line = []
        for column in seen(geometry, x.shape[2]):
            total = torch.zeros(len(x), weight.shape[-1], dtype=x.dtype)
            for slot_y, at_y in enumerate(row.rows):
                for slot_x, at_x in enumerate(column.rows):
                    if at_y is not None and at_x is not None:
                        taps = weight[:, row.group, column.group, slot_y, slot_x]
                        total = total + torch.einsum("fi,fio->fo", x[:, at_y, at_x], taps)
            line.append(total)
        y.append(torch.stack(line, 1))
    return torch.stack(y, 1)


@dataclass
class Case:
    """A layer's stored tensors, and buffers of NaN for its gradients."""

    shape: tuple[int, int, int, int]
    outputs: int
    geometry: Geometry
    dtype: torch.dtype = half
    act: Activation | None = None
    side: int = 0
    scale: bool = False
    splits: int = 2
    wanted: bool = True  # dx
    shared: int = 1  # programs that share a sum of dgrad
    block: int = 16  # channels of a program of dgrad
    rows: int = 16  # of a block of a weight, seen as a matrix
    found: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(sum(self.shape) + self.outputs)
        fits, height, width, inputs = self.shape
        g, dtype = self.geometry, self.dtype
        folded = (g.groups,) * 2 if g.groups > 1 else ()
        size = (*folded, g.size, g.size, inputs, self.outputs)
        self.raw = (3 * self.draw(*self.shape) + self.draw(fits, 1, 1, inputs)).to(dtype)
        # Fits lie apart, as views of flat parameters do.
        self.weight = self.draw(fits, 2, *size).to(dtype)[:, 1]
        self.dy = self.draw(fits, g.side(height), g.side(width), self.outputs).to(dtype)
        self.master = self.draw(fits, 3, 3, 3 + inputs, self.outputs)[..., 3:, :]
        self.join = self.draw(fits, 3, inputs)
        self.beside = self.draw(fits, 2, 1, 1, inputs, max(1, self.side)).to(dtype)[:, 1]
        du, of_y = self.draw(2, fits, height, width, max(1, self.side)).to(dtype)
        self.beside_dy = Gradient(du, of_y, 0.5 * self.draw(fits, 3, max(1, self.side)))
        flat = self.draw(fits, 4, inputs)
        poison = poisoned((fits, 4, inputs), single)
        self.norm = Norm(flat[:, 0], flat[:, 2], poison[:, 0], poison[:, 2])

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def affine(self) -> Tensor:
        """The affine that the layer before x has left, [F, 4, I]."""
        raw = self.raw.double()
        inverse = (raw.var((1, 2), correction=0) + EPS).rsqrt()
        scale = self.norm.gamma * inverse
        mean = raw.mean((1, 2))
        return torch.stack([scale, self.norm.beta - mean * scale, mean, inverse], 1).float()

    def exact(self, dtype: torch.dtype, storage: torch.dtype | None) -> dict[str, Tensor]:
        """Gradients by autograd; `storage` rounds what an eager run would store."""

        def store(x: Tensor) -> Tensor:
            return x if storage is None else round_through(x, storage)

        raw, weight, gamma, beta, beside = (
            t.to(dtype).requires_grad_()
            for t in (self.raw, self.weight, self.norm.gamma, self.norm.beta, self.beside)
        )
        u = value = raw
        if self.act is not None:
            variance, mean = torch.var_mean(raw, (1, 2), correction=0, keepdim=True)
            u = (raw - mean) * (variance + EPS).rsqrt()
            u = store(u * gamma[:, None, None] + beta[:, None, None])
            value = activate(u, self.act)
        value = store(value)
        u.retain_grad()
        convolve(value, weight, self.geometry).backward(self.dy.to(dtype), retain_graph=True)
        leaves = {"dweight": weight}
        if self.side:
            du, of_y, pull = (t.to(dtype) for t in self.beside_dy)
            a, b, c = (row[:, None, None] for row in pull.unbind(1))
            y = torch.einsum("fhwi,fio->fhwo", value, beside[:, 0, 0])
            y.backward(store(a * du + b * of_y + c))
            leaves["beside"] = beside
        if self.wanted:
            leaves["dx"] = u
            if self.act is not None:
                leaves |= {"raw": raw, "dgamma": gamma, "dbeta": beta}
        found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        if self.scale:
            found["ds"] = torch.zeros(self.raw.shape[0], self.raw.shape[3], dtype=dtype)
            master = self.master.to(dtype)
            for at in torch.cartesian_prod(*[torch.arange(2)] * 4).tolist():
                taps_y, taps_x = (FOLDED[at[axis]][at[axis + 2]] for axis in (0, 1))
                fold = sum(master[:, y, x] for y in taps_y for x in taps_x)
                found["ds"] += (found["dweight"][:, *at] * fold).sum(-1)
            found["join_dgamma"] = found["ds"] * self.join[:, 1].to(dtype)
        return found

    def run(self) -> dict[str, Tensor]:
        """Gradients by the kernel."""
        fits, _, _, inputs = self.shape
        scratch = Scratch()
        dweight = poisoned((fits, self.splits, *self.weight.shape[1:]), single)
        dx = poisoned(self.shape, self.dtype) if self.wanted else None
        x, norm, pull, side, scale = Map(self.raw), None, None, None, None
        if self.act is not None:
            x = Map(self.raw, self.affine(), self.act)
            if self.wanted:
                norm, pull = self.norm, poisoned((fits, 3, inputs), single)
        if self.side:
            side = Side(
                self.beside_dy,
                self.beside,
                poisoned((fits, 3, *self.beside.shape[1:]), single),
            )
        if self.scale:
            gradients = poisoned((fits, 2, inputs), single)
            scale = Scale(self.master, self.join, poisoned((fits, inputs), single), gradients[:, 0])
        launch = backward(
            "test", x, self.weight, self.dy, self.geometry,
            Tile(4, 4, outputs=self.block, inputs=16, splits=self.shared, warps=4, stages=2),
            Tile(rows=self.rows, columns=1, outputs=16, inputs=32, warps=4, stages=2), scratch,
            dx=dx, dweight=dweight, norm=norm, pull=pull, side=side, scale=scale,
        )  # fmt: skip
        launch()
        scratch.check()
        found = {"dweight": dweight.sum(1)}
        if dx is not None:
            found["dx"] = dx
        if pull is not None and dx is not None:
            a, b, c = (row[:, None, None] for row in pull.unbind(1))
            found |= {"raw": a * dx.float() + b * self.raw.float() + c}
            found |= {"dgamma": self.norm.dgamma, "dbeta": self.norm.dbeta}
        if side is not None:
            found["beside"] = side.dweight.sum(1)
        if scale is not None:
            found |= {"ds": scale.gradient, "join_dgamma": scale.dgamma}
        return found

    def check(self) -> None:
        found = self.run()
        exact, rounded = self.exact(torch.float64, None), self.exact(single, self.dtype)
        assert found.keys() == exact.keys()
        for name, value in found.items():
            judge(value, exact[name], rounded[name], self.dtype)


CONV = Geometry()
STRIDED = Geometry(stride=2)


@pytest.mark.parametrize(
    "case",
    [
        # So small that every tile reaches all ends.
        Case((1, 2, 2, 5), 4, NEAREST),
        Case((2, 2, 3, 5), 4, BILINEAR, scale=True),
        Case((1, 3, 5, 5), 20, NEAREST, scale=True, dtype=single, splits=1),
        Case((1, 2, 2, 16), 4, BILINEAR, act="LeakyReLU", splits=1),
        Case((1, 2, 3, 4), 5, NEAREST._replace(pad="zero"), act="Swish"),
        Case((1, 3, 2, 4), 20, CONV, act="ELU", dtype=brain, splits=1),
        # With a tile that reaches none, and channels in several blocks.
        Case((1, 10, 11, 5), 4, NEAREST, splits=1),
        Case((1, 11, 10, 4), 5, BILINEAR, splits=1),
        Case((1, 10, 10, 20), 4, CONV, act="LeakyReLU", splits=1),
        # Other geometries.
        Case((2, 7, 5, 16), 5, STRIDED, act="LeakyReLU", side=4),
        Case((1, 17, 18, 4), 16, STRIDED, splits=1),
        Case((1, 7, 6, 5), 4, STRIDED, side=4, wanted=False, dtype=single),
        Case((1, 3, 5, 4), 4, STRIDED._replace(pad="zero"), dtype=brain),
        Case((1, 3, 5, 4), 4, STRIDED._replace(pad="zero"), act="LeakyReLU", side=4),
        Case((1, 3, 6, 4), 4, Geometry(size=5, before=2), splits=1),
        Case((1, 5, 6, 4), 4, Geometry(size=4, stride=2), splits=3),
        Case((1, 5, 7, 4), 5, Geometry(size=7, before=3), act="LeakyReLU", splits=1),
        Case((1, 7, 5, 4), 4, Geometry(size=7, stride=2, before=3, pad="zero"), act="ELU"),
        Case((1, 5, 6, 20), 4, Geometry(size=1, stride=2, before=0), act="none"),
        Case((1, 5, 6, 4), 20, Geometry(size=1, before=0), dtype=brain),
        # Sums that programs share, also more programs than terms; results in slices.
        Case((1, 5, 6, 20), 20, BILINEAR, shared=3, splits=1),
        Case((2, 7, 5, 5), 4, STRIDED, act="LeakyReLU", side=4, shared=6),
        Case((1, 5, 4, 72), 4, CONV, act="LeakyReLU", shared=2, block=128, splits=1),
        Case((1, 3, 5, 40), 4, CONV, act="ELU", block=64, splits=1),
        # 256 channels, in blocks of as many as a GPU takes.
        Case((1, 2, 3, 256), 20, CONV, act="LeakyReLU", block=128, rows=128, splits=1),
        Case((1, 2, 3, 20), 256, STRIDED, act="LeakyReLU", side=4, shared=3, rows=128),
        # Blocks of a weight with parts of several slots.
        Case((1, 3, 4, 20), 4, NEAREST, scale=True, rows=32),
        Case((1, 4, 3, 8), 4, CONV._replace(pad="zero"), act="Swish", rows=64),
    ],
    ids=repr,
)
def test_gradients(case: Case) -> None:
    """All gradients of one layer."""
    case.check()


def test_the_order_of_programs_does_not_matter(request: pytest.FixtureRequest) -> None:
    """Where the first program arrives last, the bits are the same."""
    forwards = Case((1, 3, 5, 20), 4, NEAREST, act="LeakyReLU", scale=True, splits=1).run()
    request.getfixturevalue("reversed_order")
    backwards = Case((1, 3, 5, 20), 4, NEAREST, act="LeakyReLU", scale=True, splits=1).run()
    for name, value in forwards.items():
        assert torch.equal(value, backwards[name])
