"""Variants take turns; what fails does not hold the others up; wrong ones show nothing."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flashdip.bench import schema, suite
from flashdip.bench.cases import Bench
from flashdip.bench.ceilings import Ceilings
from flashdip.bench.correct import WrongResultError
from flashdip.bench.measure import Variant
from flashdip.bench.turns import FEWEST, Plan, compare
from flashdip.bench.work import Work


class Fake:
    """A worker whose steps take so many seconds on a clock of its own."""

    setup = 2.5

    def __init__(self, clock: list[float], step: float, compilation: float, limit: float) -> None:
        self.clock, self.step, self.compilation, self.limit = clock, step, compilation, limit
        self.steps = 0

    def seconds(self, *, steps: int, warmup: int) -> float:
        taken = (steps + warmup) * self.step + (self.compilation if self.steps == 0 else 0)
        self.steps += steps + warmup
        self.clock[0] += min(taken, self.limit)
        if taken > self.limit:
            raise TimeoutError
        return taken / steps if steps == 1 and warmup == 0 else self.step

    def memory(self) -> int:
        return 1000 * self.steps

    def facts(self) -> dict[str, Any]:
        return {"steps": self.steps}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def start(clock: list[float]) -> Callable[..., Any]:
    @contextlib.contextmanager
    def begin(make: Any, step: float, compilation: float, *, limit: float) -> Iterator[Fake]:
        if step < 0:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 4 GiB")
        yield Fake(clock, step, compilation, limit)

    return begin


def made(step: float, compilation: float = 0.0, fits: int = 1) -> Any:
    return (None, (step, compilation)), fits


def test_variants_are_compared(start: Callable[..., Any], clock: list[float]) -> None:
    """Per fit, against the published loop; what fails or is cut does not hold the others up."""
    variants = {
        "triton fp16": made(0.02, fits=4),
        "published": made(0.05),
        "compiled": made(0.01, compilation=500.0),
        "patient": made(0.01, compilation=100.0),
        "large": made(-1.0),
    }
    result = compare(variants, Plan(600.0), start=start, meter=lambda: 200 * clock[0])
    rows = result["rows"]
    assert list(rows) == ["triton fp16", "published", "patient"]
    assert math.isclose(rows["triton fp16"]["median"], 0.005)
    assert math.isclose(rows["triton fp16"]["ratio"], 10.0)
    assert math.isclose(rows["triton fp16"]["joules"], 1.0)
    assert math.isclose(rows["triton fp16"]["watts"], 200.0)
    assert rows["triton fp16"]["samples"] == (0.005,) * 15
    assert rows["triton fp16"]["setup"] == 2.5
    assert rows["published"]["ratio"] == 1.0
    assert rows["published"]["n"] == Plan(0).rounds
    assert math.isclose(rows["patient"]["first_step"], 100.01)
    assert rows["patient"]["memory"] > 0
    assert result["left_out"] == {
        "compiled": "no first step within 180 s: cut",
        "large": "OutOfMemoryError: CUDA out of memory. Tried to allocate 4 GiB",
    }
    assert clock[0] < 600
    json.dumps(result)


def test_time_is_kept(start: Callable[..., Any], clock: list[float]) -> None:
    """Fewer rounds where time is short; where that does not do, without the slowest."""
    variants = {"published": made(10.0), "triton fp16": made(1.0)}
    result = compare(variants, Plan(100.0), start=start)
    assert FEWEST <= result["rows"]["published"]["n"] < Plan(0).rounds
    assert clock[0] < 100
    begun = clock[0]
    result = compare(dict(reversed(variants.items())), Plan(50.0), start=start)
    assert list(result["rows"]) == ["triton fp16"]
    assert result["rows"]["triton fp16"]["n"] >= FEWEST
    assert result["rows"]["triton fp16"]["ratio"] is None
    assert result["left_out"]["published"].startswith(
        "3 rounds of triton fp16, published need 33 s, and 28 s were left"
    )
    assert clock[0] - begun < 50
    begun = clock[0]
    result = compare(variants, Plan(50.0), start=start)  # the time of the first is kept for it
    assert list(result["rows"]) == ["published"]
    assert result["left_out"] == {"triton fp16": "no time was left for it"}
    assert clock[0] - begun == 50
    result = compare(variants, Plan(21.0), start=start)
    assert (result["rows"], set(result["left_out"])) == ({}, set(variants))


def test_samples_are_shorter_before_anything_is_left_out(
    start: Callable[..., Any], clock: list[float]
) -> None:
    variants = {name: made(0.1) for name in ("published", "native", "reference")}
    result = compare(variants, Plan(12.0, block=1.5), start=start)
    assert (list(result["rows"]), result["left_out"]) == (list(variants), {})
    assert all(row["n"] >= FEWEST for row in result["rows"].values())
    assert clock[0] < 12


@pytest.mark.parametrize("bad", ["published", "quick"])
def test_what_fails_later_does_not_hold_the_others_up(
    bad: str, start: Callable[..., Any], clock: list[float]
) -> None:
    """As a restoration does that misses its target with the third seed."""

    @contextlib.contextmanager
    def failing(make: Any, step: float, name: str, *, limit: float) -> Iterator[Fake]:
        with start(make, step, 0.0, limit=limit) as worker:
            sample = worker.seconds

            def seconds(**options: int) -> float:
                if name == bad and worker.steps == 2:
                    raise RuntimeError("the target was missed")
                return float(sample(**options))

            worker.seconds = seconds
            yield worker

    listed = {name: ((None, (0.1, name)), 1) for name in ("published", "quick", "balanced")}
    result = compare(listed, Plan(600.0, rounds=5, warm=False), start=failing)  # type: ignore[arg-type]
    assert list(result["rows"]) == [name for name in listed if name != bad]
    assert result["left_out"] == {bad: "RuntimeError: the target was missed"}
    balanced = result["rows"]["balanced"]
    assert balanced["n"] == 5
    assert balanced["ratio"] == (None if bad == "published" else 1.0)


def test_cold_samples_are_single_steps(start: Callable[..., Any], clock: list[float]) -> None:
    """As for whole restorations, of which every one counts."""
    plan = Plan(600.0, rounds=3, warm=False)
    result = compare({"published": made(0.01), "quick": made(0.02)}, plan, start=start)
    assert [row["facts"]["steps"] for row in result["rows"].values()] == [4, 4]


def quiet() -> Variant:
    state = torch.zeros(1000)

    def step() -> None:
        state.add_(1)

    return Variant(step, facts=lambda: {"steps": int(state[0])})


def loud() -> Variant:
    raise AssertionError("a wrong variant is not even set up")


def wrong() -> dict[str, Any]:
    raise WrongResultError("mine (fp32): the output is off")


def broken() -> dict[str, Any]:
    raise RuntimeError("no memory\nleft")


def test_wrong_ones_show_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the rest makes a valid document, with shares of the roof where work was counted."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    gate = {"output": {"error": 1e-7, "allowed": 1e-6}}
    benches = [
        Bench("published", quiet, parameters={"precision": "fp32"}),
        Bench("mine", quiet, parameters={"precision": "fp32", "size": 3}, check=lambda: gate),
        Bench("wrong", loud, check=wrong),
        Bench("broken", loud, check=broken),
    ]
    found = suite.results(
        benches,
        Plan(30.0, rounds=3, block=0.01),
        work=lambda bench: {("", ""): Work(10, 20)} if bench.name == "mine" else None,
        ceilings=Ceilings(1e9, {"fp32": 1e6}),
    )
    assert found["left_out"] == {
        "wrong": "mine (fp32): the output is off",
        "broken": "RuntimeError: no memory left",
    }
    published, mine = found["results"]
    assert (published["ratio"], published["work"], published["roof_share"]) == (1.0, None, None)
    assert (mine["baseline"], mine["gate"], mine["parameters"]["size"]) == ("published", gate, 3)
    assert math.isclose(mine["roof_share"], 1e-5 / mine["seconds"]["median"])
    assert mine["work"] == {"flops": 10, "bytes": 20}
    assert mine["facts"]["steps"] > 3
    assert mine["memory"] > 0
    machine = {
        "hardware": {
            "system": "Linux", "cpu": "a CPU", "cores": 2, "memory_gib": None,
            "device": "a CPU", "device_memory_gib": None,
        },
        "software": {},
    }  # fmt: skip
    schema.document("step", machine, {}, {}, None, json.loads(json.dumps(found)))
