"""The yardstick of CPUs: which rows there are, how time is shared out, what is multiplied."""

import contextlib
import gc
import io
import resource
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console

from flashdip.bench import baselines, cpu, schema, show, suite, turns
from flashdip.bench.cases import PUBLISHED, Bench
from flashdip.bench.ceilings import Ceilings
from flashdip.bench.cpu import Group, groups, loops, run, to_quality
from flashdip.bench.curves import ours
from flashdip.bench.suite import judge
from flashdip.bench.turns import Plan
from flashdip.engine.errors import UnavailableError
from flashdip.kernels.memory import on_glibc
from tests.bench.results import MACHINE, STATE
from tests.bench.test_quality import made

LIMITS = Ceilings(1e10, {"fp32": 1e11, "bf16": 1e11})


class Steps:
    """A worker whose steps take so many seconds on a clock of its own."""

    setup = 1.0

    def __init__(self, clock: list[float], seconds: float) -> None:
        self.clock, self.step = clock, seconds

    def seconds(self, *, steps: int, warmup: int) -> float:
        self.clock[0] += (steps + warmup) * self.step
        return self.step

    def memory(self) -> int:
        return round(self.step * 1e9)

    def facts(self) -> dict[str, Any]:
        return {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]

    @contextlib.contextmanager
    def begin(make: Any, seconds: float, *, limit: float) -> Iterator[Steps]:
        yield Steps(now, seconds)

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(turns, "worker", begin)
    return now


def group(
    name: str, rows: dict[str, float], weight: float = 1.0, fits: Any = (), rounds: int = 7
) -> Group:
    """Return rows that take so many seconds a step."""
    shared = {"size": 256, "fits": 1, "precision": "fp32", "rounds": rounds}
    benches = []
    for row, seconds in rows.items():
        network = row if fits and row != "published" else PUBLISHED
        parameters = shared | {"network": network}
        benches.append(Bench(f"{name}: {row}", baselines.published, (seconds,), parameters))
    return Group(name, tuple(benches), weight, tuple(fits))


def printed(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]], str]:
    """Return the document of what was measured, its lines by name, and all that is printed."""
    document = schema.document("cpu", MACHINE, STATE, STATE, LIMITS.record(), found)
    to = Console(file=io.StringIO(), width=show.WIDTH, markup=False, highlight=False)
    show.show(document, to)
    text = to.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    return document, {cells[0].strip(): [c.strip() for c in cells[1:]] for cells in lines}, text


@pytest.mark.parametrize(
    ("narrow", "ours", "best"),
    [(True, ["native (bf16)", "native (fp32)"], "bf16"), (False, ["native (fp32)"], "fp32")],
)
def test_rows_of_a_network(narrow: bool, ours: list[str], best: str) -> None:
    """The published loop twice, ours, PyTorch's; each but the yardstick is judged."""
    whole = loops(512, "nearest", 7, compiled=True, narrow=narrow)
    others = [f"eager {best}", f"eager {best}, pages kept", f"compiled {best}, pages kept"]
    assert [bench.name.removeprefix("nearest 512: ") for bench in whole.benches] == [
        "published",
        "published, pages kept",
        *ours,
        *others,
    ]
    judged = len(ours) + len(others)
    assert [bench.check is None for bench in whole.benches] == [True] * 2 + [False] * judged
    assert [b.parameters.get("judged_at") for b in whole.benches] == [None] * 2 + [256] * judged
    assert {bench.parameters["precision"] for bench in whole.benches} == {"fp32", best}
    folded = cpu.step_work(whole.benches[0])
    as_published = cpu.step_work(loops(512, "bilinear", 7, False, narrow=True).benches[0])
    assert folded["level0.up", "forward"] == as_published["level0.up", "forward"]
    assert all(bench.parameters["upsample"] == "nearest" for bench in whole.benches)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx512_f": True, "avx512_vl": True}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "aarch64"}, True),
    ],
)
def test_bfloat16_that_is_emulated_does_not_count(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], expected: bool
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert cpu.convolves_bf16() is expected
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not cpu.convolves_bf16()


def test_pytorch_in_float32_is_judged_and_runs() -> None:
    """As on a CPU without bfloat16."""
    whole = loops(64, "bilinear", 7, compiled=False, narrow=False)
    eager = next(bench for bench in whole.benches if bench.name.endswith("eager fp32"))
    assert eager.check is not None and set(eager.check()) == {"output, fp32", "gradient, fp32"}
    made = eager.make(*eager.arguments)
    made.step()


def test_what_is_left_out_has_a_reason() -> None:
    found, left_out = groups([64], ["bilinear"], 3, [], None, narrow=False)
    assert [each.name for each in found] == ["bilinear 64"]
    assert left_out == {
        "bilinear 64: compiled fp32, pages kept": "compiled at no such size: see --compiled",
        "bilinear 64: native (bf16)": "this CPU has no convolutions in bfloat16",
        "quality": "nothing was recorded: see 'python -m flashdip.bench.quality'",
    }
    changed = made("a", "quick", [30.0])
    changed["config"]["learning_rate"] = 0.5
    fits: dict[str, Any] = {"size": 64, "fits": [made("a", PUBLISHED, [30.0]), changed]}
    found, left_out = groups([64], ["bilinear"], 3, [64], fits, narrow=True)
    assert [bench.name for bench in found[1].benches] == ["quality 64: published"]
    assert {name for name in left_out} == {f"quality 64: {name}" for name in ours()}
    assert "was not recorded as it is now" in left_out["quality 64: quick"]

    fits["fits"][1] = made("a", "quick", [30.0])
    found, left_out = groups([], ["bilinear"], 3, [], fits, narrow=True)
    published, quick = found[0].benches
    assert (published.make, quick.make) == (baselines.published, baselines.engine)
    assert quick.parameters["network"] == "quick"
    assert "quality 64: quick" not in left_out

    del fits["fits"][0]
    found, left_out = groups([], ["bilinear"], 3, [], fits, narrow=True)
    assert found == [] and "quality 64: published" in left_out


def test_ratios_are_to_both_allocators(clock: list[float]) -> None:
    rows = {"published": 0.8, "published, pages kept": 0.6, "native (fp32)": 0.2}
    found = run([group("bilinear 256", rows)], rounds=7, seconds=600.0, ceilings=LIMITS)
    document, lines, text = printed(found)
    assert lines["bilinear 256: native (fp32)"][:5] == ["4.00", "3.00", "0.25", "5", "0.2"]
    assert lines["bilinear 256: published"][:3] == ["1.00", "0.75", "1.00"]
    assert document["results"][2]["baseline"] == "bilinear 256: published"
    assert all(row["seconds"]["n"] == 7 for row in document["results"])
    assert "time ran short" not in text


def test_time_is_shared_out_and_fewer_rounds_are_said(clock: list[float]) -> None:
    """A group takes what others left; a row without time is left out, and the rest goes on."""
    slow = {"published": 3.0, "native (fp32)": 1.0}
    listed = [group("a", slow, 1.0), group("b", slow, 2.0), group("c", {"published": 400.0}, 1.0)]
    found = run(listed, rounds=7, seconds=110.0, ceilings=LIMITS)
    _, lines, text = printed(found)
    assert "a: 4 rounds of 7: time ran short, see --seconds" in text
    assert "b: 7 rounds of 7" not in text and lines["b: published"][7] == "7"
    assert "c: published" not in lines
    assert "the slowest is left out" in found["left_out"]["c: published"]


def test_a_worker_that_is_killed_costs_its_row(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    """As by the system, where memory is short."""
    steps = Steps.seconds

    def killed(self: Steps, *, steps_: Any = steps, **options: Any) -> float:
        if self.step == 0.5 and clock[0] > 10:
            raise RuntimeError("measure: the worker's process ended early")
        return float(steps_(self, **options))

    monkeypatch.setattr(Steps, "seconds", killed)
    listed = [group("a", {"published": 3.0, "eager": 0.5}), group("b", {"published": 1.0})]
    found = run(listed, rounds=7, seconds=600.0, ceilings=LIMITS)
    assert [row["name"] for row in found["results"]] == ["a: published", "b: published"]
    assert found["left_out"]["a: eager"].endswith("measure: the worker's process ended early")


def test_seconds_to_quality_are_products(clock: list[float]) -> None:
    """Measured seconds an iteration, recorded iterations, runs; where it is known, for each."""
    fits = [
        made("a", PUBLISHED, [20.0] * 9 + [29.9, 30.0]),
        made("b", PUBLISHED, [20.0, 25.0]),
        made("a", "quick", [29.0, 29.9], runs=3),
        made("b", "quick", [24.0]),
        made("b", "best", [26.0]) | {"precision": "bf16"},
    ]
    rows = {"published": 0.8, "quick": 0.1, "best": 0.4}
    found = run([group("quality 256", rows, fits=fits)], rounds=3, seconds=600.0, ceilings=LIMITS)
    document, lines, text = printed(found)
    assert lines["a: published"][:3] == ["1.00", "80", "100"]
    assert lines["a: quick"][:3] == ["13.33", "6", "3 x 20"]  # 80 s over 3 x 20 x 0.1 s
    assert lines["b: quick"][:3] == ["", "", "never"]
    assert lines["b: best"][:3] == ["4.00", "4", "10"]
    assert lines["a: published"][3:6] == ["1.00", "88", "110"]
    assert lines["a: quick"][3:6] == ["", "", "never"]
    assert lines["b: best"][3:6] == ["4.00", "4", "10"]
    facts = document["results"][1]["facts"]
    assert facts["seconds_to_target"] == pytest.approx([6.0, None])
    assert facts["target_db"] == [29.8, 24.8]
    assert "best: timed in fp32, its iterations were recorded in bf16" in text
    assert "quick: timed" not in text
    assert to_quality(document["results"][2], fits)["facts"]["picture"] == ["b"]


def test_the_compiled_row_has_limits_of_its_own(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    """Where it is judged, and until its first step; without it the others are measured."""
    limits: list[float] = []

    @contextlib.contextmanager
    def cut(make: Any, *arguments: Any, limit: float) -> Iterator[Any]:
        limits.append(limit)
        raise TimeoutError("measure: the worker did not answer within 150 s")
        yield

    monkeypatch.setattr(cpu, "worker", cut)
    cpu.plain_right.cache_clear()
    assert cpu.patience(3600.0) == cpu.COMPILATION
    limit = cpu.patience(60.0)
    assert limit == pytest.approx(10.0)
    group = loops(64, "bilinear", 3, compiled=True, narrow=True, limit=limit)
    (*_, compiled) = group.benches
    judged = judge([compiled])
    assert limits == [limit]
    assert judged.left_out[compiled.name].startswith("TimeoutError: measure: the worker")

    seen: dict[str, float] = {}

    def plans(benches: Any, plan: Plan, **options: Any) -> dict[str, Any]:
        seen.update(plan.limits)
        return {"results": [], "left_out": {}}

    monkeypatch.setattr(cpu, "results", plans)
    monkeypatch.setattr(cpu, "judge", lambda benches, tell: suite.Judged({}, {}, {}))
    run([group], rounds=3, seconds=60.0, ceilings=LIMITS)
    assert seen == {compiled.name: limit}


def test_judging_what_is_compiled_is_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = {"output, bf16": {"error": 0.01, "allowed": 0.05}}
    monkeypatch.setattr(cpu, "judged_plain", lambda size, upsample, precision, compiled: gate)
    variant = cpu._compiled(64, "nearest", "bf16")
    assert variant.facts() == {}
    variant.step()
    assert variant.facts() == gate


def test_pages_are_kept_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the row has a reason to be left out."""
    monkeypatch.setattr(baselines, "on_glibc", lambda: False)
    for make in (baselines.published, baselines.plain):
        with pytest.raises(UnavailableError, match="pages are kept on a CPU, in glibc's heap"):
            make(64, False, "cpu", "nearest", True)
    monkeypatch.setattr(baselines, "on_glibc", lambda: True)
    kept: list[str] = []
    monkeypatch.setattr(baselines, "keep_pages", lambda place: kept.append(place.type))
    baselines.published(64, False, "cpu", "nearest", True)
    baselines.published(64, False, "cpu")
    assert kept == ["cpu"]


@pytest.mark.skipif(not on_glibc(), reason="memory does not come from glibc's heap")
def test_kept_pages_stay_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the process ends: what is freed is taken again without a page fault."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            torch.ones(1 << 22)  # 16 MiB, 4096 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with contextlib.ExitStack() as stack:
        monkeypatch.setattr(baselines, "_PROCESS", stack)
        baselines.keep_pages(torch.device("cpu"))
        gc.collect()
        faults()
        assert faults() < 100
