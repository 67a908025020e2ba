"""Whole steps in the interpreter: the image, the loss, every gradient, the update."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flashdip.engine.backends.eager import EagerStep
from flashdip.engine.backends.plans import launches
from flashdip.engine.backends.triton import TritonStep
from flashdip.engine.config import FitConfig
from flashdip.engine.fit import fit
from flashdip.engine.networks.skip import Skip, SkipConfig
from flashdip.engine.operators import Downsample, Identity, Linear, Mask
from flashdip.engine.presets import PRESETS, preset
from flashdip.engine.problems import Problem
from flashdip.kernels import noise, reference
from flashdip.kernels.fused.launch import Launch
from flashdip.kernels.fused.record import THIN
from flashdip.kernels.fused.tiles import Tiles
from tests.kernels.fused.judge import judge
from tests.kernels.fused.rounded import Rounded

HALF = torch.float16
FLASH = SkipConfig(inputs=3, upsample=("nearest", "bilinear", "bilinear", "bilinear", "bilinear"))
# Wide skips at either join; averages beside a thin skip, and beside a wide one that reads 3x3;
# kernels of one pixel beside a thin skip that reads 3x3.
OTHERS = (
    SkipConfig(inputs=3, down=(5, 6), skip=(9, 17), upsample=("bilinear", "nearest"), act="Swish"),
    SkipConfig(
        inputs=3,
        down=(5, 6),
        skip=(4, 8),
        kernel_skip=(1, 3),
        upsample=("nearest", "bilinear"),
        downsample="avg",
    ),
    SkipConfig(inputs=3, down=(5, 6), kernel_down=1, kernel_skip=(1, 3), upsample="nearest"),
    SkipConfig(inputs=3, down=(5, 6), skip=0, downsample=("max", "lanczos2"), upsample="nearest"),
    SkipConfig(
        inputs=3,
        down=(5, 6),
        kernel_down=7,
        kernel_up=7,
        kernel_skip=7,
        upsample=("bilinear", "nearest"),
    ),
)
# Joins that do not fold: for their padding, for their kernels, with a wide skip and without one.
UNFOLDED = (
    SkipConfig(inputs=3, down=(5, 6), pad="zero", upsample=("nearest", "bilinear")),
    SkipConfig(
        inputs=3,
        down=(5, 6),
        skip=(0, 9),
        kernel_up=(1, 5),
        upsample=("bilinear", "nearest"),
        act="ELU",
        conv1x1_up=False,
    ),
)
# Of presets with one network the last stands for all.
TOPOLOGIES = {
    preset.config.network: (name, preset.config)
    for (_, name), preset in PRESETS.items()
    if name.startswith("published")
}
DENOISE = preset("denoise", "published-denoise")


def shrunk(config: FitConfig, levels: int = 2) -> FitConfig:
    """The outermost levels of a topology, with an eighth of the channels or so.

    Scales start at one: a channel whose scale is near 0 by chance has a gradient of rounding noise.
    """
    network = config.network
    fields: dict[str, Any] = {
        "scale": "one",
        "down": tuple(max(4, channels // 8) + 1 for channels in network.down[:levels]),
    }
    for name in ("up", "skip", "kernel_down", "kernel_up", "kernel_skip", "upsample", "downsample"):
        value = getattr(network, name)
        if isinstance(value, tuple):
            fields[name] = value[:levels]
        elif name == "skip" and value > THIN:
            fields[name] = value // 8 + 1
    return replace(config, network=replace(network, **fields), stop=("fixed",), iterations=20)


def problem(fits: int = 1, side: tuple[int, int] = (22, 17), *, masked: bool = False) -> Problem:
    """A few random pixels to fit."""
    generator = torch.Generator().manual_seed(5)
    image = torch.rand(fits, 3, *side, generator=generator)
    if not masked:
        return Problem(image, (3, *side))
    mask = (torch.rand(fits, 3, *side, generator=generator) > 0.4).float()
    return Problem(mask * image, (3, *side), operator=Mask(mask))


def step_of(config: FitConfig, of: Problem, dtype: torch.dtype) -> TritonStep:
    """A step whose norms are not all 1 and 0, as in a fit that is on its way."""
    step = TritonStep(of, config, torch.device("cpu"), dtype, None)
    generator = torch.Generator().manual_seed(11)
    views = step.network.views(step.initial)
    for parameter, view in zip(step.network.parameters, views, strict=True):
        if parameter.name.endswith((".gamma", ".beta")):
            view.add_(0.3 * torch.randn(view.shape, generator=generator))
    step.program.layout.pack(views, step.program.parameters)
    step.program.copies.copy_(step.program.parameters)
    return step


def gradients(step: TritonStep) -> list[Tensor | None]:
    """What the launches found, in the published order and shape; None: not computed."""
    plan = step.program.plan
    found: list[Tensor | None] = []
    for index, shape in enumerate(step.program.layout.shapes):
        if step.program.layout.offsets[index] is None:
            found.append(None)
            continue
        if index in plan.parts:
            total = plan.parts[index].sum(1)
        else:
            total = plan.layout.view(plan.gradients, index)
        total = total / step.program.loss_scale
        found.append(total.permute(0, 4, 3, 1, 2) if len(shape) == 4 else total)
    return found


def autograd(
    step: TritonStep, of: Problem, layers: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Image, loss and gradients by torch, from the step's own perturbed input."""
    leaves = [v.to(dtype).requires_grad_() for v in step.network.views(step.initial.clone())]
    offsets = [noise.offset(noise.key(step.config.seed + f), 1) for f in step.fits]
    z = step.program.z.permute(0, 3, 1, 2).float()
    std = step.config.perturbation
    z = reference.perturb(z, noise.table(), offsets, std, step.program.dtype).to(dtype)
    output = step.network.forward(layers, leaves, z)[..., : of.shape[1], : of.shape[2]]
    loss = (of.operator(output) - of.observation).square().flatten(1).mean(1)
    # Scaled as in the kernels, or 16 bits could not hold the gradients.
    scale = step.program.loss_scale
    found = torch.autograd.grad(loss.sum() * scale, leaves, allow_unused=True)
    grads = [
        torch.zeros_like(leaf) if grad is None else grad / scale
        for leaf, grad in zip(leaves, found, strict=True)
    ]
    return output.detach(), loss.detach(), grads


def judge_step(config: FitConfig, of: Problem, dtype: torch.dtype) -> None:
    """Run one step; judge the image, the loss, and the relative errors of all gradients."""
    step = step_of(config, of, dtype)
    exact = autograd(step, of, reference, torch.float64)
    rounded = autograd(step, of, Rounded(dtype), torch.float32)
    step()
    judge(step.watch.output, exact[0], rounded[0], dtype)
    torch.testing.assert_close(step.watch.loss.double(), exact[1], rtol=0.02, atol=0)
    errors, allowed = [], []
    of_layers = zip(step.network.parameters, gradients(step), exact[2], rounded[2], strict=True)
    for parameter, found, truth, plain in of_layers:
        if found is None:
            assert parameter.name.endswith(".bias")
        elif not parameter.name.endswith("join.beta"):  # without effect: rounding noise
            size = truth.norm()
            errors.append((found.double() - truth).norm() / size)
            allowed.append((plain.double() - truth).norm() / size)
    nothing = torch.zeros(len(errors), dtype=torch.float64)
    judge(torch.stack(errors), nothing, torch.stack(allowed), dtype)


@pytest.mark.parametrize(
    "config", [c for _, c in TOPOLOGIES.values()], ids=[name for name, _ in TOPOLOGIES.values()]
)
def test_published_topologies(config: FitConfig) -> None:
    """One step of each, two levels deep, in fp16, on a picture that the network's size exceeds."""
    judge_step(shrunk(config), problem(), torch.float16)


@pytest.mark.parametrize("network", OTHERS, ids=["wide", "averaged", "narrow", "pooled", "7x7"])
def test_other_topologies(network: SkipConfig) -> None:
    """What is not published but can be asked for, in float32: two fits."""
    judge_step(FitConfig(network=network, stop=("fixed",)), problem(2, (16, 16)), torch.float32)


@pytest.mark.slow
def test_256_channels() -> None:
    """Twice as many as the published networks have, in fp16: blocks of channels everywhere."""
    network = SkipConfig(inputs=3, down=(256,), upsample="nearest")
    judge_step(FitConfig(network=network, stop=("fixed",)), problem(1, (16, 16)), torch.float16)


@pytest.mark.parametrize("network", UNFOLDED, ids=["zero", "kernels"])
def test_joins_by_themselves(network: SkipConfig) -> None:
    """What is not folded, in float32."""
    judge_step(FitConfig(network=network, stop=("fixed",)), problem(1, (16, 16)), torch.float32)


def test_joins_that_could_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that would be folded otherwise, in fp16."""
    monkeypatch.setattr(Tiles, "folds", lambda *_: False)
    judge_step(shrunk(DENOISE, levels=1), problem(), torch.float16)


def test_which_joins_fold() -> None:
    """Only those of small maps do not, and only where that saves the filter's launch."""

    def filtered(fits: int, arch: str = "sm_90", network: SkipConfig = FLASH) -> str:
        names = [launch.name for launch in launches(network, 256, 256, arch, HALF, fits)]
        return "".join(name[5] for name in names if name.endswith("up filter"))

    assert filtered(1) == filtered(1, "sm_80") == "21"
    assert filtered(2) == "321"
    assert filtered(1, "interpreter") == filtered(16) == "4321"
    assert filtered(1, network=SkipConfig(pad="zero")) == ""
    assert sum("join" in launch.name for launch in launches(FLASH, 256, 256, "sm_90", HALF)) == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_storage(dtype: torch.dtype) -> None:
    """Two fits, a mask, both ways to enlarge; in bfloat16, and in float32 as a check."""
    config = replace(shrunk(FitConfig(network=FLASH)), average=None)
    judge_step(config, problem(2, (16, 17), masked=True), dtype)


def test_a_fit_in_five_steps() -> None:
    """The image after five steps, against the reference in float64 and its own rounding.

    The seed is one with which no activation is so near 0 that float32 turns its sign: where one is,
    Adam makes 1e-3 of it in these steps, in the reference too.
    """
    config, cpu = replace(shrunk(DENOISE, levels=1), seed=1), torch.device("cpu")
    step = step_of(config, problem(), torch.float32)
    exact, rounded = (
        EagerStep(reference, problem(), config, cpu, dtype, None)
        for dtype in (torch.float64, torch.float32)
    )
    for plain in (exact, rounded):
        views = plain.network.views(plain.parameters)
        step.program.layout.unpack(step.slots[0].good_state()["parameters"], views)
        plain.z.copy_(step.program.z.permute(0, 3, 1, 2))
    for _ in range(5):
        for each in (step, exact, rounded):
            each()
    truth = exact.slots[0].image()
    error, allowed = (
        (each.slots[0].image().double() - truth).abs().max() for each in (step, rounded)
    )
    assert error <= 2 * allowed + 1e-6
    loss = step.slots[0].read().loss
    torch.testing.assert_close(loss, exact.slots[0].read().loss, rtol=1e-5, atol=0)


def test_the_step_is_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared twice: the same launches, the same bits. Run: nothing but the launches."""
    config = replace(shrunk(DENOISE, levels=1), stop=("es-wmv", "es-emv"))
    steps = [step_of(config, problem(), torch.float16) for _ in range(2)]
    first, second = ([described(launch) for launch in s.program.launches] for s in steps)
    assert first == second
    for step in steps:
        step()
    assert torch.equal(steps[0].watch.output, steps[1].watch.output)
    assert torch.equal(steps[0].program.parameters, steps[1].program.parameters)
    run: list[Launch] = []
    monkeypatch.setattr(Launch, "__call__", lambda launch: run.append(launch))
    with Silent():
        steps[0]()
    assert run == steps[0].program.launches


class Silent(TorchDispatchMode):
    """Refuses every operation of torch: to allocate, to copy, to read back."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was called within a step")


def described(launch: Launch) -> tuple[Any, ...]:
    """What must not change: all but where tensors lie."""
    arguments = {
        name: (tuple(value.shape), value.stride(), value.dtype)
        if isinstance(value, Tensor)
        else value
        for name, value in launch.arguments.items()
    }
    return launch.name, launch.grid, arguments, launch.constants, launch.warps, launch.stages


def test_another_problem_in_the_same_step() -> None:
    """The observation is changed in place: the step fits the new one."""
    config = shrunk(DENOISE, levels=1)
    step, other = (step_of(config, problem(), torch.float32) for _ in range(2))
    step.watch.observation.copy_(step.watch.observation.flip(-1))
    step()
    other()
    assert torch.equal(step.watch.output, other.watch.output)
    assert not torch.equal(step.watch.loss, other.watch.loss)


def test_any_operator() -> None:
    """An operator without a kernel: torch computes the loss between two lists of launches."""
    config = shrunk(DENOISE, levels=1)
    image = problem().observation
    plain = step_of(config, problem(), torch.float32)
    through = Problem(2 * image, (3, 22, 17), operator=lambda x: 2 * x)
    step = step_of(config, through, torch.float32)
    for each in (plain, step):
        each()
    torch.testing.assert_close(step.watch.loss, 4 * plain.watch.loss)
    for one, four in zip(gradients(plain), gradients(step), strict=True):
        if one is not None and four is not None:
            torch.testing.assert_close(four, 4 * one, rtol=1e-3, atol=1e-6)


def test_a_fit() -> None:
    """As a person runs it: the loss falls, the record says where, and the state comes back."""
    config = shrunk(DENOISE, levels=1)
    config = replace(config, iterations=2, read_every=1)
    result = fit(problem(), config, backend="triton", device="cpu")
    assert (result.record["backend"], result.record["precision"]) == ("triton", "fp16")
    losses = result.record["history"]["loss"]
    assert losses[-1] < losses[0]
    names = [parameter.name for parameter in Skip(config.network).parameters]
    assert set(names) <= set(result.weights)


TINY = FitConfig(
    network=SkipConfig(inputs=2, outputs=1, down=(4,), skip=2, upsample="nearest"),
    stop=("es-wmv", "es-emv"),
    window=2,
    average=0.5,
)


def small(operator: Any, seed: int = 0) -> Problem:
    """A few random pixels, seen through an operator."""
    image = torch.rand(1, 1, 16, 18, generator=torch.Generator().manual_seed(seed))
    return Problem(operator(image), (1, 16, 18), operator=operator)


def test_ten_steps_are_ten_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same launches with the same arguments in the same order, and nothing else: same bits."""
    run: list[Launch] = []
    monkeypatch.setattr(Launch, "__call__", lambda launch: run.append(launch))
    for operator, length in ((Identity(), 10), (Downsample(2), 10)):
        config = replace(TINY, read_every=length)
        step = TritonStep(small(operator), config, torch.device("cpu"), torch.float16, None)
        run.clear()
        with Silent():
            step.advance(length)
        assert step.slots[0].iteration == length
        ten = list(run)
        run.clear()
        with Silent():
            for _ in range(length):
                step()
        assert run == ten == step.program.launches * length


def test_downsampling_takes_three_launches() -> None:
    """Between image and gradient; against torch between two lists, which is tested by itself."""
    operator = Downsample(2)
    own, other = (
        TritonStep(small(each), TINY, torch.device("cpu"), torch.float32, None)
        for each in (operator, Linear(operator, operator.adjoint))
    )
    direct = TritonStep(small(Identity()), TINY, torch.device("cpu"), torch.float32, None)
    assert not own.program.after and other.program.after
    assert len(own.program.launches) == len(direct.program.launches) + 3
    for step in (own, other):
        step()
    torch.testing.assert_close(own.watch.loss, other.watch.loss)
    for one, two in zip(gradients(own), gradients(other), strict=True):
        if one is not None and two is not None:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_network_for_other_images_is_refused() -> None:
    """Three outputs for a grey picture: before anything is written."""
    config = replace(TINY, network=replace(TINY.network, outputs=3))
    with pytest.raises(ValueError, match="as many outputs as the image has channels, 1, got 3"):
        TritonStep(small(Identity()), config, torch.device("cpu"), torch.float16, None)
