"""Normalisation in pieces, against torch's: statistics, sums, and who is the last to arrive."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from flashdip.kernels.fused import norm
from flashdip.kernels.fused.norm import finish_forward, finish_sums, scratch_shapes
from flashdip.kernels.opset import EPS
from tests.kernels.fused.judge import poisoned

PIXELS, BLOCK = tl.constexpr(4), tl.constexpr(16)


@triton.jit
def tiles_of(
    y_ptr, du_ptr, parts_ptr, counters_ptr, gamma_ptr, beta_ptr, affine_ptr, pull_ptr, dgamma_ptr,
    dbeta_ptr, pixels, parameters, C: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Hand a tile of pixels and a block of channels to the functions under test."""
    tile, fit = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    pixel = tile * PIXELS + tl.arange(0, PIXELS)
    valid = pixel < pixels
    at = (fit * pixels + pixel)[:, None] * C + c[None, :]
    mask = valid[:, None] & (c < C)[None, :]
    y = tl.load(y_ptr + at, mask, other=0.0)
    tiles, fits = tl.num_programs(0), tl.num_programs(1)
    if BACKWARD:
        du = tl.load(du_ptr + at, mask, other=0.0)
        of_affine = affine_ptr + fit * 4 * C + c
        mean = tl.load(of_affine + 2 * C, c < C, other=0.0)
        inverse = tl.load(of_affine + 3 * C, c < C, other=0.0)
        along = du * (y - mean[None, :]) * inverse[None, :]  # du is 0 where there is no pixel
        finish_sums(
            tl.sum(du, 0), tl.sum(along, 0), c, tile, tiles, fit, fits, pixels, parts_ptr,
            counters_ptr, affine_ptr, pull_ptr, dgamma_ptr, dbeta_ptr, parameters, C,
        )  # fmt: skip
    else:
        finish_forward(
            y, valid, c, tile, tiles, fit, fits, parts_ptr, counters_ptr, gamma_ptr, beta_ptr,
            affine_ptr, parameters, C,
        )  # fmt: skip


def run(y: Tensor, du: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
    """Return affine, pull, dgamma and dbeta of maps [F, pixels, C]."""
    fits, pixels, channels = y.shape
    tiles = triton.cdiv(pixels, PIXELS.value)
    parts, counters = scratch_shapes(fits, tiles, channels, BLOCK.value)
    scratch = poisoned((parts,), torch.float32), torch.zeros(counters, dtype=torch.int32)
    affine, pull = (poisoned((fits, rows, channels), torch.float32) for rows in (4, 3))
    dgamma, dbeta = (poisoned((fits, channels), torch.float32) for _ in range(2))
    for backward in (False, True):
        tiles_of[(tiles, fits, triton.cdiv(channels, BLOCK.value))](
            y, du, *scratch, gamma, beta, affine, pull, dgamma, dbeta, pixels, channels, channels,
            backward,
        )  # fmt: skip
        assert not scratch[1].any()  # the counters are ready for the next launch
    return affine, pull, dgamma, dbeta


def draw(fits: int, pixels: int, channels: int) -> list[Tensor]:
    """Maps whose mean is 25 times their deviation, and a norm's parameters."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(fits, pixels, channels)] * 2 + [(fits, channels)] * 2
    y, *others = [torch.randn(shape, generator=generator) for shape in shapes]
    return [2 * y + 50, *others]


@pytest.mark.parametrize(
    ("fits", "pixels", "channels", "group"),
    [(2, 37, 20, 32), (1, 300, 4, 32), (1, 4, 3, 32), (2, 150, 4, 2)],
)
def test_a_norm(
    fits: int, pixels: int, channels: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tile or many, groups of tiles, many groups, a block that is not full; far from mean 0."""
    monkeypatch.setattr(norm, "GROUP", tl.constexpr(group))
    y, du, gamma, beta = draw(fits, pixels, channels)
    affine, pull, dgamma, dbeta = run(y, du, gamma, beta)
    leaves = [t.double().requires_grad_() for t in (y, gamma, beta)]
    mean = leaves[0].mean(1, keepdim=True)
    variance = leaves[0].var(1, correction=0, keepdim=True)
    inverse = (variance + EPS) ** -0.5
    u = (leaves[0] - mean) * inverse * leaves[1][:, None] + leaves[2][:, None]
    u.backward(du.double())

    def close(actual: Tensor, expected: Tensor | None, tolerance: float) -> None:
        assert expected is not None
        expected = expected.detach()
        size = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=tolerance * size)

    close(affine[:, 2], mean[:, 0], 1e-6)
    close(affine[:, 3], inverse[:, 0], 1e-6)
    close(y * affine[:, :1] + affine[:, 1:2], u, 1e-5)
    close(pull[:, :1] * du + pull[:, 1:2] * y + pull[:, 2:], leaves[0].grad, 1e-5)
    close(dgamma, leaves[1].grad, 1e-5)
    close(dbeta, leaves[2].grad, 1e-5)


def test_the_order_does_not_matter(request: pytest.FixtureRequest) -> None:
    """Programs from the first to the last, and from the last to the first."""
    arguments = draw(2, 300, 20)
    forwards = run(*arguments)
    request.getfixturevalue("reversed_order")
    for one, other in zip(forwards, run(*arguments), strict=True):
        assert torch.equal(one, other)
