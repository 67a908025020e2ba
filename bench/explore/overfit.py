"""The quality of a fit over its iterations, past its best, and where each rule would stop it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

from torch import Tensor

from flashdip.engine.config import FitConfig, StopRule
from flashdip.engine.errors import DivergedError
from flashdip.engine.events import Event, Progress
from flashdip.engine.fit import Place
from flashdip.engine.metrics import decibels
from flashdip.engine.problems import Problem
from flashdip.engine.stopping import Reading, Stopping

RULES: tuple[StopRule, ...] = tuple(
    rule for rule in get_args(StopRule) if rule not in ("fixed", "budget")
)


def overfit(
    problem: Problem,
    clean: Tensor,
    config: FitConfig,
    *,
    device: str = "auto",
    callback: Callable[[Event], None] = lambda event: None,
) -> dict[str, Any]:
    """Fit to the end, let every rule judge on the way, and compare with the truth.

    Args:
        problem: What to fit; without its `sigma` the rules that need it do not judge.
        clean: The truth, [1, C, H, W] in [0, 1].
        config: How to fit; its `stop` is not asked.
        device: Where to fit.
        callback: Receives `Progress`.

    Returns:
        "iterations", and "decibels" of the averaged output at each, nothing added back; "best": the
        iteration of the highest and its decibels; "end": the last; and in "rules" for each rule the
        iteration whose image it takes, its decibels, and "stopped", the iteration at which it ends
        the fit (None: it does not). A rule that takes none has None for all three.

    Raises:
        DivergedError: The loss is not finite any more.
    """
    known = problem.sigma is not None
    asked = tuple(rule for rule in RULES if known or rule != "discrepancy")
    watched = replace(config, stop=asked)
    place = Place.choose(problem, watched, "auto", device, ())
    step = place.prepare(problem, clean)
    slot = step.slots[0]
    judges = {rule: Stopping(replace(config, stop=(rule,)), problem.sigma) for rule in asked}
    rules: dict[str, dict[str, Any]] = {
        rule: {"iteration": None, "decibels": None, "stopped": None} for rule in asked
    }
    iterations: list[int] = []
    quality: list[float] = []
    with place.memory():
        while slot.iteration < config.iterations:
            step()
            at = slot.iteration
            if at % config.read_every and at != config.iterations:
                continue
            statistics = slot.read()
            if not statistics.loss < float("inf"):
                raise DivergedError(
                    f"fit: expected a finite loss, got {statistics.loss} at iteration {at}; lower "
                    "the learning rate"
                )
            iterations.append(at)
            quality.append(decibels(statistics.squared_error))
            reading = Reading(*statistics[:-2], 0.0)
            for rule, judge in judges.items():
                if rules[rule]["stopped"] is not None:
                    continue
                verdict = judge(reading)
                if verdict.select and (judge.searches or verdict.stop == rule):
                    rules[rule] |= {"iteration": at, "decibels": quality[-1]}
                if verdict.stop == rule:
                    rules[rule]["stopped"] = at
            callback(Progress(at, config.iterations, statistics.loss, quality[-1], None, 0.0, 0.0))
    best = max(range(len(quality)), key=quality.__getitem__)
    return {
        "iterations": iterations,
        "decibels": quality,
        "best": {"iteration": iterations[best], "decibels": quality[best]},
        "end": {"iteration": iterations[-1], "decibels": quality[-1]},
        "rules": rules,
    }
