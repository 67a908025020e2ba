"""Gradients of weights as shifted matrix products."""

import pytest
import torch
from torch import Tensor

from flashdip.kernels import fitwise, shifted
from tests.numerics import assert_as_exact, convolved, differentiated


def tensors(
    fits: int, taps: tuple[int, int], stride: int, sides: tuple[int, int], channels: tuple[int, int]
) -> list[Tensor]:
    """Map, weights and gradient of the result, in float64."""
    generator = torch.Generator().manual_seed(2)
    outputs, inputs = channels
    result = [(side - tap) // stride + 1 for side, tap in zip(sides, taps, strict=True)]
    shapes = (fits, inputs, *sides), (fits, outputs, inputs, *taps), (fits, outputs, *result)
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("sides", [(13, 18), (18, 7), (5, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("taps", [(3, 3), (2, 2), (5, 5), (1, 3), (3, 1)], ids=str)
def test_gradients(
    taps: tuple[int, int], stride: int, sides: tuple[int, int], layout: torch.memory_format
) -> None:
    x, weight, dy = tensors(1, taps, stride, sides, (7, 3))
    right = convolved([x, weight, dy], stride)
    x, dy = (t.contiguous(memory_format=layout) for t in (x, dy))
    found = shifted.weight_gradient(dy, x, taps, stride)
    torch.testing.assert_close(found[None], right[2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fits", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch, stride: int, fits: int) -> None:
    """By wide convolutions in float32 without AVX-512; there it is as exact as torch's."""
    exact = tensors(fits, (3, 3), stride, (70, 59), (128, 128))
    low = [t.float() for t in exact]
    taken = 0
    own = shifted.weight_gradient

    def counted(dy: Tensor, x: Tensor, taps: tuple[int, int], stride: int) -> Tensor:
        nonlocal taken
        taken += 1
        return own(dy, x, taps, stride)

    monkeypatch.setattr(shifted, "weight_gradient", counted)
    for capability, expected in (("AVX2", fits), ("AVX512", 0), ("DEFAULT", 0)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        leaves = [t.clone().requires_grad_() for t in low[:2]]
        taken, right = 0, convolved([t.double() for t in low], stride)
        found = differentiated(fitwise.conv(leaves[0], leaves[1], stride), leaves, low[2])
        assert taken == expected
        assert_as_exact(found, convolved(low, stride), right)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for other in (
        (low[0][:, :, :3], low[1]),  # too little work
        (low[0], low[1][:, :4]),
        (low[0], low[1][..., :1, :1]),  # a product already
        (low[0].to(torch.bfloat16), low[1]),
        (exact[0], exact[1]),
    ):
        assert not shifted.pays(*other, stride)


def test_a_map_without_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's input needs none."""
    monkeypatch.setattr(shifted, "pays", lambda *of: True)
    x, weight, dy = tensors(1, (3, 3), 2, (9, 9), (4, 2))
    (gradient,) = torch.autograd.grad(fitwise.conv(x, weight.requires_grad_(), 2), weight, dy)
    torch.testing.assert_close(gradient, convolved([x, weight, dy], 2)[2])
