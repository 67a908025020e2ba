"""Several runs of one fit: their mean, their spread, and what happens when some do not end well."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashdip.engine.config import FitConfig
from flashdip.engine.ensemble import fit_runs
from flashdip.engine.errors import DivergedError
from flashdip.engine.events import Callback, Event, Finished, Noted, Progress, Started
from flashdip.engine.fit import fit
from flashdip.engine.metrics import psnr
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.problems import Problem
from flashdip.engine.result import UNCERTAINTY, Result

THREE = FitConfig(
    network=SkipConfig(inputs=4, down=(8, 8), skip=2, upsample="nearest"),
    iterations=20,
    read_every=5,
    precision="fp32",
    seed=7,
    runs=3,
)


@pytest.fixture
def problem() -> Problem:
    """A few random pixels."""
    return Problem(
        torch.rand(1, 3, 17, 16, generator=torch.Generator().manual_seed(0)), (3, 17, 16)
    )


def singles(problem: Problem) -> list[Result]:
    """The runs by themselves."""
    return [
        fit(problem, replace(THREE, runs=1, seed=THREE.seed + run), device="cpu")
        for run in range(3)
    ]


def interrupting(after: int) -> tuple[Callable[[], bool], list[int]]:
    """An `interrupted` that says yes from a number of calls on, and its calls."""
    calls: list[int] = []

    def interrupted() -> bool:
        calls.append(len(calls))
        return len(calls) >= after

    return interrupted, calls


def test_the_mean_and_the_spread_of_runs_with_seeds_in_a_row(problem: Problem) -> None:
    """And the record tells of all of them."""
    truth = torch.full((3, 17, 16), 0.5)
    found = fit(problem, THREE, device="cpu", truth=truth)
    alone = torch.stack([result.image for result in singles(problem)])
    assert torch.equal(found.image, alone.mean(0))
    assert found.uncertainty is not None
    assert torch.equal(found.uncertainty, alone.std(0, correction=0))
    assert found.uncertainty.min() >= 0 < found.uncertainty.max()
    assert found.psnr == psnr(found.image, truth)
    assert [run["seed"] for run in found.record["runs"]] == [7, 8, 9]
    assert (found.iterations, found.record["config"]["runs"], found.record["seed"]) == (60, 3, 7)
    # A residual of the mean is the mean of residuals.
    expected = problem.observation[0] - found.image
    torch.testing.assert_close(found.measurement["residual"], expected, rtol=0, atol=1e-6)


def test_a_saved_result_has_a_map_of_its_uncertainty(problem: Problem, tmp_path: Path) -> None:
    """As a float TIFF for people, and exactly for `load`; a single run has none."""
    found = fit(problem, THREE, device="cpu")
    found.save(tmp_path / "three")
    again = Result.load(tmp_path / "three")
    assert found.uncertainty is not None and again.uncertainty is not None
    assert torch.equal(again.uncertainty, found.uncertainty)
    from tifffile import imread

    shown = torch.from_numpy(imread(tmp_path / "three" / UNCERTAINTY)).movedim(-1, 0)
    assert torch.equal(shown, found.uncertainty)
    fit(problem, replace(THREE, runs=1), device="cpu").save(tmp_path / "one")
    assert not (tmp_path / "one" / UNCERTAINTY).exists()
    assert Result.load(tmp_path / "one").uncertainty is None


def test_events_are_those_of_one_long_fit(problem: Problem) -> None:
    """One start, one end, iterations that rise to the sum."""
    events: list[Event] = []
    fit(problem, THREE, device="cpu", callback=events.append)
    started = [event for event in events if isinstance(event, Started)]
    assert [(event.iteration, event.iterations) for event in started] == [(0, 60)]
    at = [event.iteration for event in events if isinstance(event, Progress)]
    assert at == list(range(5, 61, 5))
    assert isinstance(events[-1], Finished)
    assert events[-1].iterations == 60
    assert [event.runs for event in events if isinstance(event, Finished)] == [3]


def test_an_interrupted_run_is_left_out_unless_it_is_the_only_one(problem: Problem) -> None:
    """What there is by then is the mean."""
    first, second, _ = singles(problem)
    interrupted, _ = interrupting(47)
    found = fit(problem, THREE, device="cpu", interrupted=interrupted)
    assert torch.equal(found.image, (first.image + second.image) / 2)
    assert (found.stop_reason, len(found.record["runs"])) == ("interrupted", 2)
    assert "run 3 was interrupted and is left out" in found.record["notes"]
    interrupted, _ = interrupting(11)
    found = fit(problem, THREE, device="cpu", interrupted=interrupted)
    assert (found.stop_reason, found.iterations) == ("interrupted", 11)


def test_runs_go_on_from_their_checkpoints(problem: Problem, tmp_path: Path) -> None:
    """To the same bits; runs that were done are not done again."""
    file = tmp_path / "state"
    interrupted, _ = interrupting(47)
    fit(problem, THREE, device="cpu", checkpoint=file, interrupted=interrupted)
    never, calls = interrupting(10**9)
    found = fit(problem, THREE, device="cpu", checkpoint=file, interrupted=never)
    assert torch.equal(found.image, fit(problem, THREE, device="cpu").image)
    assert len(calls) == 13
    assert found.stop_reason == "fixed"


def test_a_run_that_diverges_is_left_out_and_told(problem: Problem) -> None:
    """Only if all do is there no image."""
    events: list[Event] = []
    lost = {8}

    def once(
        config: FitConfig,
        *,
        callback: Callback,
        checkpoint: Path | None,
        interrupted: Callable[[], bool],
    ) -> Result:
        if config.seed in lost:
            raise DivergedError("fit: lost")
        return fit(problem, config, device="cpu", callback=callback, interrupted=interrupted)

    def runs() -> Result:
        return fit_runs(once, THREE, None, events.append, None, lambda: False)

    found = runs()
    first, _, third = singles(problem)
    assert torch.equal(found.image, (first.image + third.image) / 2)
    assert Noted("run 2 of 3 is left out: fit: lost") in events
    assert "run 2 of 3 is left out: fit: lost" in found.record["notes"]
    lost |= {7, 9}
    with pytest.raises(DivergedError, match="run 1 of 3"):
        runs()
