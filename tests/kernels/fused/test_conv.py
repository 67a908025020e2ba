"""Forward convolutions against plain PyTorch, in Triton's interpreter."""

from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashdip.kernels.fused import conv
from flashdip.kernels.fused.geometry import FOLDED, Geometry
from flashdip.kernels.fused.launch import Launch, Map, Norm, Tile
from flashdip.kernels.opset import EPS, Activation
from flashdip.kernels.reference import activate
from tests.kernels.fused.judge import Scratch, judge, poisoned, round_through

SMALL = Tile(rows=2, columns=8, outputs=16, inputs=16, warps=4, stages=2)
SQUARE = Tile(rows=4, columns=4, outputs=16, inputs=16, warps=4, stages=2)
WIDE = Tile(rows=4, columns=4, outputs=128, inputs=64, warps=8, stages=3)
STRIDED = Geometry(stride=2)
POINT = Geometry(size=1, before=0)
NEAREST = Geometry("nearest", 2)
BILINEAR = Geometry("bilinear", 2)


@dataclass
class Problem:
    """A convolution with random operands.

    Weights are multiples of 1/8: their folded sums are exact in every storage type.
    """

    sides: tuple[int, int]
    inputs: int
    outputs: int
    geometry: Geometry
    act: Activation | None = None
    dtype: torch.dtype = torch.float16
    skip: int = 0
    skip_act: Activation | None = None
    add: bool = False
    norm: bool = False
    fits: int = 1
    scratch: Scratch = field(default_factory=Scratch)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        g, (height, width) = self.geometry, self.sides
        self.x = self.map(height, width, self.inputs, self.act)
        size = 3 if g.groups == 2 else g.size
        shape: tuple[int, ...] = (self.fits, size, size, self.inputs, self.outputs)
        self.master = torch.randint(-8, 9, shape, generator=self.generator).double() / 8
        self.weight = apart(fold(self.master) if g.groups == 2 else self.master, self.dtype)
        shape = (self.fits, g.side(height), g.side(width), self.outputs)
        self.y = poisoned(shape, self.dtype)
        self.added = self.normal(*shape).to(self.dtype) if self.add else None
        self.thin = self.thin_weight = self.norms = self.affine = None
        if self.skip:
            self.thin = self.map(2 * height, 2 * width, self.skip, self.skip_act)
            rows = self.normal(self.fits, 9 * self.skip, self.outputs).to(self.dtype)
            self.thin_weight = F.pad(rows, (0, 0, 0, -9 * self.skip % 16))
        if self.norm:
            rows = self.normal(4, self.fits, self.outputs)
            self.norms = Norm(*(apart(row, torch.float32) for row in rows))
            self.affine = poisoned((self.fits, 4, self.outputs), torch.float32)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def map(self, height: int, width: int, channels: int, act: Activation | None) -> Map:
        raw = self.normal(self.fits, height, width, channels).to(self.dtype)
        if act is None:
            return Map(raw)
        return Map(raw, self.normal(self.fits, 4, channels).float(), act)

    def convolution(self, tile: Tile) -> conv.Convolution:
        x, norms, affine = self.x, self.norms, self.affine
        return conv.Convolution(x, self.weight, self.geometry, self.y, tile, norms, affine)

    def launch(self, tile: Tile) -> Launch:
        return conv.forward(
            "test", self.x, self.weight, self.geometry, self.y, tile, self.scratch,
            norm=self.norms, affine=self.affine, skip=self.thin, skip_weight=self.thin_weight,
            add=self.added,
        )  # fmt: skip

    def expected(self, dtype: torch.dtype) -> Tensor:
        """Compute y in float64, or in float32 and rounded wherever an eager run would store."""
        exact = dtype == torch.float64
        compute = torch.float64 if exact else torch.float32

        def store(x: Tensor) -> Tensor:
            return x if exact else round_through(x, dtype)

        y = store(convolve(store(value(self.x, compute)), self.master.to(compute), self.geometry))
        if self.thin is not None and self.thin_weight is not None:
            kernel = self.thin_weight[:, : 9 * self.skip].unflatten(1, (3, 3, -1)).to(compute)
            thin = store(value(self.thin, compute))
            y = store(y + store(convolve(thin, kernel, Geometry(pad=self.geometry.pad))))
        return y if self.added is None else store(y + self.added.to(compute))

    def check(self) -> None:
        """Judge y, and the statistics of y as it is stored."""
        judge(self.y, self.expected(torch.float64), self.expected(self.dtype), self.dtype)
        self.scratch.check()
        if self.norms is not None and self.affine is not None:
            y = self.y.double()
            mean = y.mean((1, 2))
            inverse = torch.rsqrt(y.var((1, 2), correction=0) + EPS)
            scale = self.norms.gamma * inverse
            rows = torch.stack([scale, self.norms.beta - mean * scale, mean, inverse], 1)
            torch.testing.assert_close(self.affine.double(), rows, rtol=1e-5, atol=1e-5)


def apart(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x with the rows of its fits apart, like a view of a flat buffer of parameters."""
    flat = F.pad(x.flatten(1), (8, 16), value=float("nan")).to(dtype)
    rows: Tensor = flat[:, 8:-16].unflatten(1, x.shape[1:])
    return rows


def fold(master: Tensor) -> Tensor:
    """Sum the taps [F, 3, 3, I, O] to [F, 2, 2, 2, 2, I, O]."""
    share = torch.zeros(2, 2, 3, dtype=torch.float64)  # [group, slot, tap]
    for group, slots in enumerate(FOLDED):
        for slot, taps in enumerate(slots):
            share[group, slot, list(taps)] = 1
    return torch.einsum("gst,hur,ftrio->fghsuio", share, share, master)


def value(x: Map, dtype: torch.dtype) -> Tensor:
    raw = x.raw.to(dtype)
    if x.affine is None:
        return raw
    scale, shift, *_ = x.affine.to(dtype)[:, :, None, None].unbind(1)
    return activate(raw * scale + shift, x.act)


def convolve(x: Tensor, master: Tensor, geometry: Geometry) -> Tensor:
    """Convolve [F, H, W, I], unfolded."""
    x, before = x.movedim(3, 1), geometry.before
    if geometry.groups == 2:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        before += geometry.kind == "bilinear"
    x = F.pad(x, (before,) * 4, mode="reflect" if geometry.pad == "reflection" else "constant")
    weight = master.permute(0, 4, 3, 1, 2)
    fits = zip(x.split(1), weight, strict=True)
    y = torch.cat([F.conv2d(image, kernel, stride=geometry.stride) for image, kernel in fits])
    return y.movedim(1, 3)


CASES = {
    "plain": (Problem((3, 5), 16, 16, Geometry()), SMALL),
    "prologue": (Problem((3, 5), 20, 20, Geometry(), "LeakyReLU", norm=True), SMALL),
    "zero padding": (
        Problem((2, 3), 5, 4, Geometry(pad="zero"), "ELU", torch.bfloat16, norm=True), SMALL
    ),
    "stride 2": (
        Problem((7, 11), 5, 20, STRIDED, "Swish", torch.float32, norm=True, fits=2), SMALL
    ),
    "stride 2, plain": (Problem((2, 2), 4, 4, STRIDED), SQUARE),
    "large kernel": (
        Problem((5, 4), 4, 5, Geometry(size=5, before=2, pad="zero"), "LeakyReLU", add=True),
        SQUARE,
    ),
    "7x7": (
        Problem((6, 5), 4, 5, Geometry(size=7, before=3), "LeakyReLU", norm=True, fits=2), SQUARE
    ),
    "7x7, stride 2": (
        Problem(
            (5, 7), 5, 4, Geometry(size=7, stride=2, before=3, pad="zero"), "ELU", torch.float32,
            norm=True,
        ),
        SMALL._replace(splits=2),
    ),
    "256 channels": (Problem((3, 2), 256, 256, Geometry(), "LeakyReLU", norm=True), WIDE),
    "256 channels, nearest": (
        Problem((2, 2), 256, 256, NEAREST, skip=4, skip_act="LeakyReLU", norm=True), WIDE
    ),
    "256 channels, split": (
        Problem((2, 3), 256, 256, STRIDED, "LeakyReLU", norm=True), WIDE._replace(splits=3)
    ),
    "1x1": (Problem((3, 11), 20, 16, POINT, "LeakyReLU", norm=True, fits=2), SMALL),
    "1x1, many tiles": (Problem((23, 23), 4, 4, POINT, norm=True), SQUARE),
    "1x1, blocks": (Problem((2, 3), 36, 36, POINT, dtype=torch.bfloat16), SMALL),
    "nearest": (Problem((3, 5), 20, 16, NEAREST, norm=True), SQUARE),
    "nearest, raw": (Problem((2, 2), 4, 4, NEAREST, "LeakyReLU", torch.float32, add=True), SMALL),
    "nearest, skip": (
        Problem((2, 3), 16, 20, NEAREST, skip=4, skip_act="LeakyReLU", norm=True, fits=2), SMALL
    ),
    "nearest, zero padding, skip": (
        Problem(
            (3, 2), 5, 4, Geometry("nearest", 2, pad="zero"), "ELU", torch.bfloat16, 5, "Swish",
            norm=True,
        ),
        SQUARE,
    ),
    "nearest, plain skip": (Problem((2, 2), 4, 4, NEAREST, None, torch.float32, 7), SQUARE),
    "bilinear": (Problem((2, 3), 20, 16, BILINEAR), SQUARE),
    "bilinear, raw": (Problem((3, 5), 4, 5, BILINEAR, "LeakyReLU", torch.float32, fits=2), SMALL),
    "split": (
        Problem((3, 5), 20, 20, Geometry(), "LeakyReLU", norm=True), SMALL._replace(splits=5)
    ),
    "split nearest": (
        Problem((2, 3), 20, 16, NEAREST, None, torch.float32, 4, "LeakyReLU", norm=True, fits=2),
        SMALL._replace(splits=3),
    ),
    "slices": (Problem((3, 5), 4, 40, Geometry(), norm=True), SMALL._replace(outputs=64)),
    "more splits than steps": (
        Problem((3, 2), 4, 4, POINT, "LeakyReLU"), SMALL._replace(splits=3)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_forward(case: str) -> None:
    problem, tile = CASES[case]
    problem.launch(tile)()
    problem.check()


def test_forward_pair() -> None:
    first = Problem((5, 7), 20, 20, STRIDED, "LeakyReLU", norm=True, fits=2)
    second = Problem((5, 7), 20, 4, POINT, "LeakyReLU", norm=True, fits=2)
    tiles = SQUARE._replace(splits=2), SMALL
    launch = conv.forward_pair(
        "test", first.convolution(tiles[0]), second.convolution(tiles[1]), first.scratch
    )
    launch()
    first.check()
    second.check()
    assert launch.flops == first.launch(tiles[0]).flops + second.launch(tiles[1]).flops


def test_order_does_not_matter(request: pytest.FixtureRequest) -> None:
    """Neither the order of the programs nor an earlier launch changes a bit."""
    p = Problem((2, 2), 20, 4, NEAREST, skip=4, skip_act="ELU", norm=True, fits=2)
    launch = p.launch(SMALL._replace(splits=2))
    launch()
    assert p.affine is not None
    first = p.y.clone(), p.affine.clone()
    request.getfixturevalue("reversed_order")
    p.y.fill_(torch.nan)
    p.affine.fill_(torch.nan)
    launch()
    assert torch.equal(p.y, first[0])
    assert torch.equal(p.affine, first[1])


def test_bilinear_is_what_the_filter_expects() -> None:
    """[1, 2, 1] / 4 along each axis, over the result, is the convolution of the enlarged map."""
    x = torch.randn(1, 3, 4, 2, dtype=torch.float64)
    master = torch.randn(1, 3, 3, 2, 3, dtype=torch.float64)
    row = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64) / 4
    kernel = torch.outer(row, row).expand(3, 1, 3, 3)
    filtered = F.conv2d(convolve(x, master, BILINEAR).movedim(3, 1), kernel, groups=3)
    large = F.interpolate(x.movedim(3, 1), scale_factor=2, mode="bilinear")
    exact = F.conv2d(F.pad(large, (1,) * 4, mode="reflect"), master[0].permute(3, 2, 0, 1))
    torch.testing.assert_close(filtered, exact)


def test_cost() -> None:
    """Products after folding; each element once."""
    p = Problem((2, 3), 16, 20, NEAREST, skip=4, fits=2)
    launch = p.launch(SMALL)
    assert launch.flops == 2 * (2 * 4 * 6 * 20) * (4 * 16 + 9 * 4)
    elements = 2 * (6 * 16 + 16 * 16 * 20 + 24 * 20 + 24 * 4 + 48 * 20)
    assert launch.bytes == 2 * elements
