"""Many fits: some of them side by side in one step; where one ends the next problem begins."""

import bisect
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashdip.engine import ensemble
from flashdip.engine.backends import TRITON, plans
from flashdip.engine.backends.base import DTYPES, Slot
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, DivergedError, ShapeError
from flashdip.engine.events import Event
from flashdip.engine.fit import Place, check, outcome
from flashdip.engine.operators import Downsample, Each, Identity, Linear, Mask
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result
from flashdip.engine.run import Run, iterate
from flashdip.engine.stopping import Stopping

if TYPE_CHECKING:
    from flashdip.kernels.fused.tiles import Architecture

MOST = 16  # fits side by side, unless asked for: more fill a GPU no better
State = dict[str, dict[str, Tensor]]  # see `Slot.state`
SHARE = 0.9  # of a GPU's free memory, for all that torch needs beside


@dataclass(frozen=True, eq=False)
class _Task:
    """A problem in line, and its place in it."""

    index: int
    given: Problem
    problem: Problem  # the same, with an operator of the line's kind
    config: FitConfig  # of a single run, with the task's own seed
    truth: Tensor | None
    run: int


@dataclass(frozen=True, eq=False)
class _Seated:
    """A task that is being fitted."""

    task: _Task
    run: Run
    setup: float  # seconds before its first iteration


def fit_many(
    problems: Sequence[Problem],
    config: FitConfig,
    *,
    at_once: int | None = None,
    seeds: Sequence[int] | None = None,
    truths: Sequence[Tensor | None] | None = None,
    backend: str = "auto",
    device: str = "auto",
    callback: Callable[[int, Event], None] | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    notes: Sequence[str] = (),
) -> Iterator[tuple[int, Result]]:
    """Fit a network to each of many problems, several at once.

    Each fit has its own weights, statistics, seed, stopping and divergence guard, and ends as it
    would by itself, but for rounding. When one ends, the next problem takes its slot: no kernel is
    compiled and no graph captured for it. Slots for which no problem is left run on idly until the
    last fit has ended.

    Of several runs the result is the mean, as of `fit`; each takes a slot of its own.

    A fit whose numbers do not fit into 16 bits is done in float32, by itself, when all others are
    done.

    Seconds are those of the clock, for budgets too: a fit shares them with its neighbours, and with
    whoever looks at a result before asking for the next one.

    Args:
        problems: Single fits (F = 1) of one image shape and one shape of observations; operators
            may differ. Identities and masks, or one downsampling for all, are compared within the
            Triton kernels; with another operator among them, all are compared by torch.
        config: How; the network's outputs are set to the images' channels.
        at_once: Fits side by side. None: on a GPU, with the Triton kernels, as many as its free
            memory holds, at most 16; elsewhere, where they would only share the time, one.
        seeds: Of each problem; None: the config's for all.
        truths: The undamaged images, [C, H, W] each, or None; only to report the PSNR.
        backend: "auto", or the name of one.
        device: "auto", "cpu", "cuda", "cuda:1", "mps", "xpu".
        callback: Receives the index of a problem and its event, as of `fit`; of several runs, the
            first one's.
        interrupted: Asked after each iteration, or after ten where they take no time; when it
            returns True the running fits end with their best images so far, and the others do not
            begin.
        notes: Lines that a person should see with the start of each fit and in its record.

    Returns:
        An iterator over (index of the problem, its result), in the order in which they end. What it
        is not asked for is not fitted.

    Raises:
        InputError: Problems, config, seeds and truths do not go together.
        UnavailableError: The backend or device cannot be used here.
        DivergedError: Some fits diverged before they had any image; raised once all others are
            done.
    """
    if at_once is not None and at_once < 1:
        raise ConfigError(f"at_once: expected a whole number of at least 1, got {at_once}")
    tasks = _tasks(problems, config, seeds, truths)
    if not tasks:
        return iter(())
    place = Place.choose(tasks[0].problem, tasks[0].config, backend, device, notes)
    count = min(len(tasks), _at_once(place, tasks[0].problem.shape) if at_once is None else at_once)
    tell = callback or (lambda index, event: None)
    lost: list[int] = []
    results = _results(tasks, place, count, tell, interrupted, lost)
    return _told(results if config.runs == 1 else _means(tasks, config, results, lost), lost)


def fits_in_memory(
    config: FitConfig,
    shape: tuple[int, int, int],
    free_bytes: int,
    precision: str,
    architecture: str = "sm_90",
) -> int:
    """Return how many fits the Triton kernels can run side by side in so much memory.

    From the plan of the launches, without a GPU; see `flashdip.engine.backends.plans.memory`.

    Args:
        config: How they are fitted.
        shape: Of an image: channels, height, width.
        free_bytes: Free on the device.
        precision: "fp16", "bf16" or "fp32".
        architecture: Of the GPU; see `flashdip.kernels.fused.tiles.ARCHITECTURES`.

    Returns:
        The number of fits; 0 if there is not memory for one.
    """
    from flashdip.kernels.fused.tiles import ARCHITECTURES

    return _fitting(config, shape, free_bytes, precision, ARCHITECTURES[architecture])


def _fitting(
    config: FitConfig,
    shape: tuple[int, int, int],
    free_bytes: int,
    precision: str,
    architecture: "Architecture",
) -> int:
    def need(fits: int) -> int:
        return plans.memory(config, shape, DTYPES[precision], architecture, fits)

    # Two fits never need less than one and a half times the memory of one.
    return bisect.bisect_right(range(1, 2 * free_bytes // need(1) + 1), free_bytes, key=need)


def _at_once(place: Place, shape: tuple[int, int, int]) -> int:
    if place.backend is not TRITON or place.device.type != "cuda":
        return 1
    free = int(SHARE * torch.cuda.mem_get_info(place.device)[0])
    own = plans.architecture(place.device)
    return max(1, min(MOST, _fitting(place.config, shape, free, place.precision, own)))


def _tasks(
    problems: Sequence[Problem],
    config: FitConfig,
    seeds: Sequence[int] | None,
    truths: Sequence[Tensor | None] | None,
) -> list[_Task]:
    """Check everything before anything is fitted."""
    for name, given in (("seeds", seeds), ("truths", truths)):
        if given is not None and len(given) != len(problems):
            raise ConfigError(
                f"{name}: expected one for each of the {len(problems)} problems, got {len(given)}"
            )
    tasks = []
    for index, problem in enumerate(_alike(problems)):
        truth = None if truths is None else truths[index]
        check(problem, truth)
        first = problems[0]
        for name, expected, found in (
            ("image", first.shape, problem.shape),
            ("observation", first.observation.shape, problem.observation.shape),
        ):
            if tuple(expected) != tuple(found):
                raise ShapeError(
                    f"problem {index}: expected the first one's shape of the {name}, "
                    f"{tuple(expected)}, got {tuple(found)}; fit the others by themselves"
                )
        seed = config.seed if seeds is None else seeds[index]
        outputs = dataclasses.replace(config.network, outputs=problem.shape[0])
        budget = None if config.budget is None else config.budget / config.runs
        for run in range(config.runs):
            own = dataclasses.replace(
                config, seed=seed + run, network=outputs, runs=1, budget=budget
            )
            Stopping(own, problem.sigma)
            tasks.append(_Task(index, problems[index], problem, own, truth, run))
    return tasks


def _alike(problems: Sequence[Problem]) -> list[Problem]:
    """Return the problems with operators of one kind, which one plan of launches serves."""
    kinds = {_kind(problem.operator) for problem in problems}
    if len(kinds) == 1:
        return list(problems)

    def alike(problem: Problem) -> Problem:
        operator = problem.operator
        if kinds == {Identity, Mask}:
            operator = Mask(torch.ones(1, 1)) if isinstance(operator, Identity) else operator
        elif isinstance(operator, Identity | Mask | Downsample):
            operator = Linear(operator, operator.adjoint)
        return dataclasses.replace(problem, operator=operator)

    return [alike(problem) for problem in problems]


def _kind(operator: object) -> object:
    """Return what operators share that one plan of launches serves."""
    if isinstance(operator, Downsample):
        return Downsample, operator.kernel, operator.factor
    return type(operator)


def _side_by_side(tasks: Sequence[_Task]) -> Problem:
    """Return one problem of as many fits."""
    return Problem(
        torch.cat([task.problem.observation for task in tasks]),
        tasks[0].problem.shape,
        Each([task.problem.operator for task in tasks]),
    )


def _results(
    tasks: list[_Task],
    place: Place,
    count: int,
    tell: Callable[[int, Event], None],
    interrupted: Callable[[], bool],
    lost: list[int],
) -> Iterator[tuple[int, Result]]:
    """Fit all tasks; the index of each that has no image is added to `lost`."""
    begun = time.perf_counter()
    waiting = iter(tasks)
    overflowed: list[tuple[_Seated, State]] = []
    step = place.prepare(_side_by_side(tasks[:count]), None)
    place = dataclasses.replace(place, notes=(*place.notes, *step.notes))
    wider = place.wider()

    def seat(slot: Slot, task: _Task, begun: float) -> _Seated:
        slot.replace(task.problem, task.config.seed, task.truth)

        def own(event: Event) -> None:
            if task.run == 0:
                tell(task.index, event)

        run = Run(slot, task.config, task.problem.sigma, place.precision, own)
        own(place.started(0))
        setup = time.perf_counter() - begun
        run.start()
        return _Seated(task, run, setup)

    def result(fit: _Seated, place: Place) -> Iterator[tuple[int, Result]]:
        """Yield the result of a run that is over, if it has one."""
        task = fit.task
        try:
            found = outcome(fit.run, task.given, task.truth, place, fit.setup)
        except DivergedError:
            lost.append(task.index)
        else:
            yield task.index, found

    pairs = zip(step.slots, islice(waiting, count), strict=True)
    seated = {index: seat(slot, task, begun) for index, (slot, task) in enumerate(pairs)}
    stopped = False
    while seated:
        with place.memory():
            stopped = iterate(step, {i: fit.run for i, fit in seated.items()}, interrupted)
        for index, fit in list(seated.items()):
            if fit.run.reason is None:
                continue
            begun = time.perf_counter()
            put_off = wider is not None and fit.run.overflowed
            if put_off:
                overflowed.append((fit, fit.run.slot.state()))
            ended = [] if put_off else list(result(fit, place))
            following = None if stopped else next(waiting, None)
            if following is None:
                del seated[index]
            else:
                seated[index] = seat(step.slots[index], following, begun)
            yield from ended
    del step
    for fit, state in overflowed:
        assert wider is not None
        task = fit.task
        alone = dataclasses.replace(wider, config=task.config)
        step = alone.prepare(task.problem, None if task.truth is None else task.truth[None])
        fit.run.widen(step.slots[0], state, alone.precision)
        if stopped:
            fit.run.reason = "interrupted"
        with place.memory():
            stopped = iterate(step, {0: fit.run}, interrupted) or stopped
        yield from result(fit, alone)


def _told(results: Iterator[tuple[int, Result]], lost: list[int]) -> Iterator[tuple[int, Result]]:
    """Yield all results, then say for which problems there was none."""
    yield from results
    if lost:
        raise DivergedError(
            f"fits of the problems {', '.join(map(str, lost))}: expected a finite loss that falls, "
            "got another one before the first image, retries included; lower the learning rate "
            "(--set learning_rate=0.001)"
        )


def _means(
    tasks: Sequence[_Task],
    config: FitConfig,
    results: Iterator[tuple[int, Result]],
    lost: list[int],
) -> Iterator[tuple[int, Result]]:
    """Yield the mean of each problem's runs that have an image, once all have ended.

    Args:
        tasks: All runs of all problems.
        config: Of all of them.
        results: Of the runs.
        lost: Problems whose runs diverged, an entry for each run; in the end, those without a mean.
    """
    first = {task.index: task for task in tasks if task.run == 0}
    ended: dict[int, list[Result]] = {}

    def mean(index: int) -> tuple[int, Result]:
        task, runs = first.pop(index), sorted(ended[index], key=lambda run: run.record["seed"])
        own = dataclasses.replace(config, seed=task.config.seed)
        less = config.runs - len(runs)
        notes = [f"{less} of {config.runs} runs have no image and are left out"] if less else []
        found = ensemble.mean(runs, own, task.truth, notes)
        if less > lost.count(index):  # the others did not begin
            record = found.record | {"stop_reason": "interrupted"}
            found = dataclasses.replace(found, record=record)
        return index, found

    for index, result in results:
        ended.setdefault(index, []).append(result)
        if len(ended[index]) == config.runs:
            yield mean(index)
    yield from [mean(index) for index in ended if index in first]
    lost[:] = [index for index in dict.fromkeys(lost) if index in first]
