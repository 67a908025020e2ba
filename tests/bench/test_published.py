"""The yardstick computes what the published code computes, and its loop does what was published."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashdip.bench.published import (
    PublishedLoop,
    downsampler,
    kernel,
    network_input,
    numpy_psnr,
    skip,
)
from tests import golden

SMALL: dict[str, Any] = {
    "num_channels_down": (4, 6),
    "num_channels_up": (5, 6),
    "num_channels_skip": (2, 0),
    "upsample_mode": "bilinear",
    "pad": "reflection",
}


@pytest.mark.parametrize("name", golden.cases())
def test_network_agrees_with_the_published_code(name: str) -> None:
    known = golden.case(name)
    network = skip(**known.options).double()
    parameters = list(network.parameters())
    assert [tuple(p.shape) for p in parameters] == known.shapes
    with torch.no_grad():
        for parameter, value in zip(parameters, golden.parameters(known.shapes), strict=True):
            parameter.copy_(value)
    inputs, outputs = known.channels
    y = network(golden.network_input(inputs, *known.size)[None])
    golden.check_output(known, y)
    loss = (y - golden.target(outputs, *known.size)).square().mean()
    assert abs(loss.item() - known.loss) < 1e-10
    loss.backward()
    golden.check_gradients(known, [p.grad for p in parameters])


def test_checks_pass_other_roundings_and_nothing_else() -> None:
    known = golden.case("published-dejpeg/64x96")
    live = golden.live(known.options, (64, 64))
    network = skip(**known.options).double()

    def run() -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            for parameter, value in zip(network.parameters(), live.parameters, strict=True):
                parameter.copy_(value)
        y = network(live.z[None].contiguous(memory_format=torch.channels_last))
        loss = (y[0] - live.target).square().mean()
        return y, list(torch.autograd.grad(loss, list(network.parameters())))

    live.check(*run())
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1.001e-5
    with pytest.raises(AssertionError, match="output is off"):
        live.check(*run())


@pytest.mark.parametrize("name", golden.downsample_cases())
def test_downsampler_agrees_with_the_published_code(name: str) -> None:
    known = golden.downsample_case(name)
    down = downsampler(known.factor, known.kernel, known.phase).double()
    golden.check_output(known, down(golden.downsample_input()[None]))
    # The same with the kernel not rounded to float32.
    exact = downsampler(known.factor, known.kernel, known.phase, dtype=torch.float64)
    golden.check_output(known, exact(golden.downsample_input()[None]), tolerance=1e-8)


def test_downsampler_with_a_box_averages() -> None:
    x = torch.rand(1, 2, 6, 9)
    down = downsampler(3, "box", 0.5, channels=2, preserve_size=False, width=3)
    torch.testing.assert_close(down(x), nn.functional.avg_pool2d(x, 3))


@pytest.mark.parametrize("phase", [0.0, 0.5])
def test_kernels_are_symmetric_and_sum_to_one(phase: float) -> None:
    taps = kernel(4, "lanczos3", phase)
    assert len(taps) == (24 if phase else 25)
    assert abs(taps.sum() - 1) < 1e-12
    assert abs(taps - taps[::-1, ::-1]).max() < 1e-15


@pytest.mark.parametrize("arguments", [("gauss12", 0.5), ("lanczos2", 0.3), ("cubic", 0.0)])
def test_unpublished_kernels_are_refused(arguments: tuple[str, float]) -> None:
    with pytest.raises(ValueError, match=arguments[0].rstrip("12")):
        kernel(4, *arguments)


@pytest.mark.parametrize("mode", ["stride", "avg", "max", "lanczos2", "lanczos3"])
@pytest.mark.parametrize("act", ["LeakyReLU", "Swish", "ELU", "none", nn.ReLU])
def test_every_option_can_be_differentiated(mode: str, act: Any) -> None:
    options = SMALL | {"downsample_mode": mode, "act_fun": act, "need_sigmoid": False}
    network = skip(3, 1, **options, need_bias=False, need1x1_up=False).double()
    assert not any(
        isinstance(m, nn.Conv2d) and m.bias is not None
        for m in network[:-1].modules()
        if mode not in ("lanczos2", "lanczos3")
    )
    x = torch.rand(1, 3, 16, 12, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(network(x)[0, 0, 5, 5], x)
    step = torch.zeros_like(x)
    step[0, 1, 5, 6] = 1e-6
    with torch.no_grad():
        rise = network(x + step)[0, 0, 5, 5] - network(x - step)[0, 0, 5, 5]
    torch.testing.assert_close(rise / 2e-6, slope[0, 1, 5, 6], rtol=1e-4, atol=1e-8)


def expected_steps(loop: PublishedLoop, target: Tensor, noise: Tensor, steps: int) -> list[Tensor]:
    """The method in plain formulas, on a copy of the loop's network: the outputs of each step."""
    network = skip(4, 3, **SMALL).to(target)
    network.load_state_dict(loop.network.state_dict())
    weights = list(network.parameters())
    first = [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    outputs = []
    for t in range(1, steps + 1):
        y = network(noise[t - 1])
        outputs.append(y.detach())
        grads = torch.autograd.grad((y - target).square().mean(), weights)
        for w, g, m, v in zip(weights, grads, first, second, strict=True):
            m.copy_(0.9 * m + 0.1 * g)
            v.copy_(0.999 * v + 0.001 * g * g)
            scaled = (v / (1 - 0.999**t)).sqrt() + 1e-8
            w.data -= 0.01 * (m / (1 - 0.9**t)) / scaled
    return outputs


def test_loop_is_the_published_method() -> None:
    target = torch.rand(1, 3, 16, 20, dtype=torch.float64, generator=torch.manual_seed(1))
    loop = PublishedLoop(target, options=SMALL, input_depth=4, perturbation=1 / 30, seed=7)
    z, draws = loop._saved.clone(), torch.Generator().manual_seed(7)
    inputs = torch.stack([z + torch.empty_like(z).normal_(generator=draws) / 30 for _ in range(3)])
    outputs = expected_steps(loop, target, inputs, 3)
    for output in outputs:
        loop.step()
        assert loop.output is not None
        torch.testing.assert_close(loop.output, output, rtol=1e-6, atol=1e-8)
        assert math.isclose(loop.loss, float((loop.output - target).square().mean()))
    a, b, c = outputs
    assert loop.average is not None
    torch.testing.assert_close(
        loop.average, 0.99 * (0.99 * a + 0.01 * b) + 0.01 * c, rtol=1e-6, atol=1e-8
    )


def test_loss_is_masked_over_all_pixels() -> None:
    target = torch.rand(1, 3, 16, 16)
    mask = (torch.rand(1, 1, 16, 16) < 0.5).float()
    loop = PublishedLoop(target, options=SMALL, input_depth=4, mask=mask)
    loop.step()
    assert loop.output is not None
    expected = ((loop.output - target) * mask).square().mean()
    assert math.isclose(loop.loss, float(expected), rel_tol=1e-5)


def test_loss_is_downsampled() -> None:
    target = torch.rand(1, 3, 4, 5)
    down = downsampler(4, "lanczos2", 0.5)
    loop = PublishedLoop(target, options=SMALL, input_depth=4, downsampler=down, size=(16, 20))
    weight = down[-1].weight
    assert isinstance(weight, Tensor)
    before = weight.detach().clone()
    loop.step()
    assert loop.output is not None and loop.output.shape == (1, 3, 16, 20)
    with torch.no_grad():
        expected = (down(loop.output) - target).square().mean()
    assert math.isclose(loop.loss, float(expected), rel_tol=1e-5)
    torch.testing.assert_close(weight, before)  # the optimiser leaves it alone


def test_host_work_changes_nothing_until_the_fit_falls_back() -> None:
    target = torch.rand(1, 3, 16, 16)
    bare, full = (
        PublishedLoop(target, options=SMALL, input_depth=4, host_work=work, seed=3)
        for work in (False, True)
    )
    for _ in range(4):
        bare.step()
        full.step()
    assert bare.output is not None and full.output is not None
    assert torch.equal(bare.output, full.output)
    assert bare.iteration == full.iteration == 4


def test_host_work_goes_back_when_the_fit_falls_by_five_decibels() -> None:
    target = torch.rand(1, 3, 16, 16)
    loop = PublishedLoop(target, options=SMALL, input_depth=4, host_work=True, learning_rate=1e-9)
    loop.step()
    loop.step()
    good = [p.detach().clone() for p in loop.network.parameters()]
    with torch.no_grad():
        list(loop.network.parameters())[-1].fill_(40.0)  # a saturated, white output
    loop.step()
    assert loop.iteration == 2
    for parameter, before in zip(loop.network.parameters(), good, strict=True):
        torch.testing.assert_close(parameter, before, rtol=0, atol=1e-6)


def test_meshgrid_counts_columns_then_rows() -> None:
    z = network_input("meshgrid", 2, (3, 5))
    assert z.shape == (1, 2, 3, 5)
    torch.testing.assert_close(z[0, 0, 1], torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    torch.testing.assert_close(z[0, 1, :, 2], torch.tensor([0, 0.5, 1]))


def test_numpy_psnr() -> None:
    zeros = torch.zeros(3, 4, 4).numpy()
    assert math.isclose(numpy_psnr(zeros, zeros + 0.1), 20, rel_tol=1e-6)
    with pytest.raises(ValueError, match="psnr"):
        numpy_psnr(zeros + 2, zeros)
