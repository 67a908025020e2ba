"""Whether the Triton kernels are right on the GPU at hand, before any figure of it is shown.

First single steps of small networks of every published topology: image and gradients against
`reference` in float64, from equal states. Their errors may be twice those of the same step with the
same rounding on a CPU (`flashdip.bench.emulated`), that of a single gradient four times: a number
on the edge between two roundings changes all that follows, and medians over seeds smooth that in
part only. Then a photograph: after so many iterations that the fits have long gone apart, the image
has to be as good as that of `reference` in float32.
"""

import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashdip.bench.correct import WrongResultError, first_moments
from flashdip.bench.emulated import emulate
from flashdip.bench.perturbation import SIGMA, picture
from flashdip.engine.backends import REFERENCE, TRITON
from flashdip.engine.backends.base import DTYPES, Backend
from flashdip.engine.backends.eager import EagerStep
from flashdip.engine.backends.triton import TritonStep
from flashdip.engine.config import FitConfig
from flashdip.engine.metrics import psnr
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.presets import PRESETS, preset
from flashdip.engine.problems import Problem
from flashdip.kernels import reference

# Of the small problems. Their networks are larger: the outer one of two joins is just large enough
# to be folded on a GPU (`Tiles.folds`), the inner one is not.
FITS, SIDE = 2, (26, 21)
SEEDS = 5
WORSE = 1.0  # dB that the photograph may be worse; float32 alone varies by a third of that
TIMES, EACH = 2.0, 4.0  # what is allowed, of all and of a single gradient
MEASURES = ("image, rms", "image, largest", "gradients, rms", "gradients, largest")


def topologies() -> dict[str, FitConfig]:
    """Return the published configs with their networks shrunk, one of each; by preset's name."""
    found: dict[SkipConfig, tuple[str, FitConfig]] = {}
    for (_, name), each in PRESETS.items():
        if name.startswith("published"):
            config = replace(
                each.config, network=_shrunk(each.config.network), stop=("fixed",), iterations=20
            )
            found.setdefault(config.network, (name, config))
    return dict(found.values())


def _shrunk(network: SkipConfig, levels: int = 2) -> SkipConfig:
    """Return the outermost levels with an eighth of the channels."""
    fields: dict[str, Any] = {
        name: value[:levels] for name, value in vars(network).items() if isinstance(value, tuple)
    }
    fields["down"] = tuple(max(4, channels // 8) + 1 for channels in network.down[:levels])
    if isinstance(network.skip, int) and network.skip > 8:
        fields["skip"] = network.skip // 8
    return replace(network, **fields)


def check_steps(
    configs: dict[str, FitConfig], device: torch.device, precision: str, seeds: int = SEEDS
) -> dict[str, Any]:
    """Judge one step of each config; return errors and what was allowed, by name and measure.

    Raises:
        WrongResultError: An error is too large.
    """
    result: dict[str, Any] = {}
    for name, config in configs.items():
        pairs = [
            _step_errors(replace(config, seed=10 * seed), device, precision)
            for seed in range(seeds)
        ]
        found, rounded = (torch.stack(each) for each in zip(*pairs, strict=True))  # [seeds, n]
        unit = torch.finfo(DTYPES[precision]).eps
        error, allowed = (_summary(each) for each in (found, rounded))
        single = (found / (rounded + unit / EACH)).median(0).values.max()
        checks = dict(zip(MEASURES, zip(error, TIMES * allowed + unit, strict=True), strict=True))
        checks["single gradient, times its rounding"] = single, torch.tensor(EACH)
        result[name] = {}
        for measure, (value, limit) in checks.items():
            if not value <= limit:
                raise WrongResultError(
                    f"triton ({precision}), a step of {name}: {measure}: off by {value:.1e}, "
                    f"{limit:.1e} is allowed"
                )
            result[name][measure] = {"error": float(value), "allowed": float(limit)}
    return result


def _step_errors(config: FitConfig, device: torch.device, precision: str) -> tuple[Tensor, Tensor]:
    """Return the errors of one step against float64: the kernels', and their emulation's.

    Each are the image's, root of the mean square and largest, and for each parameter with an effect
    that of its gradient, relative to the gradient's norm.
    """
    generator = torch.Generator().manual_seed(config.seed)
    observation = torch.rand(FITS, config.network.outputs, *SIDE, generator=generator)
    problem = Problem(observation, (config.network.outputs, *SIDE))
    dtype, cpu = DTYPES[precision], torch.device("cpu")
    kernels = TRITON.prepare(problem, config, device, precision, None)
    _disturb(kernels, generator)
    starts = [slot.fitted() for slot in kernels.slots]
    kernels()
    gradients = first_moments(kernels) / (1 - config.betas[0])

    ops: Any = types.SimpleNamespace(**{**vars(reference), "perturb": _rounded_input(dtype)})
    exact = EagerStep(ops, problem, config, cpu, torch.float64, None)
    emulated, emulation = emulate(problem, config, dtype)
    for step in (exact, emulated):
        _start(step, starts)
        step()
    steps = [
        (kernels.watch.output.cpu(), kernels.network.views(gradients)),
        (emulated.watch.output, emulated.network.views(emulated.gradients / emulation.loss_scale)),
    ]
    truth, truths = exact.watch.output, exact.network.views(exact.gradients)
    names = [parameter.name for parameter in exact.network.parameters]
    rows = []
    for image, found in steps:
        off = (image.double() - truth) / truth.square().mean().sqrt()
        errors = [off.square().mean().sqrt(), off.abs().max()]
        errors += [
            (gradient.double() - known).norm() / known.norm()
            for name, gradient, known in zip(names, found, truths, strict=True)
            if _effective(name)
        ]
        rows.append(torch.stack(errors))
    return rows[0], rows[1]


def _disturb(step: TritonStep, generator: torch.Generator) -> None:
    """Move scales and shifts of all norms away from 1 and 0, as in a fit that is on its way."""
    views = step.network.views(step.initial)
    for parameter, view in zip(step.network.parameters, views, strict=True):
        if parameter.name.endswith((".gamma", ".beta")):
            view.add_(0.3 * torch.randn(view.shape, generator=generator))
    step.program.layout.pack(views, step.program.parameters)
    step.program.copies.copy_(step.program.parameters)


def _start(step: EagerStep, starts: Sequence[dict[str, Tensor]]) -> None:
    """Bring a step to where others are: weights and input by name, one dict for each fit."""
    for slot, start in zip(step.slots, starts, strict=True):
        *weights, z = start.values()
        step.z[slot.index].copy_(z)
        with torch.no_grad():
            for leaf, value in zip(step.leaves, weights, strict=True):
                leaf[slot.index].copy_(value)


def _rounded_input(dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return a perturbation whose result is rounded: that is no error of what follows."""

    def perturb(
        z: Tensor, table: Tensor, offsets: Sequence[int], std: float, wide: torch.dtype
    ) -> Tensor:
        return reference.perturb(z, table, offsets, std, dtype).to(wide)

    return perturb


def _effective(name: str) -> bool:
    """Return whether a parameter has an effect: no shift does that a norm takes away again."""
    return name == "head.bias" or not name.endswith((".bias", "join.beta"))


def _summary(errors: Tensor) -> Tensor:
    """Return one number for each of `MEASURES`, of errors [seeds, n]: medians over seeds."""
    image, gradients = errors[:, :2], errors[:, 2:]
    over = [gradients.square().mean(1).sqrt(), gradients.max(1).values]
    return torch.cat([image, torch.stack(over, 1)], 1).median(0).values


def check_photograph(
    device: torch.device,
    precisions: Sequence[str],
    *,
    size: int = 256,
    iterations: int = 200,
    name: str = "published-denoise",
) -> dict[str, float]:
    """Denoise a photograph; return the PSNR of the averaged output, by backend and precision.

    Raises:
        WrongResultError: One of the Triton backend's is too low.
    """
    config = replace(preset("denoise", name), iterations=iterations, stop=("fixed",))
    truth = picture("astronaut", size)
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    problem = Problem((truth + SIGMA * noise).clamp(0, 1)[None], (3, size, size))
    scores: dict[str, float] = {}
    runs: list[tuple[Backend, str]] = [(REFERENCE, "fp32")]
    for backend, precision in [*runs, *((TRITON, each) for each in precisions)]:
        step = backend.prepare(problem, config, device, precision, None)
        for _ in range(iterations):
            step()
        key = f"{backend.name} {precision}"
        scores[key] = psnr(step.slots[0].image()[0].cpu(), truth)
        if not scores[key] >= scores["reference fp32"] - WORSE:
            raise WrongResultError(
                f"{key}, a photograph after {iterations} iterations: {scores[key]:.2f} dB, "
                f"reference has {scores['reference fp32']:.2f}, {WORSE} less are allowed"
            )
    return scores
