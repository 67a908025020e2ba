"""Op sets have the functions of the protocol; `native` computes what `reference` specifies."""

import inspect
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashdip.kernels import native, noise, reference
from flashdip.kernels.opset import OpSet

Call = Callable[[types.ModuleType, list[Tensor]], Tensor]
OPERATIONS = ("perturb", "conv_norm_act", "join_conv", "head", "adam")


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Random float64 tensors, about 1 in size."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def block(fits: int, inputs: int, outputs: int, size: int) -> list[tuple[int, ...]]:
    """Shapes of weight, bias, gamma, beta."""
    return [(fits, outputs, inputs, size, size), *[(fits, outputs)] * 3]


def assert_same(call: Call, arguments: list[Tensor]) -> None:
    """Assert that values and all gradients of `native` are those of `reference`, in float64.

    A bias that a norm follows has a gradient of exactly zero; `reference` shows its rounding noise.
    """
    results = []
    for ops in (reference, native):
        leaves = [a.clone().requires_grad_() for a in arguments]
        y = call(ops, leaves)
        slope = torch.cos(0.7 * torch.arange(y.numel(), dtype=torch.float64)).view_as(y)
        (y * slope).sum().backward()
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        results.append([y.detach(), *grads])
    for expected, actual in zip(*results, strict=True):
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * scale)


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
def test_signatures_are_the_protocols(ops: types.ModuleType) -> None:
    """A network written against one op set runs on every other."""
    for name in OPERATIONS:
        specified = list(inspect.signature(getattr(OpSet, name)).parameters.values())[1:]
        found = list(inspect.signature(getattr(ops, name)).parameters.values())
        assert [(p.name, p.kind, p.default) for p in found] == [
            (p.name, p.kind, p.default) for p in specified
        ]


@pytest.mark.parametrize("pad", ["reflection", "zero"])
@pytest.mark.parametrize(
    ("fits", "inputs", "outputs", "size", "height", "width", "stride"),
    [(1, 3, 5, 3, 7, 11, 1), (2, 4, 3, 3, 8, 5, 2), (1, 2, 2, 1, 2, 3, 1), (1, 3, 4, 5, 9, 6, 2)],
)
def test_conv_norm_act(
    pad: str, fits: int, inputs: int, outputs: int, size: int, height: int, width: int, stride: int
) -> None:
    """Odd and minimal sizes, several fits, both strides."""
    arguments = tensors((fits, inputs, height, width), *block(fits, inputs, outputs, size))
    assert_same(lambda ops, t: ops.conv_norm_act(*t, stride=stride, pad=pad), arguments)


@pytest.mark.parametrize("act", ["LeakyReLU", "Swish", "ELU", "none"])
@pytest.mark.parametrize("down", ["stride", "avg", "max", "lanczos2", "lanczos3"])
def test_activations_and_downsampling(act: str, down: str) -> None:
    """Each way to halve, each activation."""
    arguments = tensors((1, 3, 12, 8), *block(1, 3, 4, 3))
    assert_same(lambda ops, t: ops.conv_norm_act(*t, stride=2, down=down, act=act), arguments)


@pytest.mark.parametrize("pad", ["reflection", "zero"])
@pytest.mark.parametrize("up", ["nearest", "bilinear"])
@pytest.mark.parametrize("height", range(2, 10))
def test_join_conv(pad: str, up: str, height: int) -> None:
    """Even joins, joins cropped to an odd side, two fits."""
    fits, width, skip, deep = 2, 11 - height, 2, 3
    inner = ((height + 1) // 2, (width + 1) // 2)
    shapes = [(fits, skip, height, width), (fits, deep, *inner), *[(fits, skip + deep)] * 2]
    arguments = tensors(*shapes, *block(fits, skip + deep, 4, 3))
    assert_same(lambda ops, t: ops.join_conv(*t, up=up, pad=pad), arguments)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("up", ["nearest", "bilinear"])
def test_join_conv_without_a_skip(up: str, size: int) -> None:
    """Nothing is cropped then; larger kernels take the general path."""
    arguments = tensors((1, 3, 4, 3), (1, 3), (1, 3), *block(1, 3, 4, size))
    assert_same(lambda ops, t: ops.join_conv(None, *t, up=up), arguments)


@pytest.mark.parametrize("sigmoid", [True, False])
def test_head(sigmoid: bool) -> None:
    """The image, with its bias."""
    arguments = tensors((2, 5, 4, 7), (2, 3, 5, 1, 1), (2, 3))
    assert_same(lambda ops, t: ops.head(*t, sigmoid=sigmoid), arguments)


@pytest.mark.parametrize("start", [0, noise.TABLE_SIZE - 24])
def test_perturb(start: int) -> None:
    """Equal where the table is read in the middle and where it wraps, but for a fused rounding."""
    (z,) = (t.float() for t in tensors((2, 3, 5, 7)))
    arguments = (z, noise.table(), [start, 8], 0.1, torch.float32)
    expected = reference.perturb(*arguments)
    assert float((expected - z).std()) == pytest.approx(0.1, rel=0.2)
    torch.testing.assert_close(native.perturb(*arguments), expected, rtol=2e-7, atol=1e-8)
    assert torch.equal(native.perturb(*arguments[:3], 0.0, torch.float32), z)


@pytest.mark.parametrize(
    "adam",
    [reference.adam, native.adam, native.adam_in_passes],
    ids=["reference", "native", "passes"],
)
def test_adam_is_torchs(adam: Callable[..., None]) -> None:
    """Equal gradients in, equal parameters out, over several steps."""
    generator = torch.Generator().manual_seed(3)
    start, *gradients = (torch.randn(1, 50, generator=generator) for _ in range(6))
    expected = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([expected], lr=0.01, betas=(0.8, 0.95), eps=1e-7)
    found, moments = start.clone(), (torch.zeros(1, 50), torch.zeros(1, 50))
    for step, gradient in enumerate(gradients, 1):
        expected.grad = gradient
        optimiser.step()
        adam(found, gradient, *moments, step=step, rate=0.01, betas=(0.8, 0.95), eps=1e-7)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-7)


def test_native_bf16_is_as_exact_as_its_storage() -> None:
    """The error of bf16 is at most twice that of rounding an eager run's stored values."""
    arguments = tensors((1, 16, 24, 20), *block(1, 16, 32, 3))
    exact = reference.conv_norm_act(*arguments)
    x, weight, *rest = arguments
    rounded = [t.bfloat16().double() for t in (x, weight)]
    y = torch.nn.functional.conv2d(
        torch.nn.functional.pad(rounded[0], (1,) * 4, mode="reflect"), rounded[1][0]
    )
    mean, std = y.mean((2, 3), keepdim=True), y.std((2, 3), keepdim=True, correction=0)
    gamma, beta = (t.view(1, -1, 1, 1) for t in rest[1:])
    stored = ((y.bfloat16().double() - mean) / std * gamma + beta).bfloat16().double()
    stored = torch.nn.functional.leaky_relu(stored, 0.2).bfloat16().double()
    low = [x.bfloat16(), *(t.float() for t in arguments[1:])]
    found = native.conv_norm_act(*low).double()
    allowed = 2 * (stored - exact).square().mean().sqrt()
    assert 0 < float((found - exact).square().mean().sqrt()) <= float(allowed)
