"""When a fit ends, and at which iteration its image is taken: never by looking at the truth.

A rule sees one `Reading` every few iterations. Rules that search for a best iteration *select* it
as they go; without them each iteration is selected, so that the last one is returned.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError


class Reading(NamedTuple):
    """Statistics of one fit, read back from its device.

    Attributes:
        iteration: Counted from 1.
        loss: Mean squared residual of the last output.
        residual: Root mean squared residual of the averaged output over the measured entries.
        noise: What that would be if the averaged output were the truth; NaN if sigma is unknown.
        windowed_variance: Variance of the last `window` outputs, averaged over pixels; NaN until
            there are that many, or when no rule asks for it.
        moving_variance: Exponential moving variance of outputs, averaged over pixels; NaN when not
            asked for.
        seconds: Since the fit began.
    """

    iteration: int
    loss: float
    residual: float
    noise: float
    windowed_variance: float
    moving_variance: float
    seconds: float


class Verdict(NamedTuple):
    """What the rules say to one reading."""

    select: bool  # this iteration is the best so far
    stop: str | None  # the rule that ends the fit


@dataclass
class LeastVariance:
    """ES-WMV and ES-EMV: outputs vary least when the image is fitted and its noise not yet.

    Wang et al., "Early Stopping for Deep Image Prior", TMLR 2023.
    """

    statistic: str  # the field of `Reading`
    start: int  # readings before this iteration do not count
    patience: int
    best: float = math.inf
    best_iteration: int = 0

    def __call__(self, reading: Reading) -> tuple[bool, bool]:
        """Return whether to select this iteration, and whether to stop."""
        value = float(getattr(reading, self.statistic))
        if reading.iteration < self.start or math.isnan(value):
            return False, False
        if value < self.best:
            self.best, self.best_iteration = value, reading.iteration
            return True, False
        return False, reading.iteration - self.best_iteration >= self.patience


class Stopping:
    """The rules of a config, together: any may end the fit.

    "discrepancy" returns the iteration that ends the fit. Where another rule or the last iteration
    ends it, the first rule that searches has selected; without one the last iteration counts.

    Args:
        config: Names the rules and their settings.
        sigma: Standard deviation of the noise in [0, 1], for "discrepancy".

    Raises:
        ConfigError: A rule needs what was not given.
    """

    def __init__(self, config: FitConfig, sigma: float | None) -> None:
        self.config = config
        if "discrepancy" in config.stop and sigma is None:
            raise ConfigError("stop: the rule discrepancy needs the noise level, give sigma")
        self.searches: dict[str, LeastVariance] = {
            name: LeastVariance(statistic, config.window, config.patience)
            for name, statistic in (
                ("es-wmv", "windowed_variance"),
                ("es-emv", "moving_variance"),
            )
            if name in config.stop
        }

    def __call__(self, reading: Reading) -> Verdict:
        """Judge one reading; call once for each, in order."""
        config = self.config
        if "discrepancy" in config.stop and reading.residual <= config.discrepancy * reading.noise:
            return Verdict(select=True, stop="discrepancy")
        answers = {name: search(reading) for name, search in self.searches.items()}
        select = next((selected for selected, _ in answers.values()), True)
        ended: list[str] = [name for name, (_, stop) in answers.items() if stop]
        if config.budget is not None and reading.seconds >= config.budget:
            ended.append("budget")
        if reading.iteration >= config.iterations:
            ended.append("fixed" if "fixed" in config.stop else "iterations")
        return Verdict(select, ended[0] if ended else None)

    def watched(self, reading: Reading) -> float | None:
        """Return the variance that the first searching rule watches, once it is known."""
        for search in self.searches.values():
            value = float(getattr(reading, search.statistic))
            return None if math.isnan(value) else value
        return None

    def state(self) -> dict[str, tuple[float, int]]:
        """Return what the rules remember, for a checkpoint: the least value, and where it was."""
        return {name: (rule.best, rule.best_iteration) for name, rule in self.searches.items()}

    def load(self, state: Mapping[str, tuple[float, int]]) -> None:
        """Go on from what `state` returned."""
        for name, (best, iteration) in state.items():
            self.searches[name].best, self.searches[name].best_iteration = best, iteration
