"""Whether a backend computes what the published network computes, before any figure is shown."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flashdip.bench.baselines import PlainLoop
from flashdip.bench.cases import PUBLISHED, Settings, configuration, picture
from flashdip.bench.published import skip
from flashdip.engine.backends import resolve_device, select
from flashdip.engine.backends.base import DTYPES, Step
from flashdip.engine.backends.eager import EagerStep
from flashdip.engine.backends.triton import TritonStep
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.problems import Problem

# Largest relative error, in the 2-norm, of the output and the whole gradient after one iteration.
# They are loose because the quantity is: small activations change sign under rounding. The
# published network itself, at 64 to 256 pixels a side, is off by 1e-6 and up to 1.3e-2 in float32,
# by 4e-2 and up to 0.7 under bf16 autocast. Where it is so far off, `TIMES` that is allowed.
TOLERANCES = {"fp64": (1e-9, 1e-7), "fp32": (1e-4, 5e-2), "bf16": (5e-2, 5e-1)}
TIMES = 2.0
_REPEATED = 3  # the first iteration that is repeated from a recording, of a step that records
TOLERANCES["fp16"] = TOLERANCES["bf16"]  # flashdip.bench.gate judges the kernels more narrowly


class WrongResultError(RuntimeError):
    """A backend does not compute what the published network computes."""


def published_options(network: SkipConfig) -> dict[str, Any]:
    """Return a network's options under their published names, for `published.skip`."""
    levels = [network.level(index) for index in range(network.levels)]
    names = {
        "num_channels_down": "down",
        "num_channels_up": "up",
        "num_channels_skip": "skip",
        "filter_size_down": "kernel_down",
        "filter_size_up": "kernel_up",
        "upsample_mode": "upsample",
        "downsample_mode": "downsample",
    }
    options: dict[str, Any] = {
        name: [getattr(level, own) for level in levels] for name, own in names.items()
    }
    return options | {
        "filter_skip_size": levels[0].kernel_skip,
        "need_sigmoid": network.sigmoid,
        "need_bias": network.bias,
        "pad": network.pad,
        "act_fun": network.act,
        "need1x1_up": network.conv1x1_up,
    }


def check(
    size: int,
    device: str,
    backend: str,
    precision: str,
    name: str = PUBLISHED,
    fits: int = 1,
    settings: Settings = (),
) -> dict[str, tuple[float, float]]:
    """Compare one iteration of a backend with the published network in float64.

    Both start from the backend's initial weights and input, without perturbation; the gradient is
    read off Adam's first moment. A step that records its second iteration is judged by what it
    repeats in the third, at a learning rate of zero, which leaves the weights as they were.

    Args:
        size: Side of the picture, in pixels.
        device: Where the backend runs.
        backend: Its name.
        precision: What activations are stored in, or "auto".
        name: Of the preset for denoising.
        fits: F; the last of them is compared.
        settings: Fields of the preset that are other.

    Returns:
        Relative errors in the 2-norm, each with what is allowed: of "output" and "gradient".

    Raises:
        WrongResultError: One of them is larger.
    """
    place = resolve_device(device)
    config = dataclasses.replace(
        configuration(precision, name, settings), perturbation=0.0, learning_rate=0.0
    )
    chosen, exact, _ = select(backend, place, config)
    target = picture(size)
    observation = target.expand(fits, -1, -1, -1).contiguous()
    step = chosen.prepare(Problem(observation, (3, size, size)), config, place, exact, None)
    slot = step.slots[-1]
    start = slot.fitted()
    count = _REPEATED if isinstance(step, EagerStep) and step.records else 1
    for _ in range(count):
        step()
    output = slot.image().cpu().double()

    network = skip(config.network.inputs, 3, **published_options(config.network))
    z = start.pop("z")[None]
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), start.values(), strict=True):
            parameter.copy_(value)
    found = output, first_moments(step)[-1] / (1 - config.betas[0] ** count)
    return _compared(backend, exact, found, network, z, target)


def check_plain(
    size: int, precision: str, upsample: str = "bilinear", compiled: bool = False
) -> dict[str, tuple[float, float]]:
    """Compare one iteration of `PlainLoop` on the CPU with the published network in float64.

    Args:
        size: Side of the picture, in pixels.
        precision: "bf16" or "fp32".
        upsample: See `PlainLoop`, as is `compiled`.

    Returns:
        As `check`.

    Raises:
        WrongResultError: An error is larger than what is allowed.
    """
    target = picture(size)
    loop = PlainLoop(target, compiled=compiled, upsample=upsample, precision=precision)
    network = copy.deepcopy(loop.network)
    loss, output = loop.draw(loop.z)
    loss.backward()
    found = output.detach().double(), _gradients(loop.network)
    name = "PyTorch, compiled" if compiled else "PyTorch, eager"
    return _compared(name, precision, found, network, loop.z, target)


def _compared(
    name: str,
    precision: str,
    found: tuple[Tensor, Tensor],
    network: torch.nn.Module,
    z: Tensor,
    target: Tensor,
) -> dict[str, tuple[float, float]]:
    """Compare output and gradient with those of the published network; see `check`.

    Args:
        name: Of what computed them.
        precision: What activations were stored in.
        found: Output, [1, C, H, W], and gradient, [P], in float64.
        network: With the same weights, in float32; it is changed.
        z: Its input.
        target: The observation.
    """
    truth = _draw(network.double(), z.double(), target.double())
    errors = [_distance(*pair) for pair in zip(found, truth, strict=True)]
    allowed = list(TOLERANCES[precision])
    if any(error > limit for error, limit in zip(errors, allowed, strict=True)):
        with torch.autocast("cpu", DTYPES[precision], enabled=precision in ("bf16", "fp16")):
            own = _draw(network.float(), z.float(), target)
        usual = [TIMES * _distance(*pair) for pair in zip(own, truth, strict=True)]
        allowed = [max(pair) for pair in zip(allowed, usual, strict=True)]
    pairs = dict(zip(("output", "gradient"), zip(errors, allowed, strict=True), strict=True))
    for kind, (error, limit) in pairs.items():
        if not error <= limit:
            raise WrongResultError(
                f"{name} ({precision}): the {kind} after one iteration is off by {error:.1e} of "
                f"its norm, {limit:.1e} is allowed; no figures are shown"
            )
    return pairs


def _draw(network: torch.nn.Module, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the network's output and the gradient of its loss, in float64."""
    network.zero_grad()
    drawn = network(z)
    (drawn.to(target.dtype) - target).square().mean().backward()
    return drawn.detach().double(), _gradients(network)


def _gradients(network: torch.nn.Module) -> Tensor:
    """Return the whole gradient, [P] float64."""
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return torch.cat(gradients).double()


def judged(
    size: int,
    device: str,
    backend: str,
    precision: str,
    name: str = PUBLISHED,
    fits: int = 1,
    settings: Settings = (),
) -> dict[str, Any]:
    """Return errors and what is allowed; float32 has to be right as well.

    The tolerance of 16 bits would let a small mistake pass: so the backend is judged in float32
    too, where it has that.
    """
    place = resolve_device(device)
    backend_, exact, _ = select(backend, place, configuration(precision, name, settings))
    found: dict[str, Any] = {}
    for each in sorted({exact, "fp32"}):
        if backend_.unavailable(place, configuration(each, name, settings)):
            continue
        pairs = check(size, device, backend, each, name, fits, settings)
        found |= _record(pairs, each)
    return found


def judged_plain(
    size: int, upsample: str = "bilinear", precision: str = "bf16", compiled: bool = False
) -> dict[str, Any]:
    """Return errors of `PlainLoop` and what is allowed; eagerly, float32 has to be right as well.

    It is compiled once only: that takes a minute, and compiles the same code.
    """
    found: dict[str, Any] = {}
    for each in {precision} if compiled else sorted({precision, "fp32"}):
        found |= _record(check_plain(size, each, upsample, compiled), each)
    return found


def _record(pairs: Mapping[str, tuple[float, float]], precision: str) -> dict[str, Any]:
    """Return errors and what is allowed, as the schema has them."""
    return {
        f"{kind}, {precision}": {"error": error, "allowed": limit}
        for kind, (error, limit) in pairs.items()
    }


def first_moments(step: Step) -> Tensor:
    """Return Adam's first moments, [F, P] float64 on the CPU, in the published order."""
    if isinstance(step, TritonStep):
        moments = torch.zeros_like(step.initial)
        layout, views = step.program.layout, step.network.views(moments)
        layout.unpack(step.program.moments[0].cpu(), views)
    else:
        moments = torch.cat([slot.good_state()["moment1"].cpu() for slot in step.slots])
    return moments.double()


def _distance(found: Tensor, known: Tensor) -> float:
    return float((found - known).norm() / known.norm())
