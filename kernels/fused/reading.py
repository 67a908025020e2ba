"""The launches of a reading, planned: statistics, guard and rules, and what follows from them."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashdip.kernels.fused import judge, resample
from flashdip.kernels.fused.judge import BOARD, BOOKS, Observed, Rules, State
from flashdip.kernels.fused.keep import keep
from flashdip.kernels.fused.launch import Launch
from flashdip.kernels.fused.memory import Memory

if TYPE_CHECKING:
    from flashdip.kernels.fused.program import Images

TRAINED = "parameters", "moment1", "moment2"


@dataclass(frozen=True)
class Reading:
    """What is run at iterations that may be read, and its state.

    Attributes:
        launches: To be run in order.
        state: What they decide.
        good: By name, what a fit that diverged goes back to, [F, ...] float32.
        best: "parameters" and "image" of the best iteration so far; empty if none is searched for.
    """

    launches: list[Launch]
    state: State
    good: dict[str, Tensor]
    best: dict[str, Tensor]


def plan_reading(
    images: "Images",
    trained: dict[str, Tensor],
    copies: Tensor | None,
    counted: tuple[Tensor, Tensor, Tensor],
    rules: Rules,
    average: float | None,
    memory: Memory,
) -> Reading:
    """Plan a reading.

    Args:
        images: Those of the program, with all that a reading needs.
        trained: Parameters and moments by the names of TRAINED, [F, P] float32.
        copies: The parameters in the storage type; None where that is float32.
        counted: Iterations, keys and scales of the rate: see `State`.
        rules: What is judged by.
        average: Decay of the average; None: the output itself is returned.
        memory: Where tensors come from.
    """
    target, measured, truth = images.target, images.measured, images.truth
    sigma, clipped = images.sigma, images.clipped
    assert target is not None and measured is not None and truth is not None
    assert sigma is not None and clipped is not None
    fits, device = len(images.output), memory.device
    state = trained | {"average": images.average, "output": images.output}
    if images.moving_mean is not None and images.moving_variance is not None:
        state |= {"moving_mean": images.moving_mean, "moving_variance": images.moving_variance}
    good = {name: memory.keep(tuple(of.shape), torch.float32) for name, of in state.items()}
    best = {}
    if images.window is not None or images.moving_mean is not None:
        for name, of in (("parameters", state["parameters"]), ("image", images.output)):
            best[name] = memory.keep(tuple(of.shape), torch.float32)

    launches = []
    image = images.output if average is None else images.average
    ideal = image
    if images.downsample is not None:
        ideal = memory.share(tuple(target.shape), torch.float32)
        how = (*images.downsample, memory)
        launches.append(resample.residual("ideal", image, None, ideal, None, *how))
    iterations = torch.arange(rules.iterations + 1, dtype=torch.float64)
    divisors = torch.ones_like(iterations) if average is None else 1 - average**iterations
    decided = State(
        counted[0],
        counted[1],
        memory.keep((fits,), torch.int64),
        counted[2],
        memory.keep((fits, len(BOOKS)), torch.float64),
        memory.keep((fits,), torch.int32),
        memory.keep((fits, len(BOARD)), torch.float64).fill_(math.nan),
    )
    observed = Observed(
        image,
        ideal,
        images.mask,
        target,
        measured,
        truth,
        sigma,
        clipped,
        divisors.float().to(device),
        images.loss,
        trained["parameters"],
        images.window,
        images.moving_variance,
    )
    limits = rules.limits().to(device)
    launches += [
        judge.read("reading", observed, decided, rules, limits, memory),
        keep("keep", decided.actions, state, good, best, copies, averaged=average is not None),
    ]
    return Reading(launches, decided, good, best)
