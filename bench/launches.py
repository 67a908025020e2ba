"""The launches of a Triton step and of a reading, one by one, on the GPU at hand."""

import math
from collections.abc import Callable
from typing import Any

import torch

from flashdip.bench import suite
from flashdip.bench.baselines import variant
from flashdip.bench.cases import configuration, picture
from flashdip.bench.ceilings import Ceilings
from flashdip.bench.correct import judged
from flashdip.bench.measure import clock, measure
from flashdip.bench.work import Work
from flashdip.engine.backends import TRITON
from flashdip.engine.backends.base import DTYPES
from flashdip.engine.backends.triton import TritonStep
from flashdip.engine.config import FitConfig
from flashdip.engine.problems import Problem


def rows(
    size: int,
    device: torch.device,
    ceilings: Ceilings,
    *,
    config: FitConfig | None = None,
    rounds: int = 7,
    block: float = 0.02,
    judge: Callable[..., dict[str, Any]] = judged,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Judge a step as a whole, then measure each launch of it and of a reading; see `suite.row`.

    A launch is repeated back to back: what it reads may still lie in the L2 cache, as it may in a
    step, and the host's time to launch it is hidden where it runs for longer than that.

    Args:
        size: Side of the picture, in pixels.
        device: Where.
        ceilings: Of the device.
        config: What is fitted; None: the published network.
        rounds: Samples of each.
        block: Seconds of a sample, about.
        judge: Proves the step right.
        tell: Is told what is being done.

    Returns:
        A row for each launch; none where the backend cannot run.

    Raises:
        WrongResultError: The step computes something else.
    """
    precision = TRITON.precision(device)
    config = config or configuration(precision)
    if TRITON.unavailable(device, config):
        return []
    tell(f"triton ({precision}): is it right?")
    gate = judge(size, str(device), TRITON.name, precision)
    step = TritonStep(
        Problem(picture(size), (3, size, size)), config, device, DTYPES[precision], None
    )
    found, launches = [], [*step.program.launches, *step.program.after]
    if (reading := step.program.reading) is not None:
        reading.state.actions.fill_(1)  # to keep the state; the launch that decides comes later
        launches += reversed(reading.launches)
    for launch in launches:
        tell(f"triton ({precision}), {launch.name}")
        sync = variant(launch, device).sync
        once = clock(launch, steps=1, warmup=2, sync=sync)
        name = f"launch {launch.name}, triton ({precision})"
        steps = max(1, math.ceil(block / once))
        timing = measure({name: launch}, rounds=rounds, steps=steps, warmup=1, sync=sync)[name]
        counted = {(launch.name, ""): Work(launch.flops, launch.bytes)}
        parameters = {"launch": launch.name, "precision": precision, "size": size}
        found.append(suite.row(name, parameters, timing, "", counted, ceilings, gate=gate))
    return found
