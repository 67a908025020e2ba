"""Many fits: each as if it were alone, in slots that the next problem takes over."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashdip.engine.backends.eager import EagerBackend, EagerStep
from flashdip.engine.config import FitConfig, Precision
from flashdip.engine.errors import ConfigError, DivergedError, ShapeError
from flashdip.engine.events import Event, Finished, Progress, Retried, Started
from flashdip.engine.fit import fit
from flashdip.engine.fit_many import fit_many
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.operators import Each, Mask
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result
from flashdip.kernels import native

SHAPE = (3, 21, 18)
TINY = FitConfig(
    network=SkipConfig(inputs=4, down=(8, 8), skip=2, upsample="nearest"),
    iterations=30,
    read_every=5,
    precision="fp32",
)


def image(seed: int) -> Tensor:
    """A few random pixels, [1, C, H, W]."""
    return torch.rand(1, *SHAPE, generator=torch.Generator().manual_seed(seed))


def problems(count: int, sigma: float | None = None) -> list[Problem]:
    """Other pixels each."""
    return [Problem(image(seed), SHAPE, sigma=sigma) for seed in range(count)]


def agree(found: Result, alone: Result) -> None:
    """Assert that two fits took the same course, and came to the same image and network."""
    for name in ("iterations", "best_iteration", "stop_reason", "retries", "seed", "config"):
        assert found.record[name] == alone.record[name]
    for name, values in alone.record["history"].items():
        same = zip(found.record["history"][name], values, strict=True)
        assert all(a == b or a == pytest.approx(b, rel=1e-3) for a, b in same)
    torch.testing.assert_close(found.image, alone.image, rtol=0, atol=1e-3)
    assert found.weights.keys() == alone.weights.keys()
    assert found.measurement.keys() == alone.measurement.keys()
    for name, measured in alone.measurement.items():
        torch.testing.assert_close(found.measurement[name], measured, rtol=0, atol=1e-3)
    for name, weight in alone.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("backend", "precision"), [("native", "fp32"), ("reference", "fp64")])
def test_each_fit_is_as_if_alone(
    backend: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five problems in two slots, ending when they like: prepared once, the results of `fit`."""
    prepared = []
    prepare = EagerBackend.prepare

    def counted(*arguments: Any) -> EagerStep:
        prepared.append(arguments)
        return prepare(*arguments)

    config = replace(TINY, precision=precision, window=4, patience=10, read_every=2)
    config = replace(config, stop=("es-wmv", "es-emv"))
    seeds, truths = [0, 0, 7, 1, 2], [image(seed)[0] for seed in range(5)]
    each: dict[str, Any] = {"backend": backend, "device": "cpu"}
    alone = [
        fit(problem, replace(config, seed=seed), truth=truth, **each)
        for problem, seed, truth in zip(problems(5), seeds, truths, strict=True)
    ]
    assert len({result.iterations for result in alone}) > 1
    monkeypatch.setattr(EagerBackend, "prepare", counted)
    results = dict(fit_many(problems(5), config, at_once=2, seeds=seeds, truths=truths, **each))
    assert len(prepared) == 1
    assert sorted(results) == list(range(5))
    for index, result in results.items():
        agree(result, alone[index])


def test_slots_out_of_step_are_read_when_due() -> None:
    """A number of iterations that no reading falls on: neighbours are read at other times."""
    config = replace(TINY, iterations=7)
    ending = replace(problems(1)[0], sigma=100.0)
    line = [replace(problem, sigma=0.01) for problem in problems(3)] + [ending]
    config = replace(config, stop=("discrepancy",))
    results = dict(fit_many(line, config, at_once=2, device="cpu"))
    assert [results[index].iterations for index in range(4)] == [7, 7, 7, 5]
    for index, problem in enumerate(line):
        agree(results[index], fit(problem, config, device="cpu"))


def test_problems_share_the_seed_unless_they_are_given_their_own() -> None:
    """The same problem twice: the same image; with another seed, another one."""
    twice = problems(1) * 2
    same = dict(fit_many(twice, TINY, at_once=2, device="cpu"))
    torch.testing.assert_close(same[0].image, same[1].image)
    other = dict(fit_many(twice, TINY, at_once=2, device="cpu", seeds=[0, 1]))
    assert not torch.allclose(other[0].image, other[1].image, atol=1e-3)
    assert [other[index].record["seed"] for index in (0, 1)] == [0, 1]


def test_each_problem_has_its_own_operator() -> None:
    """Masks, nothing, and a factor in one line; known pixels are pasted, residuals are its own."""
    known = [(image(10 + index) > 0.4).float() for index in range(2)]
    line = [
        Problem(m * image(index), SHAPE, Mask(m), 0.1, measured=m, known=m)
        for index, m in enumerate(known)
    ]
    line += [Problem(image(2), SHAPE, sigma=0.1)]
    config = replace(TINY, iterations=10, add_back=0.25)
    for chosen in (line, [*line, Problem(2 * image(3), SHAPE, lambda x: 2 * x, 0.2)]):
        results = dict(fit_many(chosen, config, at_once=2, device="cpu"))
        for index, problem in enumerate(chosen):
            agree(results[index], fit(problem, config, device="cpu"))


def exploding(after: int, times: float) -> Callable[[Tensor], Tensor]:
    """An operator that returns NaN for some calls: a fit that goes bad."""
    calls = itertools.count()

    def operator(image: Tensor) -> Tensor:
        bad = image.requires_grad and after < next(calls) <= after + times
        return image * float("nan") if bad else image

    return operator


def test_a_diverging_fit_leaves_its_neighbours_alone() -> None:
    """It goes back by itself; one that never gets anywhere is reported when all others are done."""

    def line() -> list[Problem]:
        first, second, third = problems(3)
        return [
            first,
            replace(second, operator=exploding(12, 2)),
            replace(third, operator=exploding(0, float("inf"))),
            first,
        ]

    found: dict[int, Result] = {}
    events: list[tuple[int, Event]] = []
    with pytest.raises(DivergedError, match="fits of the problems 2: expected a finite loss"):
        for index, result in fit_many(
            line(), TINY, at_once=2, device="cpu", callback=lambda *event: events.append(event)
        ):
            found[index] = result
    assert found.keys() == {0, 1, 3}
    for index in found:
        agree(found[index], fit(line()[index], TINY, device="cpu"))
    assert {index for index, event in events if isinstance(event, Retried)} == {1, 2}


def test_events_tell_the_story_of_each() -> None:
    """Started, Progress, Finished; a fit begins when another has ended."""
    events: list[tuple[int, Event]] = []
    order = [
        index
        for index, _ in fit_many(
            problems(3), TINY, at_once=2, device="cpu", callback=lambda *event: events.append(event)
        )
    ]
    assert order == [0, 1, 2]
    for index in order:
        own = [event for at, event in events if at == index]
        assert isinstance(own[0], Started)
        assert isinstance(own[-1], Finished)
        assert [e.iteration for e in own if isinstance(e, Progress)] == [5, 10, 15, 20, 25, 30]
    kinds = [(index, type(event)) for index, event in events if not isinstance(event, Progress)]
    assert kinds.index((2, Started)) > kinds.index((0, Finished))


def test_interrupted() -> None:
    """The running ones end with what they have; the others do not begin."""
    left = itertools.count(1)
    results = dict(
        fit_many(problems(4), TINY, at_once=2, device="cpu", interrupted=lambda: next(left) >= 33)
    )
    assert {index: result.iterations for index, result in results.items()} == {
        0: 30,
        1: 30,
        2: 3,
        3: 3,
    }
    assert {results[index].stop_reason for index in (2, 3)} == {"interrupted"}


def test_runs_of_each_problem_are_averaged() -> None:
    """As if it were alone, whichever ends first, with the first run's events."""
    three, events = replace(TINY, runs=3, stop=("es-wmv",), window=5, patience=5), list[Event]()
    found = dict(
        fit_many(
            problems(2),
            three,
            at_once=2,
            seeds=[5, 9],
            truths=[image(7)[0], image(8)[0]],
            device="cpu",
            callback=lambda index, event: events.append(event) if index == 0 else None,
        )
    )
    for index, seed in enumerate((5, 9)):
        own = replace(three, seed=seed)
        alone = fit(problems(2)[index], own, device="cpu", truth=image(7 + index)[0])
        agree(found[index], alone)
        for one, other in zip(found[index].record["runs"], alone.record["runs"], strict=True):
            assert one["psnr"] == pytest.approx(other["psnr"], rel=1e-3)
            for name in ("seed", "iterations", "best_iteration", "stop_reason"):
                assert one[name] == other[name]
        assert found[index].psnr == pytest.approx(alone.psnr, rel=1e-3)
        assert found[index].uncertainty is not None and alone.uncertainty is not None
        torch.testing.assert_close(found[index].uncertainty, alone.uncertainty, rtol=0, atol=1e-3)
    assert [type(event) for event in events if not isinstance(event, Progress)] == [
        Started,
        Finished,
    ]


def test_runs_without_an_image_are_left_out_of_the_mean() -> None:
    """Interrupted: what has not begun is not missed; diverged: all others are done first."""
    left = itertools.count(1)
    two = replace(TINY, runs=2)
    found = dict(
        fit_many(problems(2), two, at_once=3, device="cpu", interrupted=lambda: next(left) >= 20)
    )
    assert {index: result.stop_reason for index, result in found.items()} == {
        0: "interrupted",
        1: "interrupted",
    }
    assert [len(found[index].record["runs"]) for index in (0, 1)] == [2, 1]
    assert "1 of 2 runs have no image and are left out" in found[1].record["notes"]

    first, second = problems(2)
    line = [replace(first, operator=exploding(0, float("inf"))), second]
    found = {}
    with pytest.raises(DivergedError, match="fits of the problems 0: expected a finite loss"):
        for index, result in fit_many(line, two, at_once=2, device="cpu"):
            found[index] = result
    assert found.keys() == {1}
    agree(found[1], fit(second, two, device="cpu"))

    # A problem is not lost that has one run's image.
    line = [replace(first, operator=exploding(0, 4)), second]
    found = dict(fit_many(line, replace(two, retries=0), at_once=1, device="cpu"))
    assert found.keys() == {0, 1}
    assert "1 of 2 runs have no image and are left out" in found[0].record["notes"]
    assert (found[0].stop_reason, len(found[0].record["runs"])) == ("fixed", 1)


def test_a_slot_changes_hands_in_place() -> None:
    """Another problem, the same memory; and its neighbour does not notice."""
    config = replace(TINY, stop=("es-wmv", "es-emv"), window=3)

    def step_of(first: Sequence[Problem]) -> EagerStep:
        observation = torch.cat([problem.observation for problem in first])
        together = Problem(observation, SHAPE, Each([problem.operator for problem in first]))
        return EagerStep(native, together, config, torch.device("cpu"), torch.float32, None)

    def places(step: EagerStep) -> list[int]:
        watch = step.watch
        tensors = (step.z, step.parameters, *step.moments, watch.observation, watch.average)
        return [tensor.data_ptr() for tensor in (*tensors, watch.window, watch.measured)]

    other = replace(problems(3)[2], sigma=0.1)
    step, fresh = step_of(problems(2)), step_of([problems(2)[0], other])
    for _ in range(4):
        step()
    before, neighbour = places(step), step.slots[0].good_state()
    step.slots[1].replace(other, config.seed + 1, image(2)[0])
    fresh.slots[1].replace(other, config.seed + 1, image(2)[0])
    assert places(step) == before
    for name, tensor in step.slots[0].good_state().items():
        assert torch.equal(tensor, neighbour[name])
    for _ in range(4):
        step()
        fresh()
    assert [slot.iteration for slot in step.slots] == [8, 4]
    for name, tensor in step.slots[1].good_state().items():
        assert torch.equal(tensor, fresh.slots[1].good_state()[name])
    assert step.read()[1] == fresh.read()[1]


def test_bad_lines_are_refused() -> None:
    """Before anything is fitted, not when the first result is asked for."""
    assert list(fit_many([], TINY)) == []
    other = Problem(torch.zeros(1, 3, 16, 18), (3, 16, 18))
    with pytest.raises(ShapeError, match=r"problem 2: .* shape of the image, \(3, 21, 18\), got"):
        fit_many([*problems(2), other], TINY)
    half = Problem(torch.zeros(1, 3, 21, 9), SHAPE, lambda x: x[..., ::2])
    with pytest.raises(ShapeError, match=r"problem 1: .* shape of the observation"):
        fit_many([*problems(1), half], TINY)
    with pytest.raises(ShapeError, match="expected a single fit"):
        fit_many([Problem(torch.zeros(2, *SHAPE), SHAPE)], TINY)
    with pytest.raises(ConfigError, match="seeds: expected one for each of the 2 problems, got 1"):
        fit_many(problems(2), TINY, seeds=[1])
    with pytest.raises(ShapeError, match="truth: expected the restored image's shape"):
        fit_many(problems(1), TINY, truths=[torch.zeros(1, 2, 3)])
    with pytest.raises(ConfigError, match="the rule discrepancy needs the noise level"):
        fit_many([*problems(1, 0.1), *problems(1)], replace(TINY, stop=("discrepancy",)))
    with pytest.raises(ConfigError, match="at_once: expected a whole number of at least 1, got 0"):
        fit_many(problems(1), TINY, at_once=0)
