"""The join, forward and backward, against the specification and the definition of its algebra."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashdip.kernels import reference
from flashdip.kernels.fused import join, join_backward
from flashdip.kernels.fused.geometry import FOLDED
from flashdip.kernels.fused.launch import Launch, Map, Norm, Tile
from flashdip.kernels.opset import EPS, Activation, Up
from tests.kernels.fused.judge import Scratch, judge, poisoned, round_through

TILE = Tile(rows=2, columns=4, outputs=16, inputs=16, warps=2, stages=1)
PATCHES = Tile(rows=4, columns=16, outputs=16, inputs=16, warps=1, stages=1)  # of 4 x 2 pixels
NARROW = Tile(rows=16, columns=2, outputs=16, inputs=16, warps=1, stages=1)  # 2 x 2


class Case(NamedTuple):
    """Sizes of a join: fits, the deep map's sides, channels of deep, skip and result."""

    fits: int
    height: int
    width: int
    deep: int
    skip: int
    outputs: int
    up: Up = "bilinear"
    dtype: torch.dtype = torch.float16
    act: Activation = "LeakyReLU"
    wide: bool = False
    tile: Tile = TILE


CASES = [
    Case(1, 2, 2, 4, 4, 5, up="nearest"),
    Case(1, 2, 3, 5, 4, 4),
    Case(2, 3, 5, 20, 5, 6, up="nearest", dtype=torch.float32, act="Swish"),
    Case(1, 7, 11, 20, 4, 5, dtype=torch.float32),
    Case(2, 6, 17, 20, 4, 5, dtype=torch.float32, tile=PATCHES),
    Case(1, 17, 2, 4, 5, 6, tile=NARROW),
    Case(1, 3, 5, 16, 0, 20, act="ELU", tile=PATCHES),
    Case(1, 5, 3, 20, 20, 5, up="nearest", wide=True),
    Case(1, 5, 7, 16, 13, 4, dtype=torch.bfloat16, tile=PATCHES),
    Case(1, 2, 2, 20, 17, 4, wide=True, act="none"),
    Case(1, 2, 3, 256, 4, 5),
]


class Half:
    """One of the joined maps: a convolution's result [F, H, W, C] and the norm behind it."""

    def __init__(self, case: Case, channels: int, scale: int, draw: Callable[..., Tensor]) -> None:
        shape = (case.fits, scale * case.height, scale * case.width, channels)
        self.act: Activation = case.act
        self.y = (2 * draw(*shape) + 3 * draw(case.fits, 1, 1, channels)).to(case.dtype)
        # Columns of larger tensors, as the flat parameters are.
        self.norm = Norm(*(draw(case.fits, channels + 3)[:, 2:-1] for _ in range(4)))
        # No channel becomes nearly constant behind its activation.
        self.norm.gamma.copy_(self.norm.gamma.sign() * (0.5 + self.norm.gamma.abs()))
        self.norm.beta.mul_(0.3)
        self.join_gamma = draw(case.fits, channels)
        y = self.y.double()
        mean, inverse = y.mean((1, 2)), (y.var((1, 2), correction=0) + EPS).rsqrt()
        scale_row = self.norm.gamma * inverse
        rows = scale_row, self.norm.beta - mean * scale_row, mean, inverse
        self.map = Map(self.y, torch.stack(rows, 1).float(), case.act)

    def value(self, dtype: torch.dtype, *leaves: Tensor) -> Tensor:
        """Return the value [F, C, H, W] of y, gamma and beta, computed in `dtype`."""
        y, gamma, beta = leaves or (self.y, self.norm.gamma, self.norm.beta)
        x = reference._norm(y.to(dtype).permute(0, 3, 1, 2), gamma.to(dtype), beta.to(dtype))
        if dtype != torch.float64:
            x = round_through(x, self.y.dtype)
        x = reference.activate(x, self.act)
        return x if dtype == torch.float64 else round_through(x, self.y.dtype)

    def stored(self) -> Tensor:
        """Return the value [F, C, H, W] as the kernels see it, in the storage type."""
        assert self.map.affine is not None
        scale, shift = self.map.affine[:, :2, None, None].unbind(1)
        value = reference.activate(self.y.float() * scale + shift, self.act)
        return value.permute(0, 3, 1, 2).to(self.y.dtype)

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        tensors = self.y, self.norm.gamma, self.norm.beta
        return [t.to(dtype).requires_grad_() for t in tensors]


class Setting:
    """Everything that a join works on, drawn at random, and where it writes."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(sum(case[:6]))

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.case, self.draw = case, draw
        self.deep = Half(case, case.deep, 1, draw)
        self.skip = Half(case, case.skip, 2, draw) if case.skip else None
        halves = [half for half in (self.skip, self.deep) if half is not None]
        self.gamma = torch.cat([half.join_gamma for half in halves], 1)
        self.channels = case.skip + case.deep
        # Rows of fits are further apart than they are long.
        weights = draw(case.fits, 9 * self.channels * case.outputs + 7)[:, 4:-3]
        self.master = weights.unflatten(1, (3, 3, self.channels, case.outputs))
        self.scratch = Scratch()

    def run(self, launch: Launch) -> None:
        launch()
        self.scratch.check()

    def skip_rows(self) -> int:
        rows = 9 * self.case.skip
        return rows if self.case.wide else -(-rows // 16) * 16

    def forward(self) -> tuple[Tensor, ...]:
        """Run the kernel; return value, both affines, folded and skip weights."""
        fits, height, width, deep, skip, outputs, up, dtype = self.case[:8]
        value = poisoned((fits, height, width, deep), dtype)
        affines = [poisoned((fits, 3, channels), torch.float32) for channels in (deep, skip)]
        folded = poisoned((fits, 2, 2, 2, 2, deep, outputs), dtype)
        skip_weight = poisoned((fits, self.skip_rows(), outputs), dtype)
        self.run(
            join.forward(
                "join forward",
                self.deep.map,
                self.skip.map if self.skip else None,
                self.gamma,
                self.master,
                up,
                value,
                affines[0],
                affines[1] if self.skip else None,
                folded,
                skip_weight if self.skip else None,
                self.case.tile,
                self.scratch,
            )
        )
        return value, *affines, folded, skip_weight


def check(actual: Tensor, exact: Tensor, rounded: Tensor, stored: torch.dtype) -> None:
    """Judge; float32 by a bound, for sums of that little rounding differ by their order alone."""
    if stored == torch.float32:
        assert (actual - exact).norm() <= 1e-5 * exact.norm()
    else:
        judge(actual, exact, rounded, stored)


def affine(value: Tensor, gamma: Tensor, up: Up | None) -> Tensor:
    """Return mean, inverse and s, [F, 3, C], of a value [F, C, H, W], enlarged first."""
    if up is not None:
        value = F.interpolate(value, scale_factor=2, mode=up)
    inverse = (value.var((2, 3), correction=0) + EPS).rsqrt()
    return torch.stack([value.mean((2, 3)), inverse, gamma.to(value) * inverse], 1)


def fold(weight: Tensor) -> Tensor:
    """Return the sums of taps of weights [F, 3, 3, C, O]."""
    select = torch.tensor(
        [[[float(t in taps) for t in range(3)] for taps in group] for group in FOLDED]
    ).to(weight)
    return torch.einsum("asi,btj,fijco->fabstco", select, select, weight)


def results(setting: Setting, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return what `Setting.forward` returns behind the value, computed in `dtype`.

    Statistics are those of the values as they are stored, and the weights are folded with them.
    """
    case = setting.case
    master = setting.master.to(dtype)
    deep = affine(setting.deep.stored().to(dtype), setting.deep.join_gamma, case.up)
    folded = fold(master[..., case.skip :, :] * deep[:, 2, None, None, :, None])
    skip, skip_weight = torch.zeros(case.fits, 3, 0), torch.zeros(case.fits, 0, case.outputs)
    if setting.skip:
        skip = affine(setting.skip.stored().to(dtype), setting.skip.join_gamma, None)
        scaled = master[..., : case.skip, :] * skip[:, 2, None, None, :, None]
        skip_weight = scaled.flatten(1, 3)
    if dtype != torch.float64:
        folded, skip_weight = folded.to(case.dtype), skip_weight.to(case.dtype)
    return deep, skip, folded, skip_weight


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case) -> None:
    setting = Setting(case)
    value, *actual = setting.forward()
    wide, narrow = (
        setting.deep.value(dtype).permute(0, 2, 3, 1) for dtype in (torch.float64, torch.float32)
    )
    check(value, wide, narrow, case.dtype)
    assert not actual[3][:, 9 * case.skip :].any()  # zero, as the product with them has to be
    actual[3] = actual[3][:, : 9 * case.skip]
    exact, rounded = (results(setting, dtype) for dtype in (torch.float64, torch.float32))
    for of in zip(actual[:2], exact[:2], rounded[:2], strict=True):
        for result, wide, narrow in zip(*(t.unbind(1) for t in of), strict=True):
            check(result, wide, narrow, torch.float32)
    for result, wide, narrow in zip(actual[2:], exact[2:], rounded[2:], strict=True):
        if result.numel():
            check(result, wide, narrow, case.dtype)


class Pushed(NamedTuple):
    """What the convolution's backward pass would hand over, drawn at random."""

    g: Tensor
    ds: Tensor
    dfolded: Tensor
    skip_g: Tensor
    skip_ds: Tensor
    dskip: Tensor


def push(setting: Setting) -> Pushed:
    case, draw = setting.case, setting.draw
    fits, height, width, deep, skip, outputs = case[:6]
    taps = () if case.wide else (9,)
    pixels = height * width
    return Pushed(
        draw(fits, height, width, deep).to(case.dtype),
        pixels * draw(fits, deep),
        draw(fits, 9, 2, 2, 2, 2, deep, outputs),
        draw(fits, 2 * height, 2 * width, *taps, skip).to(case.dtype),
        4 * pixels * draw(fits, skip),
        draw(fits, 35, setting.skip_rows(), outputs),
    )


def run_backward(
    setting: Setting, pushed: Pushed, affines: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """Run the kernel; return gradients of the weights and, for each half, all that is written."""
    case = setting.case
    out = {"dweight": poisoned(tuple(setting.master.shape), torch.float32)}
    given: dict[str, dict[str, Any]] = {}
    g = pushed.g.clone()
    for name, half in {"deep": setting.deep, "skip": setting.skip}.items():
        if half is None:
            given[name] = dict.fromkeys([f"{name}_{key}" for key in ("norm", "pull", "du")])
            continue
        fits, *_, channels = half.y.shape
        # The deep map's gradient is completed in place.
        du = g if name == "deep" else poisoned(tuple(half.y.shape), case.dtype)
        out[f"{name} du"] = du
        out[f"{name} pull"] = pull = poisoned((fits, 3, channels), torch.float32)
        half.norm.dgamma.fill_(float("nan"))
        half.norm.dbeta.fill_(float("nan"))
        out[f"{name} dgamma"], out[f"{name} dbeta"] = half.norm.dgamma, half.norm.dbeta
        given[name] = {f"{name}_norm": half.norm, f"{name}_pull": pull, f"{name}_du": du}
    skip = setting.skip is not None
    setting.run(
        join_backward.backward(
            "join backward",
            g,
            setting.deep.map,
            **given["deep"],
            deep_affine=affines[0],
            deep_ds=pushed.ds,
            dfolded=pushed.dfolded,
            skip=setting.skip.map if setting.skip else None,
            **given["skip"],
            skip_affine=affines[1] if skip else None,
            skip_ds=pushed.skip_ds if skip else None,
            skip_g=pushed.skip_g if skip else None,
            dskip=pushed.dskip if skip else None,
            up=case.up,
            dweight=out["dweight"],
            tile=case.tile,
            memory=setting.scratch,
        )
    )
    for name, half in {"deep": setting.deep, "skip": setting.skip}.items():
        if half is not None:  # behind the normalisation, where the next kernel wants it
            a, b, c = out.pop(f"{name} pull").double()[:, :, None, None].unbind(1)
            out[f"{name} dy"] = a * out.pop(f"{name} du") + b * half.y + c
    return out


def pushed_back(setting: Setting, pushed: Pushed, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what `run_backward` returns, by differentiation of what is defined here.

    The maps are pushed by g and by what ds does to the statistics, the folded weights by dfolded,
    and the skip's by dskip.
    """
    case = setting.case
    master = setting.master.to(dtype).requires_grad_()
    parts = []
    gradients: dict[str, list[Tensor]] = {}
    for name, half in {"deep": setting.deep, "skip": setting.skip}.items():
        if half is None:
            continue
        leaves = half.leaves(dtype)
        value = half.value(dtype, *leaves)
        deep = name == "deep"
        s = affine(value, half.join_gamma, case.up if deep else None)[:, 2]
        ds = pushed.ds if deep else pushed.skip_ds
        g = (pushed.g if deep else pushed.skip_g).to(dtype)
        total = (s * ds).sum()
        if g.ndim == 4:
            total = total + (value * g.permute(0, 3, 1, 2)).sum()
        else:
            seen = F.unfold(F.pad(value, (1,) * 4, mode="reflect"), 3)  # [F, C 9, H W]
            taps = g.permute(0, 4, 3, 1, 2).reshape(seen.shape)
            total = total + (seen * taps).sum()
        own = slice(case.skip, None) if deep else slice(0, case.skip)
        weight = master[..., own, :] * s.detach()[:, None, None, :, None]
        if deep:
            total = total + (fold(weight) * pushed.dfolded.to(dtype).sum(1)).sum()
        else:
            rows = pushed.dskip[:, :, : 9 * case.skip].to(dtype).sum(1)
            total = total + (weight.flatten(1, 3) * rows).sum()
        parts.append(total)
        gradients[name] = leaves
    torch.stack(parts).sum().backward()
    assert master.grad is not None
    out = {"dweight": master.grad}
    for name, leaves in gradients.items():
        for key, leaf in zip(("dy", "dgamma", "dbeta"), leaves, strict=True):
            assert leaf.grad is not None
            out[f"{name} {key}"] = leaf.grad
    return out


def affines(setting: Setting) -> tuple[Tensor, Tensor]:
    """Return the joined maps' affines, from float64."""
    deep, skip = results(setting, torch.float64)[:2]
    return deep.float().contiguous(), skip.float().contiguous()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case: Case) -> None:
    setting = Setting(case)
    pushed = push(setting)
    actual = run_backward(setting, pushed, affines(setting))
    exact, rounded = (
        pushed_back(setting, pushed, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert actual.keys() == exact.keys()
    for name in exact:
        check(actual[name], exact[name], rounded[name], case.dtype)


@pytest.mark.parametrize("up", ["nearest", "bilinear"])
def test_specification(up: Up) -> None:
    """With a plain convolution in between, the kernels agree with `reference.join_conv`."""
    case = Case(2, 3, 4, 5, 4, 6, up=up, dtype=torch.float32, wide=True)
    setting = Setting(case)
    assert setting.skip is not None
    halves = setting.skip, setting.deep
    gamma, beta = torch.ones(2, case.fits, case.outputs, dtype=torch.float64).unbind()
    weight = setting.master.permute(0, 4, 3, 1, 2)  # [F, O, I, 3, 3]
    push = setting.draw(case.fits, case.outputs, 2 * case.height, 2 * case.width).double()

    def specified() -> list[Tensor]:
        leaves = [half.leaves(torch.float64) for half in halves]
        last = [t.double().requires_grad_() for t in (setting.gamma, weight)]
        shallow, deep = (
            half.value(torch.float64, *own) for half, own in zip(halves, leaves, strict=True)
        )
        out = reference.join_conv(
            shallow, deep, last[0], 0.7 * gamma[:, :1], last[1], None, gamma, beta, up=up
        )
        (out * push).sum().backward()
        return [t.grad for t in (*leaves[0], *leaves[1], *last) if t.grad is not None]

    _, deep, skip, *_ = setting.forward()
    s = torch.cat([skip[:, 2], deep[:, 2]], 1).double()
    scaled = (weight * s[:, None, :, None, None]).requires_grad_()
    maps = [half.stored().double().requires_grad_() for half in halves]
    joined = torch.cat([maps[0], F.interpolate(maps[1], scale_factor=2, mode=up)], 1)
    out = reference.conv_norm_act(joined, scaled, None, gamma, beta)
    (out * push).sum().backward()
    g_skip, g_deep, dscaled = (t.grad for t in (*maps, scaled))
    assert g_skip is not None and g_deep is not None and dscaled is not None
    ds = (dscaled * weight).sum((1, 3, 4)).float()
    rows = dscaled.permute(0, 3, 4, 2, 1).float()
    # Any sums over groups and slots that add up to the taps will do.
    split = torch.zeros(2, 2, 3)
    split[0, 0, 0] = split[1, 0, 1] = split[1, 1, 2] = 1
    split[0, 0, 1] = -1
    dfolded = torch.einsum("asi,btj,fijco->fabstco", split, split, rows[..., case.skip :, :])
    pushed = Pushed(
        g_deep.permute(0, 2, 3, 1).float().contiguous(),
        ds[:, case.skip :].contiguous(),
        dfolded[:, None].contiguous(),
        g_skip.permute(0, 2, 3, 1).float().contiguous(),
        ds[:, : case.skip].contiguous(),
        rows[..., : case.skip, :].flatten(1, 3)[:, None].contiguous(),
    )
    got = run_backward(setting, pushed, (deep, skip))
    inverse = torch.cat([skip[:, 1], deep[:, 1]], 1)
    actual = [
        got[f"{name} {key}"] for name in ("skip", "deep") for key in ("dy", "dgamma", "dbeta")
    ]
    actual += [ds * inverse, got["dweight"].permute(0, 4, 3, 1, 2)]
    for result, exact in zip(actual, specified(), strict=True):
        check(result, exact, exact, torch.float32)


def test_scale_is_not_a_constant() -> None:
    """What the scale's dependence on the map adds to the gradient is no small part of it."""
    setting = Setting(Case(1, 3, 4, 5, 0, 4, dtype=torch.float32))
    pushed, fixed = push(setting), affines(setting)
    whole = run_backward(setting, pushed, fixed)["deep dy"]
    part = run_backward(setting, pushed._replace(ds=torch.zeros_like(pushed.ds)), fixed)["deep dy"]
    assert (whole - part).norm() > 0.05 * whole.norm()


def test_order_of_programs(request: pytest.FixtureRequest) -> None:
    def run() -> list[Tensor]:
        setting = Setting(Case(1, 3, 7, 20, 4, 5))
        pushed = push(setting)
        forward = setting.forward()
        return [*forward, *run_backward(setting, pushed, affines(setting)).values()]

    plain = run()
    request.getfixturevalue("reversed_order")
    for one, other in zip(plain, run(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("up", "tile"), [("nearest", TILE), ("bilinear", TILE), ("bilinear", PATCHES)]
)
def test_large_mean(up: Up, tile: Tile) -> None:
    """The variance does not cancel where the mean is a thousand times the deviation.

    With small tiles there are so many that their statistics are put together in groups first.
    """
    setting = Setting(Case(1, 12, 24, 16, 0, 4, up, torch.float32, "none", tile=tile))
    assert setting.deep.map.affine is not None
    setting.deep.map.affine[:, 1] += 1000
    actual, exact = setting.forward()[1], results(setting, torch.float64)[0]
    torch.testing.assert_close(actual[:, 1], exact[:, 1].float(), rtol=1e-4, atol=0)
