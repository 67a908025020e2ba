"""Seconds an iteration and peak memory of the published loop and of the engine's backends.

`python -m flashdip.bench.table --size 256` prints the table. All rows fit the published network for
denoising to the same noisy picture, each in its own process, taking turns. Before a figure is
shown, each backend's output and gradient are compared with those of the published network in
float64, from equal weights.
"""

import argparse
import contextlib
import dataclasses
import math
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor

from flashdip.bench.measure import Timing, Variant, take_turns, worker
from flashdip.bench.published import DENOISE, PublishedLoop, skip
from flashdip.engine.backends import resolve_device, select
from flashdip.engine.config import FitConfig
from flashdip.engine.presets import preset
from flashdip.engine.problems import Problem
from flashdip.kernels.memory import kept_pages

# Largest relative error, in the 2-norm, of the output and the whole gradient after one iteration.
# They are loose because the quantity is: small activations change sign under rounding. The
# published network itself, at 64 to 256 pixels a side, is off by 1e-6 and up to 1.3e-2 in float32,
# by 4e-2 and up to 0.7 under bf16 autocast.
TOLERANCES = {"fp64": (1e-9, 1e-7), "fp32": (1e-4, 5e-2), "bf16": (5e-2, 5e-1)}


class WrongResultError(RuntimeError):
    """A backend does not compute what the published network computes."""


def picture(size: int) -> Tensor:
    """Make a smooth picture with noise of sigma 25 / 255, [1, 3, size, size] in [0, 1]."""
    axis = torch.linspace(0, 3 * math.pi, size)
    waves = [torch.sin((c + 1) * axis[:, None] / 2) * torch.cos(axis + c) for c in range(3)]
    clean = 0.5 + 0.4 * torch.stack(waves)[None]
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return (clean + noise * 25 / 255).clamp(0, 1)


def configuration(precision: Any) -> FitConfig:
    """Return the published settings for denoising, without statistics that it does not gather."""
    published = preset("denoise", "published-denoise")
    return dataclasses.replace(published, stop=("fixed",), precision=precision)


def published_variant(size: int, device: str, host_work: bool) -> Variant:
    """Set the published loop up; runs in its worker."""
    place = resolve_device(device)
    loop = PublishedLoop(picture(size).to(place), host_work=host_work)
    return _variant(loop.step, place)


def engine_variant(size: int, device: str, backend: str, precision: str) -> Variant:
    """Set a backend up as `flashdip.fit` does; runs in its worker."""
    place = resolve_device(device)
    chosen, exact, _ = select(backend, place, configuration(precision))
    problem = Problem(picture(size), (3, size, size))
    step = chosen.prepare(problem, configuration(precision), place, exact, None)
    if place.type == "cpu":
        contextlib.ExitStack().enter_context(kept_pages())  # until the process ends
    return _variant(step, place)


def _variant(step: Any, place: torch.device) -> Variant:
    if place.type != "cuda":
        return Variant(step)
    return Variant(
        step,
        lambda: torch.cuda.synchronize(place),
        lambda: torch.cuda.max_memory_allocated(place),
    )


def check(size: int, device: str, backend: str, precision: str) -> tuple[float, float]:
    """Compare one iteration of a backend with the published network in float64.

    Both start from the backend's initial weights and input, without perturbation; the gradient is
    read off Adam's first moment.

    Returns:
        The relative errors, in the 2-norm, of the output and of the gradient.

    Raises:
        WrongResultError: One of them is above `TOLERANCES` of the precision.
    """
    place = resolve_device(device)
    chosen, exact, _ = select(backend, place, configuration(precision))
    config = dataclasses.replace(configuration(precision), perturbation=0.0)
    target = picture(size)
    step = chosen.prepare(Problem(target, (3, size, size)), config, place, exact, None)
    slot = step.slots[0]
    start = slot.fitted()
    step()
    output = slot.image().cpu().double()
    moment = slot.good_state()["moment1"].cpu().double().flatten()

    network = skip(config.network.inputs, 3, **DENOISE).double()
    parameters = list(network.parameters())
    z = start.pop("z").double()
    with torch.no_grad():
        for parameter, value in zip(parameters, start.values(), strict=True):
            parameter.copy_(value)
    drawn = network(z[None])
    (drawn - target.double()).square().mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])

    errors = (
        _distance(output, drawn.detach()),
        _distance(moment / (1 - config.betas[0]), gradient),
    )
    for name, error, limit in zip(("output", "gradient"), errors, TOLERANCES[exact], strict=True):
        if not error <= limit:
            raise WrongResultError(
                f"{backend} ({exact}): the {name} after one iteration is off by {error:.1e} of its "
                f"norm, {limit:.0e} is allowed; no figures are shown"
            )
    return errors


def _distance(found: Tensor, known: Tensor) -> float:
    return float((found - known).norm() / known.norm())


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=256, help="pixels a side")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each row")
    parser.add_argument("--steps", type=int, default=3, help="iterations in a sample")
    parser.add_argument("--warmup", type=int, default=1, help="untimed iterations before each")
    parser.add_argument(
        "--backends",
        default="reference:fp32,native",
        help="comma-separated, each NAME or NAME:PRECISION",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    chosen = parser.parse_args(arguments)
    device = str(resolve_device(chosen.device))
    console = Console(width=100)  # the table is as wide where it is piped

    makers: dict[str, tuple[Any, ...]] = {
        "published": (published_variant, chosen.size, device, False),
        "published + host work": (published_variant, chosen.size, device, True),
    }
    for entry in filter(None, chosen.backends.split(",")):
        name, _, precision = entry.partition(":")
        place = resolve_device(device)
        backend, exact, _ = select(name, place, configuration(precision or "auto"))
        # The tolerance of bf16 would let a small mistake pass: float32 has to be right as well.
        for each in sorted({exact, "fp32"}):
            if not backend.unavailable(place, configuration(each)):
                errors = check(chosen.size, device, name, each)
                console.print(
                    f"{name} ({each}): output off by {errors[0]:.1e}, gradient by "
                    f"{errors[1]:.1e} of its norm against float64; allowed {TOLERANCES[each]}",
                    soft_wrap=True,
                )
        makers[f"{name} ({exact})"] = (engine_variant, chosen.size, device, name, exact)

    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(worker(*make)) for name, make in makers.items()}
        timers = {
            name: lambda running=running: running.seconds(steps=chosen.steps, warmup=chosen.warmup)
            for name, running in workers.items()
        }
        timings = take_turns(timers, rounds=chosen.rounds, baseline="published")
        memory = {name: running.memory() for name, running in workers.items()}
    console.print(_table(timings, memory))
    console.print(
        f"{chosen.size}x{chosen.size}, 3 channels, {device} ({_processor(device)}), "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {platform.platform()}; "
        f"median over {chosen.rounds} rounds of {chosen.steps} iterations; memory is the peak of "
        + ("the device" if device.startswith("cuda") else "the whole process, torch included"),
        soft_wrap=True,
    )


def _table(timings: dict[str, Timing], memory: dict[str, int]) -> Table:
    table = Table(box=MARKDOWN)
    table.add_column("")
    for title in ("s/it", "p10", "p90", "times as fast", "peak MiB"):
        table.add_column(title, justify="right")
    for name, timing in timings.items():
        table.add_row(
            name,
            *(f"{value:.4g}" for value in (timing.median, timing.p10, timing.p90)),
            f"{timing.ratio:.2f}",
            f"{memory[name] / 2**20:.0f}",
        )
    return table


def _processor(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
