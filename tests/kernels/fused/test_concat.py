"""The join by itself, forward and backward, in Triton's interpreter, against float64 autograd."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from flashdip.kernels.fused import concat, concat_backward
from flashdip.kernels.fused.concat_backward import Target
from flashdip.kernels.fused.launch import Gradient, Launch, Norm, Tile
from flashdip.kernels.opset import EPS
from tests.kernels.fused.judge import Scratch, judge, poisoned, round_through
from tests.kernels.fused.test_join import Case, Half, check

TILE = Tile(rows=2, columns=4, outputs=16, warps=2, stages=1)
half, brain, single = torch.float16, torch.bfloat16, torch.float32

# Blocks of 16 joined channels have some of both maps, of one, of each by itself. Maps are of one
# row, of less than a tile, of so many that some see no border.
CASES = [
    Case(1, 1, 3, 20, 0, 0),
    Case(1, 2, 2, 4, 4, 0, up="nearest"),
    Case(1, 2, 3, 5, 4, 0, dtype=brain),
    Case(2, 3, 5, 20, 5, 0, up="nearest", dtype=single, act="Swish"),
    Case(2, 7, 5, 13, 4, 0, dtype=single, act="Swish"),
    Case(1, 5, 11, 16, 0, 0, act="ELU"),
    Case(1, 3, 2, 17, 20, 0),
    Case(1, 2, 5, 16, 16, 0, up="nearest", act="none"),
]


class Setting:
    """The maps of a case, and the gradient of what they are joined to, drawn at random."""

    def __init__(self, case: Case) -> None:
        generator = torch.Generator().manual_seed(sum(case[:5]))

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.case = case
        self.deep = Half(case, case.deep, 1, draw)
        self.skip = Half(case, case.skip, 2, draw) if case.skip else None
        self.halves = {"deep": self.deep} | ({"skip": self.skip} if self.skip else {})
        self.shape = (case.fits, 2 * case.height, 2 * case.width, case.skip + case.deep)
        self.norm = Norm(*(draw(case.fits, self.shape[3] + 3)[:, 2:-1] for _ in range(4)))
        self.du, self.y = (draw(*self.shape).to(case.dtype) for _ in range(2))
        self.pull = draw(case.fits, 3, self.shape[3])
        self.scratch = Scratch()

    def run(self, launch: Launch) -> None:
        launch()
        self.scratch.check()

    def forward(self) -> tuple[Tensor, Tensor]:
        """Run the kernel; return the joined map and its affine."""
        y = poisoned(self.shape, self.case.dtype)
        affine = poisoned((self.shape[0], 4, self.shape[3]), single)
        skip = self.skip.map if self.skip else None
        self.run(
            concat.forward(
                "", self.deep.map, skip, self.case.up, y, self.norm, affine, TILE, self.scratch
            )
        )
        return y, affine

    def joined(self, dtype: torch.dtype, leaves: dict[str, list[Tensor]]) -> Tensor:
        """Return the joined map [F, C, H, W], computed in `dtype`."""
        values = {name: of.value(dtype, *leaves.get(name, [])) for name, of in self.halves.items()}
        values["deep"] = F.interpolate(values["deep"], scale_factor=2, mode=self.case.up)
        joined = torch.cat([values[name] for name in ("skip", "deep") if name in values], 1)
        return joined if dtype == torch.float64 else round_through(joined, self.case.dtype)

    def backward(self) -> dict[str, Tensor]:
        """Run the kernel; return all that is written, gradients behind the norms."""
        case, out, targets = self.case, dict[str, Tensor](), dict[str, Target]()
        for name, of in self.halves.items():
            du = poisoned(tuple(of.y.shape), case.dtype)
            pull = poisoned((case.fits, 3, of.y.shape[3]), single)
            of.norm.dgamma.fill_(torch.nan)
            of.norm.dbeta.fill_(torch.nan)
            targets[name] = Target(of.map, of.norm, pull, du)
        self.run(self.launch(**targets))
        for name, target in targets.items():
            assert target.norm is not None and target.pull is not None and target.du is not None
            a, b, c = target.pull.double()[:, :, None, None].unbind(1)
            out[f"{name} dy"] = a * target.du + b * self.halves[name].y + c
            out[f"{name} dgamma"], out[f"{name} dbeta"] = target.norm.dgamma, target.norm.dbeta
        return out

    def launch(self, deep: Target, skip: Target | None = None) -> Launch:
        dy = Gradient(self.du, self.y, self.pull)
        return concat_backward.backward("", dy, deep, skip, self.case.up, TILE, self.scratch)

    def dy(self, dtype: torch.dtype) -> Tensor:
        """Return the gradient of the joined map, [F, C, H, W]."""
        a, b, c = self.pull.to(dtype)[:, :, None, None].unbind(1)
        dy = (a * self.du + b * self.y + c).permute(0, 3, 1, 2)
        return dy if dtype == torch.float64 else dy.to(self.case.dtype).to(dtype)

    def pushed_back(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return what `backward` returns, by autograd."""
        leaves = {name: of.leaves(dtype) for name, of in self.halves.items()}
        self.joined(dtype, leaves).backward(self.dy(dtype))
        return {
            f"{name} {key}": leaf.grad
            for name, own in leaves.items()
            for key, leaf in zip(("dy", "dgamma", "dbeta"), own, strict=True)
            if leaf.grad is not None
        }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward(case: Case) -> None:
    setting = Setting(case)
    y, affine = setting.forward()
    exact, rounded = (
        setting.joined(dtype, {}).permute(0, 2, 3, 1) for dtype in (torch.float64, single)
    )
    judge(y, exact, rounded, case.dtype)
    # The affine is that of the map as it is stored.
    variance, mean = torch.var_mean(y.double(), (1, 2), correction=0)
    inverse = (variance + EPS).rsqrt()
    scale = setting.norm.gamma * inverse
    for row, of in zip(
        affine.unbind(1), (scale, setting.norm.beta - mean * scale, mean, inverse), strict=True
    ):
        torch.testing.assert_close(row.double(), of, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward(case: Case) -> None:
    setting = Setting(case)
    found = setting.backward()
    exact, rounded = (setting.pushed_back(dtype) for dtype in (torch.float64, single))
    assert found.keys() == exact.keys()
    for name, value in found.items():
        check(value, exact[name], rounded[name], case.dtype)


def test_others_have_yet_to_add() -> None:
    """Without a norm the gradient is that of the value; without a place for it, there is none."""
    setting = Setting(Case(1, 2, 3, 5, 4, 0, dtype=single))
    assert setting.skip is not None
    out = poisoned(tuple(setting.deep.y.shape), single)
    unwanted = Target(setting.skip.map, None, None, None)
    setting.run(setting.launch(Target(setting.deep.map, None, None, out), unwanted))
    value = setting.deep.value(torch.float64).requires_grad_()
    F.interpolate(value, scale_factor=2, mode="bilinear").backward(
        setting.dy(torch.float64)[:, setting.case.skip :]
    )
    assert value.grad is not None
    torch.testing.assert_close(out.permute(0, 3, 1, 2).double(), value.grad, rtol=1e-5, atol=1e-5)


def test_large_mean() -> None:
    """The variance does not cancel where the mean is a thousand times the deviation.

    There are so many tiles that their statistics are put together in groups first.
    """
    setting = Setting(Case(1, 12, 24, 16, 0, 0, dtype=single, act="none"))
    assert setting.deep.map.affine is not None
    setting.deep.map.affine[:, 1] += 1000
    y, affine = setting.forward()
    inverse = (y.double().var((1, 2), correction=0) + EPS).rsqrt()
    torch.testing.assert_close(affine[:, 3].double(), inverse, rtol=1e-4, atol=0)


@pytest.mark.parametrize("up", ["nearest", "bilinear"])
def test_order_of_programs(up: Any, request: pytest.FixtureRequest) -> None:
    """Where the first program arrives last, the bits are the same."""

    def run() -> list[Tensor]:
        setting = Setting(Case(1, 3, 5, 20, 4, 0, up=up))
        return [*setting.forward(), *setting.backward().values()]

    plain = run()
    request.getfixturevalue("reversed_order")
    for one, other in zip(plain, run(), strict=True):
        assert torch.equal(one, other)
