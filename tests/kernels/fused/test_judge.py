"""Readings taken and judged on the device, against the statistics, guard and rules of the host."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashdip.engine.backends.base import Statistics
from flashdip.engine.backends.observe import Observer
from flashdip.engine.config import FitConfig, StopRule
from flashdip.engine.guard import CAREFUL, JUMP, Guard
from flashdip.engine.operators import Downsample, Mask
from flashdip.engine.problems import Problem
from flashdip.engine.stopping import Reading, Stopping
from flashdip.kernels import noise
from flashdip.kernels.fused.judge import BOARD, BOOKS, Rules
from flashdip.kernels.fused.memory import Memory
from flashdip.kernels.fused.program import Images
from flashdip.kernels.fused.reading import TRAINED, plan_reading
from flashdip.kernels.fused.reading import Reading as Planned

CPU = torch.device("cpu")


def rules_of(config: FitConfig) -> Rules:
    """What a config asks for."""
    discrepancy = config.discrepancy if "discrepancy" in config.stop else None
    return Rules(
        config.read_every,
        config.iterations,
        config.retries,
        JUMP,
        CAREFUL,
        discrepancy,
        config.window,
        config.patience,
    )


class Case:
    """F fits, of which the test says what their outputs and losses are."""

    def __init__(self, config: FitConfig, problem: Problem, truth: Tensor | None = None) -> None:
        self.config, fits = config, problem.fits
        self.watch = watch = Observer(problem, config, CPU, torch.float32, truth)
        windowed, moving = "es-wmv" in config.stop, "es-emv" in config.stop
        operator = problem.operator
        mask = operator(torch.ones_like(watch.output)) if isinstance(operator, Mask) else None
        smaller = operator if isinstance(operator, Downsample) else None
        sigma = math.nan if problem.sigma is None else problem.sigma
        images = Images(
            output=watch.output,
            average=watch.average,
            loss=watch.loss,
            target=watch.observation,
            mask=mask,
            downsample=None if smaller is None else (smaller.kernel, smaller.factor),
            window=watch.window if windowed else None,
            moving_mean=watch.moving_mean if moving else None,
            moving_variance=watch.moving_variance if moving else None,
            measured=watch.measured,
            truth=watch.truth,
            sigma=torch.full((fits,), sigma),
            clipped=torch.full((fits,), int(problem.clipped), dtype=torch.int32),
        )
        self.trained = {name: torch.zeros(fits, 1500) for name in TRAINED}
        self.copies = torch.zeros(fits, 1500, dtype=torch.float16)
        self.counters = torch.zeros(fits, dtype=torch.int32)
        self.keys, self.scale = torch.zeros(fits, dtype=torch.int64), torch.ones(fits)
        counted = self.counters, self.keys, self.scale
        memory = Memory(CPU)
        rules = rules_of(config)
        self.planned: Planned = plan_reading(
            images, self.trained, self.copies, counted, rules, config.average, memory
        )
        books = dict.fromkeys(BOOKS, 0.0) | dict.fromkeys(("loss", "windowed", "moving"), math.inf)
        self.planned.state.books.copy_(torch.tensor(list(books.values())))
        self.planned.state.prefixes.copy_(torch.tensor([noise.prefix(f) for f in range(fits)]))

    def read(self) -> list[dict[str, float]]:
        """Run the launches; return the board."""
        for launch in self.planned.launches:
            launch()
        rows = self.planned.state.board.tolist()
        return [dict(zip(BOARD, row, strict=True)) for row in rows]

    def books(self, fit: int) -> dict[str, float]:
        """What is remembered of a fit."""
        return dict(zip(BOOKS, self.planned.state.books[fit].tolist(), strict=True))


def random(*shape: int, seed: int) -> Tensor:
    """Numbers between 0 and 1.2."""
    return 1.2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def problems() -> dict[str, tuple[Problem, FitConfig]]:
    """Operators, noise with and without clipping, everything watched or nothing."""
    image = random(2, 3, 31, 26, seed=1)
    seen = (random(2, 1, 31, 26, seed=2) > 0.5).float()
    both: tuple[StopRule, ...] = ("es-wmv", "es-emv")
    masked = Problem(seen * image, (3, 31, 26), Mask(seen), 0.1, measured=seen)
    clipped = Problem(image.clamp(0, 1), (3, 31, 26), sigma=0.2)
    small = Downsample(2)(random(2, 3, 32, 26, seed=4))
    downsampled = Problem(small, (3, 32, 26), Downsample(2), 0.1)
    config = FitConfig(window=3, read_every=1)
    return {
        "masked": (masked, FitConfig(window=3, read_every=1, stop=both)),
        "clipped": (clipped, FitConfig(window=13, read_every=1, average=None, stop=("es-wmv",))),
        "downsampled": (downsampled, config),
        "unknown": (Problem(image, (3, 31, 26)), config),
    }


@pytest.mark.parametrize("name", problems())
def test_statistics_are_those_of_the_host(name: str) -> None:
    """Each field, after so many iterations that the window is full, and before; two fits."""
    problem, config = problems()[name]
    truth = None if name == "unknown" else random(2, *problem.shape, seed=7)
    case = Case(config, problem, truth)
    plain = Observer(problem, config, CPU, torch.float32, truth)
    for iteration in range(1, config.window + 2):
        output = random(2, *problem.shape, seed=10 + iteration)
        loss = random(2, seed=iteration)
        plain.update(output, loss, [iteration] * 2)
        for into, of in (("output", output), ("loss", loss), ("average", plain.average)):
            getattr(case.watch, into).copy_(of)
        case.watch.window.copy_(plain.window)
        case.watch.moving_variance.copy_(plain.moving_variance)
        case.counters.fill_(iteration)
        case.trained["parameters"].copy_(random(2, 1500, seed=iteration))
        case.planned.state.books[:, BOOKS.index("loss")] = math.inf
        exact = plain.read([iteration] * 2, case.trained["parameters"])
        for row, expected in zip(case.read(), exact, strict=True):
            found = Statistics(int(row["iteration"]), *[row[f] for f in Statistics._fields[1:]])
            assert found == pytest.approx(expected, rel=2e-5, nan_ok=True)
    assert not any(
        tensor.any()
        for launch in case.planned.launches
        for key, tensor in launch.arguments.items()
        if key == "arrived_ptr" and isinstance(tensor, Tensor)
    )


class HostSlot:
    """A slot on the host, with states of its own."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.good = {name: tensor.clone() for name, tensor in state.items()}
        self.best: dict[str, Tensor] = {}
        self.iteration, self.rate_scale, self.retry = 0, 1.0, 0

    def keep(self) -> None:
        for name, tensor in self.state.items():
            self.good[name].copy_(tensor)

    def go_back(self, iteration: int) -> None:
        self.iteration = iteration
        for name, tensor in self.state.items():
            tensor.copy_(self.good[name])


@pytest.mark.parametrize(
    "stop",
    [("fixed",), ("es-wmv",), ("es-emv", "discrepancy"), ("es-wmv", "es-emv")],
    ids="+".join,
)
@pytest.mark.parametrize("seed", range(2))
def test_decisions_are_those_of_the_host(stop: Any, seed: int) -> None:
    """Losses that jump or are not finite, variances that fall and rise: reading by reading.

    Two fits; the second reads at other iterations. What is kept, restored and selected is compared
    by bits, and after a fit has ended nothing changes.
    """
    config = FitConfig(
        stop=stop, window=6, patience=40, read_every=5, iterations=403, retries=2, discrepancy=0.8
    )
    problem = Problem(torch.zeros(2, 1, 16, 17), (1, 16, 17), sigma=0.5)
    case = Case(config, problem)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def state(fit: int) -> dict[str, Tensor]:
        tensors = case.trained | case.watch.good()
        return {name: tensors[name][fit] for name in case.planned.good}

    hosts = [HostSlot({n: t.clone() for n, t in state(fit).items()}) for fit in range(2)]
    guards = [Guard(host, config.retries) for host in hosts]  # type: ignore[arg-type]
    stoppings = [Stopping(config, 0.5) for _ in range(2)]
    reasons: list[str | None] = [None, None]
    events = 0
    case.counters[1] = hosts[1].iteration = 3
    for turn in range(100):
        step = 3 if turn % 3 == 0 else 2
        for fit, host in enumerate(hosts):
            iteration = int(case.counters[fit]) + step
            case.counters[fit] = iteration
            for name, tensor in state(fit).items():
                tensor.copy_(draw(*tensor.shape) * (1 + 0.5 * math.sin(turn / 9)))
                host.state[name].copy_(tensor)
            loss = 10 ** (-3 + float(draw(1)))
            bad = float(draw(1))
            loss = math.nan if bad < 0.03 else math.inf if bad < 0.06 else loss
            if 0.06 <= bad < 0.09:
                case.trained["parameters"][fit, -1] = math.nan
            case.watch.loss[fit] = loss * (20 if bad > 0.95 else 1)
            case.watch.window[:, fit] = draw(*case.watch.window[:, fit].shape)
            host.iteration = iteration
        before = [case.books(fit) for fit in range(2)]
        kept = {name: tensor.clone() for name, tensor in case.planned.good.items()}
        board = case.read()
        for fit, (host, guard) in enumerate(zip(hosts, guards, strict=True)):
            due = host.iteration % 5 == 0 or host.iteration == config.iterations
            if not due or reasons[fit] is not None:
                assert case.books(fit) == before[fit]
                assert all(torch.equal(kept[n][fit], t[fit]) for n, t in case.planned.good.items())
                continue
            events += 1
            row = board[fit]
            found = Statistics(int(row["iteration"]), *[row[f] for f in Statistics._fields[1:]])
            if guard.accept(found):
                verdict = stoppings[fit](Reading(*found[:-2], 0.0))
                reasons[fit] = verdict.stop
                if verdict.select and stoppings[fit].searches:
                    best = {"parameters": host.state["parameters"], "image": host.state["average"]}
                    host.best = {name: tensor.clone() for name, tensor in best.items()}
            else:
                assert torch.equal(case.copies[fit], host.good["parameters"].half())
                reasons[fit] = "diverged" if guard.exhausted else None
            compare(case, fit, host, guard, stoppings[fit], stopped=reasons[fit] is not None)
            for name, tensor in state(fit).items():
                assert torch.equal(tensor, host.state[name]), name
    assert events > 5
    assert any(guard.total for guard in guards) or all(reasons)


def compare(
    case: Case, fit: int, host: HostSlot, guard: Guard, stopping: Stopping, *, stopped: bool
) -> None:
    """Everything that is remembered of a fit."""
    books = case.books(fit)
    assert bool(books["stopped"]) == stopped
    for name in ("loss", "good_iteration", "in_a_row", "failed_at", "total"):
        assert books[name] == getattr(guard, name), name
    for rule, name in (("es-wmv", "windowed"), ("es-emv", "moving")):
        if rule in stopping.searches:
            search = stopping.searches[rule]
            assert (books[name], books[f"{name}_at"]) == (search.best, search.best_iteration)
    assert int(case.counters[fit]) == host.iteration
    assert float(case.scale[fit]) == host.rate_scale
    assert int(case.keys[fit]) == noise.key(fit, retry=host.retry)
    for name, tensor in host.good.items():
        assert torch.equal(case.planned.good[name][fit], tensor), name
    for name, tensor in host.best.items():
        assert torch.equal(case.planned.best[name][fit], tensor), name


def test_in_any_order(reversed_order: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever program is last, the board and the books have the same bits."""

    def run() -> list[Tensor]:
        problem, config = problems()["masked"]
        case = Case(config, problem, random(2, *problem.shape, seed=7))
        for name, tensor in (case.trained | case.watch.good()).items():
            tensor.copy_(random(*tensor.shape, seed=len(name)))
        case.counters.fill_(5)
        case.read()
        return [case.planned.state.board, case.planned.state.books, *case.planned.good.values()]

    mirrored = run()
    monkeypatch.undo()
    for one, other in zip(mirrored, run(), strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    assert not torch.equal(mirrored[-1], torch.zeros_like(mirrored[-1]))
