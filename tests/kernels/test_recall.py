"""Maps that are made anew, and norms in place: the gradients of keeping everything."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.kernels import activated, fitwise, native, recall
from flashdip.kernels.opset import SLOPE


def double(x: Tensor) -> Tensor:
    """A map that is cheap to make."""
    return 2 * x


def test_a_map_is_made_again_of_what_it_was_made_of() -> None:
    """Also of a map that is itself made again, through a view, and as often as it is asked for."""
    calls = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return double(x)

    x = torch.randn(3, 4, requires_grad=True)
    with recall.recalling():
        assert recall.active()
        once = recall.made(counted(x), counted, x)
        twice = recall.made(counted(once), counted, once)
        loss = (twice[1:].exp() * twice[:2]).sum()
        del once, twice
    assert not recall.active() and len(calls) == 2
    (found,) = torch.autograd.grad(loss, x)
    assert len(calls) > 3
    (expected,) = torch.autograd.grad(((4 * x)[1:].exp() * (4 * x)[:2]).sum(), x)
    torch.testing.assert_close(found, expected)


def test_the_memory_of_a_map_is_free_after_its_use() -> None:
    """And what takes its place is not mistaken for it."""
    x = torch.randn(1 << 16, requires_grad=True)
    with recall.recalling():
        made = recall.made(double(x), double, x)
        storage = StorageWeakRef(made.untyped_storage())
        loss = made.square().sum()
        del made
        assert storage.expired()
        others = [torch.full_like(x, 3.0) for _ in range(8)]
        loss = loss + sum((x * other).sum() for other in others)
    (found,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(found, 8 * x.detach() + 24)


def test_outside_nothing_is_noted() -> None:
    """`made` returns the map itself, and autograd keeps it."""
    kept: list[Tensor] = []
    x = torch.randn(5, requires_grad=True)
    y = double(x)
    assert recall.made(y, double, x) is y
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y.square()
    assert kept[0].data_ptr() == y.data_ptr()


def differentiated(
    function: Callable[..., Tensor], given: list[Tensor], slope: Tensor
) -> list[Tensor]:
    """Return the result and the gradients; what is given stays as it is."""
    own = [t.clone().requires_grad_() for t in given]
    result = function(own[0] * 1, *own[1:])
    value = result.detach().clone()
    return [value, *torch.autograd.grad(result, own, slope.clone())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("fits", "size"), [(1, (7, 5)), (3, (3, 2)), (3, (2, 1)), (1, (31, 17))])
def test_norm_in_place(dtype: torch.dtype, fits: int, size: tuple[int, int]) -> None:
    """Values and gradients are as exact as those of torch's, with channels scaled to nothing.

    Of two pixels, whose gradient is what a cancellation leaves, the error is 2.2 times as large.
    """
    factor = 3 if size == (2, 1) else 2
    generator = torch.Generator().manual_seed(1)
    y, slope = (
        torch.randn(fits, 19, *size, generator=generator, dtype=torch.float64).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    gamma, beta = (torch.randn(fits, 19, generator=generator) for _ in range(2))
    gamma[:, 3], gamma[0, 5], gamma[:, 7], beta[:, 7] = 0.0, 1e-4, -1e-5, 0.0

    def plain(y: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.leaky_relu(fitwise.norm(y, gamma, beta), SLOPE)

    wide = torch.promote_types(dtype, torch.float32)
    given = [y.to(dtype), gamma.to(wide), beta.to(wide)]
    exact = differentiated(plain, [y, gamma.double(), beta.double()], slope)
    usual = differentiated(plain, given, slope.to(dtype))
    found = differentiated(activated.norm_act, given, slope.to(dtype))
    for mine, theirs, true in zip(found, usual, exact, strict=True):
        error, allowed = ((t.double() - true).square().mean().sqrt() for t in (mine, theirs))
        tiny = (1e-12 if dtype == torch.float64 else 1e-6) * true.square().mean().sqrt()
        assert float(error) <= float(factor * allowed + tiny)


NETWORKS = [
    SkipConfig(skip=(3, 0), scale="uniform"),
    SkipConfig(skip=(3, 18), upsample="nearest", scale="uniform"),
    SkipConfig(kernel_down=5, kernel_up=5, scale="uniform"),  # maps lie in many ways
    SkipConfig(downsample="max", conv1x1_up=False, scale="uniform"),
    SkipConfig(skip=(3, 0), act="ELU"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("fits", [1, 2])
@pytest.mark.parametrize("config", NETWORKS, ids=range(len(NETWORKS)))
def test_a_network_recalls(config: SkipConfig, fits: int, dtype: torch.dtype) -> None:
    """Its images have the same bits; gradients are the same but for rounding; it keeps less."""
    network = Skip(replace(config, inputs=16, down=(16, 20)))
    generator = torch.Generator().manual_seed(2)
    flat = torch.stack([network.initialise(fit) for fit in range(fits)])
    flat = (flat + 0.05 * torch.randn(flat.shape, generator=generator)).to(dtype)
    x = torch.randn(fits, 16, *network.config.network_size(37, 50), generator=generator).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)

    def run(recalls: bool) -> tuple[Tensor, Tensor, int]:
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        leaves = [v.requires_grad_() for v in network.views(flat.clone())]
        with recall.recalling(note) if recalls else saved_tensors_hooks(note, lambda t: t):
            images = network.forward(native, leaves, x)
        slope = torch.linspace(-1, 1, images.numel(), dtype=dtype).view(images.shape)
        gradients = torch.autograd.grad(images, leaves, slope, allow_unused=True)
        return (
            images,
            torch.cat([g.flatten() for g in gradients if g is not None]),
            sum(kept.values()),
        )

    images, gradients, kept = run(False)
    again, others, less = run(True)
    assert torch.equal(images, again)
    error = float((others - gradients).norm() / gradients.norm())
    assert error < (1e-13 if dtype == torch.float64 else 3e-6)
    assert less < 0.9 * kept
