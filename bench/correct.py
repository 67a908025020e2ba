"""Whether a backend computes what the published network computes, before any figure is shown."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from flashdip.bench.cases import PUBLISHED, configuration, picture
from flashdip.bench.published import skip
from flashdip.engine.backends import resolve_device, select
from flashdip.engine.backends.base import DTYPES, Step
from flashdip.engine.backends.triton import TritonStep
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.problems import Problem

# Largest relative error, in the 2-norm, of the output and the whole gradient after one iteration.
# They are loose because the quantity is: small activations change sign under rounding. The
# published network itself, at 64 to 256 pixels a side, is off by 1e-6 and up to 1.3e-2 in float32,
# by 4e-2 and up to 0.7 under bf16 autocast. Where it is so far off, `TIMES` that is allowed.
TOLERANCES = {"fp64": (1e-9, 1e-7), "fp32": (1e-4, 5e-2), "bf16": (5e-2, 5e-1)}
TIMES = 2.0
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
    size: int, device: str, backend: str, precision: str, name: str = PUBLISHED, fits: int = 1
) -> dict[str, tuple[float, float]]:
    """Compare one iteration of a backend with the published network in float64.

    Both start from the backend's initial weights and input, without perturbation; the gradient is
    read off Adam's first moment.

    Args:
        size: Side of the picture, in pixels.
        device: Where the backend runs.
        backend: Its name.
        precision: What activations are stored in, or "auto".
        name: Of the preset for denoising.
        fits: F; the last of them is compared.

    Returns:
        Relative errors in the 2-norm, each with what is allowed: of "output" and "gradient".

    Raises:
        WrongResultError: One of them is larger.
    """
    place = resolve_device(device)
    config = dataclasses.replace(configuration(precision, name), perturbation=0.0)
    chosen, exact, _ = select(backend, place, config)
    target = picture(size)
    observation = target.expand(fits, -1, -1, -1).contiguous()
    step = chosen.prepare(Problem(observation, (3, size, size)), config, place, exact, None)
    slot = step.slots[-1]
    start = slot.fitted()
    step()
    output = slot.image().cpu().double()

    network = skip(config.network.inputs, 3, **published_options(config.network)).double()
    z = start.pop("z").double()[None]
    with torch.no_grad():
        for parameter, value in zip(network.parameters(), start.values(), strict=True):
            parameter.copy_(value)
    truth = _draw(network, z, target.double())
    found = output, first_moments(step)[-1] / (1 - config.betas[0])
    errors = [_distance(*pair) for pair in zip(found, truth, strict=True)]
    allowed = list(TOLERANCES[exact])
    if any(error > limit for error, limit in zip(errors, allowed, strict=True)):
        with torch.autocast("cpu", DTYPES[exact], enabled=exact in ("bf16", "fp16")):
            own = _draw(network.float(), z.float(), target)
        usual = [TIMES * _distance(*pair) for pair in zip(own, truth, strict=True)]
        allowed = [max(pair) for pair in zip(allowed, usual, strict=True)]
    pairs = dict(zip(("output", "gradient"), zip(errors, allowed, strict=True), strict=True))
    for kind, (error, limit) in pairs.items():
        if not error <= limit:
            raise WrongResultError(
                f"{backend} ({exact}): the {kind} after one iteration is off by {error:.1e} of its "
                f"norm, {limit:.1e} is allowed; no figures are shown"
            )
    return pairs


def _draw(network: torch.nn.Module, z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the network's output and the gradient of its loss, in float64."""
    network.zero_grad()
    drawn = network(z)
    (drawn.to(target.dtype) - target).square().mean().backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return drawn.detach().double(), torch.cat(gradients).double()


def judged(
    size: int, device: str, backend: str, precision: str, name: str = PUBLISHED, fits: int = 1
) -> dict[str, Any]:
    """Return errors and what is allowed; float32 has to be right as well.

    The tolerance of 16 bits would let a small mistake pass: so the backend is judged in float32
    too, where it has that.
    """
    place = resolve_device(device)
    backend_, exact, _ = select(backend, place, configuration(precision, name))
    found: dict[str, Any] = {}
    for each in sorted({exact, "fp32"}):
        if backend_.unavailable(place, configuration(each, name)):
            continue
        for kind, (error, limit) in check(size, device, backend, each, name, fits).items():
            found[f"{kind}, {each}"] = {"error": error, "allowed": limit}
    return found


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
