"""The bilinear filter and its adjoint, in Triton's interpreter, against float64 autograd."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashdip.kernels import reference
from flashdip.kernels.fused import smooth, smooth_backward
from flashdip.kernels.fused.launch import Gradient, Map, Norm, Tile
from flashdip.kernels.opset import EPS, Activation
from tests.kernels.fused.judge import Scratch, judge, poisoned, round_through

half, brain, single = torch.float16, torch.bfloat16, torch.float32
ACT: Activation = "LeakyReLU"
TILE = Tile(rows=4, columns=8, outputs=16, splits=3, warps=4)
LARGER = Tile(rows=8, columns=8, outputs=32, splits=2, warps=4)
KERNEL = torch.outer(*[torch.tensor([1.0, 2.0, 1.0]) / 4] * 2)


class Case:
    """What the kernels read: of a map [F, H, W, O], and of a skip if it has channels."""

    def __init__(self, shape: tuple[int, int, int, int], channels: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(sum(shape) + channels)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        fits, height, width, outputs = shape
        self.shape, self.channels, self.dtype = shape, channels, dtype
        self.p = (4 * draw(fits, height + 2, width + 2, outputs) + 3).to(dtype)
        self.add = draw(*shape).to(dtype)
        self.dy = Gradient(draw(*shape).to(dtype), self.add, 0.5 * draw(fits, 3, outputs))
        # Parameters lie in one flat buffer, each fit's in its row.
        flat = draw(fits, 9 * (channels + 3) * outputs + 2 * outputs)
        gamma, beta = flat[:, : 2 * outputs].view(fits, 2, outputs).unbind(1)
        self.norm = Norm(gamma, beta, gamma, beta)
        self.master = flat[:, 2 * outputs :].view(fits, 3, 3, channels + 3, outputs)
        self.join = draw(fits, 3, channels)  # mean, 1 / standard deviation, s
        raw = draw(fits, height, width, channels).to(dtype)
        self.skip = Map(raw, draw(fits, 4, channels), ACT) if channels else None
        rows = -(-9 * channels // 16) * 16
        scaled = self.master[:, :, :, :channels] * self.join[:, 2, None, None, :, None]
        self.skip_weight = torch.zeros(fits, rows, outputs, dtype=dtype) if channels else None
        if self.skip_weight is not None:
            self.skip_weight[:, : 9 * channels] = scaled.flatten(1, 3)

    def value(self, dtype: torch.dtype, storage: torch.dtype | None) -> Tensor:
        """The skip's value with its border, [F, H + 2, W + 2, C]."""
        assert self.skip is not None and self.skip.affine is not None
        scale, shift = self.skip.affine.to(dtype)[:, :2, None, None].unbind(1)
        value = reference.activate(self.skip.raw.to(dtype) * scale + shift, ACT)
        value = _store(value, storage)
        return F.pad(value.permute(0, 3, 1, 2), (1,) * 4, mode="reflect").permute(0, 2, 3, 1)

    def convolved(self, weight: Tensor, storage: torch.dtype | None) -> Tensor:
        """conv3x3 of the skip; `weight` is [F, 9 C, O]."""
        _, height, width, _ = self.shape
        value = self.value(weight.dtype, storage)
        taps = [value[:, y : y + height, x : x + width] for y in range(3) for x in range(3)]
        return torch.einsum("fhwk,fko->fhwo", torch.cat(taps, -1), weight)

    def of_dy(self, dtype: torch.dtype, storage: torch.dtype | None) -> Tensor:
        """The gradient of the result."""
        a, b, c = self.dy.pull.to(dtype)[:, :, None, None].unbind(1)
        return _store(a * self.dy.du.to(dtype) + b * self.dy.y.to(dtype) + c, storage)


def _store(x: Tensor, storage: torch.dtype | None) -> Tensor:
    """Round as an eager run would, where a storage type is given."""
    return x if storage is None else round_through(x, storage)


def _filtered(p: Tensor) -> Tensor:
    kernel = KERNEL.to(p.dtype).expand(p.shape[3], 1, 3, 3)
    return F.conv2d(p.permute(0, 3, 1, 2), kernel, groups=p.shape[3]).permute(0, 2, 3, 1)


def _forward(case: Case, add: bool, tile: Tile = TILE) -> dict[str, Tensor]:
    fits, _, _, outputs = case.shape
    y, affine = poisoned(case.shape, case.dtype), poisoned((fits, 4, outputs), single)
    scratch = Scratch()
    smooth.forward(
        "",
        case.p,
        y,
        case.norm,
        affine,
        tile,
        scratch,
        skip=case.skip,
        skip_weight=case.skip_weight,
        add=case.add if add else None,
    )()
    scratch.check()
    return {"y": y} | dict(
        zip(("scale", "shift", "mean", "inverse"), affine.unbind(1), strict=True)
    )


def _forward_exact(
    case: Case, add: bool, dtype: torch.dtype, storage: torch.dtype | None
) -> dict[str, Tensor]:
    y = _store(_filtered(case.p.to(dtype)), storage)
    if case.skip_weight is not None:
        weight = case.skip_weight[:, : 9 * case.channels].to(dtype)
        y = _store(y + _store(case.convolved(weight, storage), storage), storage)
    if add:
        y = _store(y + case.add.to(dtype), storage)
    mean, variance = y.mean((1, 2)), y.var((1, 2), correction=0)
    inverse = (variance + EPS).rsqrt()
    scale = case.norm.gamma.to(dtype) * inverse
    shift = case.norm.beta.to(dtype) - mean * scale
    return {"y": y, "scale": scale, "shift": shift, "mean": mean, "inverse": inverse}


def _backward(case: Case, bilinear: bool, tile: Tile = TILE) -> dict[str, Tensor]:
    fits, height, width, outputs = case.shape
    border = 2 * bilinear
    out = poisoned((fits, height + border, width + border, outputs), case.dtype)
    found, of_skip = {"out": out}, {}
    if case.skip_weight is not None:
        patches = -(-(height + border) // tile.rows) * -(-(width + border) // tile.columns)
        programs, rows = min(patches, tile.splits), 9 * case.channels
        found |= {
            "taps": poisoned((fits, height, width, 9, case.channels), case.dtype),
            "dskip": poisoned((fits, programs, rows, outputs), single),
            "ds_skip": poisoned((fits, case.channels), single),
            "dgamma_skip": poisoned((fits, case.channels + 5), single)[:, : case.channels],
        }
        of_skip = {name: found[name] for name in ("taps", "dskip", "ds_skip", "dgamma_skip")}
        of_skip |= {"affine_skip": case.join, "master": case.master}
    scratch = Scratch()
    smooth_backward.backward(
        "",
        case.dy,
        out,
        tile,
        scratch,
        bilinear=bilinear,
        skip=case.skip,
        skip_weight=case.skip_weight,
        **of_skip,
    )()
    scratch.check()
    if case.channels:
        found["dskip"] = found["dskip"].sum(1)
    return found


def _backward_exact(
    case: Case, bilinear: bool, dtype: torch.dtype, storage: torch.dtype | None
) -> dict[str, Tensor]:
    dy = case.of_dy(dtype, storage)
    x = case.p.to(dtype).requires_grad_() if bilinear else torch.zeros_like(dy).requires_grad_()
    (_filtered(x) if bilinear else x).backward(dy)
    assert x.grad is not None
    found = {"out": _store(x.grad, storage)}
    if case.skip_weight is not None:
        weight = case.skip_weight[:, : 9 * case.channels].to(dtype).requires_grad_()
        case.convolved(weight, storage).backward(dy)
        assert weight.grad is not None
        taps = torch.einsum("fhwo,fko->fhwk", dy, weight.detach())
        found["taps"] = _store(taps, storage).unflatten(-1, (9, case.channels))
        found["dskip"] = weight.grad
        master = case.master[:, :, :, : case.channels].flatten(1, 2).to(dtype)
        dskip = weight.grad.unflatten(1, (9, case.channels))
        found["ds_skip"] = torch.einsum("ftco,ftco->fc", dskip, master)
        found["dgamma_skip"] = found["ds_skip"] * case.join[:, 1]
    return found


@pytest.mark.parametrize(
    ("shape", "channels", "add", "dtype"),
    [
        ((2, 6, 18, 20), 4, False, half),
        ((1, 2, 3, 4), 1, False, half),
        ((1, 14, 22, 20), 0, False, single),
        ((2, 6, 10, 16), 0, True, brain),
        ((1, 4, 4, 5), 7, True, half),
        ((1, 4, 6, 4), 5, False, single),
        ((1, 7, 5, 20), 0, False, half),
        ((1, 3, 5, 256), 4, False, half),
    ],
)
def test_forward(
    shape: tuple[int, int, int, int], channels: int, add: bool, dtype: torch.dtype
) -> None:
    """The result and its statistics; patches that reach beyond the map, several blocks."""
    case = Case(shape, channels, dtype)
    found = _forward(case, add)
    exact = _forward_exact(case, add, torch.float64, None)
    rounded = _forward_exact(case, add, single, dtype)
    for name, value in found.items():
        judge(value, exact[name], rounded[name], dtype)


@pytest.mark.parametrize("bilinear", [True, False])
@pytest.mark.parametrize(
    ("shape", "channels", "dtype"),
    [
        ((2, 6, 18, 20), 4, half),
        ((1, 14, 22, 20), 0, single),
        ((1, 6, 10, 16), 1, brain),
        ((1, 4, 4, 5), 7, half),
        ((1, 4, 6, 4), 5, single),
        ((2, 7, 11, 20), 0, half),
        ((1, 2, 3, 4), 0, brain),
        ((1, 3, 5, 256), 4, half),
    ],
)
def test_backward(
    shape: tuple[int, int, int, int], channels: int, dtype: torch.dtype, bilinear: bool
) -> None:
    """dy or its filtered form, and every gradient of a thin skip."""
    case = Case(shape, channels, dtype)
    found = _backward(case, bilinear)
    exact = _backward_exact(case, bilinear, torch.float64, None)
    rounded = _backward_exact(case, bilinear, single, dtype)
    assert found.keys() == exact.keys()
    for name, value in found.items():
        judge(value, exact[name], rounded[name], dtype)


def test_larger_patches() -> None:
    """The patches of GPUs that multiply 64 rows at once; their rim is not full."""
    case = Case((1, 11, 18, 20), 4, half)
    found = _forward(case, False, LARGER)
    exact = _forward_exact(case, False, torch.float64, None)
    rounded = _forward_exact(case, False, single, half)
    found |= _backward(case, True, LARGER)
    exact |= _backward_exact(case, True, torch.float64, None)
    rounded |= _backward_exact(case, True, single, half)
    for name, value in found.items():
        judge(value, exact[name], rounded[name], half)


def test_statistics_far_from_zero() -> None:
    """The variance does not cancel where the mean is a thousand times the deviation."""
    case = Case((1, 6, 10, 4), 0, single)
    case.p = case.p / 4 + 1000
    found = _forward(case, False)
    exact = _forward_exact(case, False, torch.float64, None)
    torch.testing.assert_close(found["inverse"].double(), exact["inverse"], rtol=1e-4, atol=0)


def test_the_order_of_programs_does_not_matter(request: pytest.FixtureRequest) -> None:
    """Where the first program arrives last, the bits are the same."""
    case = Case((1, 6, 18, 20), 4, half)
    forwards = _forward(case, False) | _backward(case, True)
    request.getfixturevalue("reversed_order")
    backwards = _forward(case, False) | _backward(case, True)
    for name, value in forwards.items():
        assert torch.equal(value, backwards[name])
