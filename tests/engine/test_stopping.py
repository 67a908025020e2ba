"""Stopping rules and the divergence guard, on made-up statistics."""

import math

import pytest

from flashdip.engine.backends.base import Statistics
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError
from flashdip.engine.guard import Guard
from flashdip.engine.stopping import Reading, Stopping, Verdict


def reading(iteration: int, variance: float = 1.0, residual: float = 1.0) -> Reading:
    """A reading whose two variances are equal, one second an iteration."""
    return Reading(iteration, 0.1, residual, 0.1, variance, variance, float(iteration))


@pytest.mark.parametrize("rule", ["es-wmv", "es-emv"])
def test_least_variance_selects_the_valley_and_waits(rule: str) -> None:
    """The least variance after the window is selected; patience later the fit ends."""
    config = FitConfig(stop=(rule,), window=20, patience=30, iterations=500)  # type: ignore[arg-type]
    stopping, selected, reason, iteration = Stopping(config, None), [], None, 0
    while reason is None:
        iteration += 10
        variance = 0.0 if iteration < 20 else 1 + abs(iteration - 80) / 100
        select, reason = stopping(reading(iteration, variance))
        selected += [iteration] * select
    assert selected == list(range(20, 90, 10))
    assert (iteration, reason) == (110, rule)


def test_unknown_variances_do_not_count() -> None:
    """Before the window is full its variance is NaN."""
    stopping = Stopping(FitConfig(stop=("es-wmv",), window=5), None)
    assert stopping(reading(10, math.nan)) == Verdict(select=False, stop=None)
    assert stopping.watched(reading(10, math.nan)) is None
    assert stopping(reading(20, 0.5)) == Verdict(select=True, stop=None)
    assert stopping.watched(reading(20, 0.5)) == 0.5


def test_discrepancy_budget_and_fixed() -> None:
    """Each alone, and the cap under the name that fits."""
    stopping = Stopping(FitConfig(stop=("discrepancy",), iterations=50), sigma=0.1)
    assert stopping(reading(10, residual=0.11)) == Verdict(select=True, stop=None)
    assert stopping(reading(20, residual=0.1)).stop == "discrepancy"
    assert stopping(reading(50, residual=0.2)).stop == "iterations"
    assert Stopping(FitConfig(iterations=50), None)(reading(50)).stop == "fixed"
    budget = Stopping(FitConfig(stop=("fixed", "budget"), budget=15.0), None)
    assert budget(reading(10)).stop is None
    assert budget(reading(15)).stop == "budget"
    with pytest.raises(ConfigError, match="discrepancy needs the noise level"):
        Stopping(FitConfig(stop=("discrepancy",)), None)


def test_the_rule_that_ends_the_fit_selects() -> None:
    """A search selected an earlier iteration; discrepancy ends the fit at its own."""
    config = FitConfig(stop=("es-wmv", "discrepancy"), window=1)
    stopping = Stopping(config, 0.1)
    assert stopping(reading(10, 1.0)) == Verdict(select=True, stop=None)
    assert stopping(reading(20, 2.0)) == Verdict(select=False, stop=None)
    assert stopping(reading(30, 3.0, 0.1)) == Verdict(select=True, stop="discrepancy")


def test_combined_rules_select_by_the_first_search() -> None:
    """A budget beside es-emv ends the fit and leaves the selection alone."""
    config = FitConfig(stop=("es-emv", "budget"), budget=40.0, window=1)
    stopping = Stopping(config, None)
    verdicts = [stopping(reading(i, v)) for i, v in ((10, 3.0), (20, 2.0), (30, 5.0), (40, 6.0))]
    assert [v.select for v in verdicts] == [True, True, False, False]
    assert verdicts[-1].stop == "budget"


class FakeSlot:
    """A slot whose state is one number, the iteration at which it was kept."""

    def __init__(self) -> None:
        self.iteration, self.rate_scale, self.retry = 0, 1.0, 0
        self.value = self.good = 0

    def keep(self) -> None:
        self.good = self.value

    def go_back(self, iteration: int) -> None:
        self.iteration, self.value = iteration, self.good


def statistics(iteration: int, loss: float, weights: float = 1.0) -> Statistics:
    """Statistics with a loss."""
    unknown = math.nan
    return Statistics(iteration, loss, loss, unknown, unknown, unknown, unknown, weights)


def test_guard_goes_back_with_other_noise_and_half_the_rate() -> None:
    """A jump of 5 dB restores the last good state; a stretch without one restores the rate."""
    slot = FakeSlot()
    guard = Guard(slot, retries=2)  # type: ignore[arg-type]
    slot.iteration, slot.value = 10, 1
    assert guard.accept(statistics(10, 0.1))
    slot.iteration, slot.value = 20, 2
    assert not guard.accept(statistics(20, 0.4))
    assert (slot.iteration, slot.value, slot.rate_scale, slot.retry) == (10, 1, 0.5, 1)
    assert guard.accept(statistics(20, 0.3))
    assert slot.rate_scale == 0.5
    assert guard.accept(statistics(120, 0.3))
    assert (slot.rate_scale, slot.retry, guard.exhausted) == (1.0, 1, False)


def test_guard_gives_up() -> None:
    """NaN again and again: as many retries as allowed, then the fit is over."""
    slot = FakeSlot()
    guard = Guard(slot, retries=2)  # type: ignore[arg-type]
    exhausted = []
    for loss, weights in ((math.nan, 1.0), (0.1, math.nan), (0.1, math.inf)):
        assert not guard.accept(statistics(10, loss, weights))
        exhausted.append(guard.exhausted)
    assert exhausted == [False, False, True]
    assert (slot.iteration, guard.total) == (0, 2)
