"""`flashdip bench` from the command line, with variants that take no time."""

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flashdip import cli
from flashdip.bench import ceilings, cpu, quality, scenarios, schema, score, show, turns
from flashdip.bench.cases import Bench
from flashdip.bench.ceilings import Ceilings
from flashdip.bench.cpu import Group
from flashdip.bench.measure import Variant, clock
from flashdip.engine.errors import UnavailableError

LIMITS = Ceilings(1e10, {"fp32": 1e11, "bf16": 1e11})
GATE = {"output, fp32": {"error": 1e-7, "allowed": 1e-4}}
Run = Callable[..., tuple[int, str, str]]


def wait(seconds: float) -> Variant:
    return Variant(lambda: time.sleep(seconds))


def bench(name: str, seconds: float, *, fits: int = 1, network: str = "", size: int = 64) -> Bench:
    parameters = {"precision": "fp32", "size": size, "fits": fits, "network": network}
    return Bench(name, wait, (seconds,), parameters, fits, lambda: GATE)


class Here:
    """A worker without a process."""

    setup = 0.1

    def __init__(self, variant: Variant) -> None:
        self.variant = variant

    def seconds(self, *, steps: int, warmup: int) -> float:
        return clock(self.variant.step, steps=steps, warmup=warmup)

    def memory(self) -> int:
        return self.variant.memory()

    def facts(self) -> dict[str, Any]:
        return self.variant.facts()


@contextlib.contextmanager
def here(
    make: Callable[..., Variant], *arguments: Any, limit: float | None = None
) -> Iterator[Any]:
    yield Here(make(*arguments))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    monkeypatch.setattr(turns, "worker", here)
    monkeypatch.setattr(score, "worker", here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ceilings, "ceilings", lambda place, precisions: LIMITS)

    def call(*arguments: str) -> tuple[int, str, str]:
        device = [] if arguments[0] == "cpu" else ["--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["flashdip", "bench", *arguments, *device])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


def test_a_step_is_measured_shown_and_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    benches = [bench("published", 0.02), bench("native (fp32)", 0.01)]
    monkeypatch.setattr(scenarios, "steps", lambda *arguments: benches)
    monkeypatch.setattr(scenarios, "step_work", lambda bench: None)
    code, out, err = run("step", "--rounds", "3", "-o", "a.json")
    assert code == 0
    assert "measuring published, native (fp32) in turns" in err
    line = next(line for line in out.splitlines() if line.startswith("| native (fp32)"))
    assert float(line.split("|")[6]) == 2.0  # times as fast
    result = schema.read("a.json")
    assert (result["kind"], result["results"][1]["gate"]) == ("step", GATE)
    assert run("step", "-o", "a.json")[0] == 2  # it exists


def test_json_is_all_there_is_on_stdout(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "restorations", lambda *arguments: [bench("published", 0.01)])
    code, out, _ = run("restore", "--rounds", "3", "--json")
    result = json.loads(out)
    assert (code, schema.problems(result), result["kind"]) == (0, [], "restore")
    assert result["results"][0]["seconds"]["n"] == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("step --backends native:zz", "precision: expected one of"),
        ("gpu --backend nothing", "backend: expected one of"),
        ("gpu --seconds 30 --sustained 30", "--sustained: expected fewer than --seconds, 30, got"),
        ("restore --presets nope", "preset: expected"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_measured(
    run: Run, line: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ceilings, "ceilings", None)
    code, out, err = run(*line.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"flashdip: error: {said}")


def test_nothing_measured_is_a_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(scenarios, "steps", lambda *a: [Bench("mine", wait, (0.0,), check=wrong)])
    code, out, _ = run("step")
    assert code == 1
    assert "left out: mine: RuntimeError: out of memory" in out


def test_the_score_is_that_of_the_best_number_of_fits(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two fits in 12 ms are better than one in 10 ms: 6 ms an iteration, 1600 of them a picture."""

    def balanced(size: int, device: Any, backend: str, precision: str, fits: int) -> Bench:
        seconds = 0.005 if size == 256 else 0.01 + 0.002 * (fits - 1)
        name = f"balanced {size}, F = {fits}"
        return bench(name, seconds, fits=fits, network="balanced", size=size)

    monkeypatch.setattr(score, "OTHERS", (256,))
    monkeypatch.setattr(score, "balanced", balanced)
    monkeypatch.setattr(score, "yardsticks", lambda size, device: [bench("published", 0.03)])
    monkeypatch.setattr(score, "step_work", lambda bench: None)
    joules = iter(range(0, 10_000, 100))
    found, made = score.run(
        torch.device("cpu"),
        "native",
        "fp32",
        LIMITS,
        others=(256,),
        seconds=60.0,
        sustained=0.5,
        meter=partial(next, joules),
    )
    assert made["fits"] == 2
    assert made["restorations_per_hour"] == pytest.approx(3600 / 1600 / 0.006)
    rates = made["iterations_per_second"]
    assert rates == pytest.approx({"256": 200, "512": 100})
    steady = made["sustained"]
    assert len(steady["samples"]) == score.PARTS
    assert steady["samples"] == pytest.approx([1 / 0.006] * score.PARTS)
    assert steady["seconds"] == pytest.approx(0.48)  # 4 steps of 12 ms, ten times
    assert steady["kept"] == pytest.approx(1)
    assert made["watts"] == pytest.approx(100 / steady["seconds"])
    names = [row["name"] for row in found["results"]]
    assert names[0] == "published" and len(names) == 4
    assert show.score(made).startswith("score: 375 restorations an hour, 512x512, balanced")
    assert "200 at 256, 100 at 512; " in show.score(made)


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize(
    ("seconds", "left_out"),
    [
        (250.0, []),
        (100.0, ["published", "balanced 1024, F = 1"]),
        (45.0, ["published", "balanced 512, F = 2", "balanced 1024, F = 1"]),
        (35.0, None),
    ],
)
def test_a_score_keeps_to_its_time(
    seconds: float, left_out: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is scored comes first, then the published loop and the other sizes."""
    monkeypatch.setattr("time.monotonic", time.perf_counter)

    def balanced(size: int, device: Any, backend: str, precision: str, fits: int) -> Bench:
        name = f"balanced {size}, F = {fits}"
        return bench(name, (size / 512) ** 2 * fits, fits=fits, network="balanced", size=size)

    monkeypatch.setattr(score, "balanced", balanced)
    monkeypatch.setattr(score, "yardsticks", lambda size, device: [bench("published", 12.0)])
    monkeypatch.setattr(score, "step_work", lambda bench: None)
    begun = time.perf_counter()
    options: dict[str, Any] = {"seconds": seconds, "sustained": 20.0}
    scored = partial(score.run, torch.device("cpu"), "native", "fp32", LIMITS, **options)
    if left_out is None:
        with pytest.raises(UnavailableError, match="no score, balanced 512, F = 1 could not"):
            scored()
    else:
        found, made = scored()
        assert list(found["left_out"]) == left_out
        reasons = found["left_out"].values()
        assert all(re.search(r" \d+ s were left: |no time was left|s: cut$", r) for r in reasons)
        assert [row["name"] for row in found["results"]][-1].startswith("balanced")
        assert made["restorations_per_hour"] == pytest.approx(3600 / 1600)
        assert made["sustained"]["seconds"] == 20
    assert time.perf_counter() - begun < seconds


def test_the_yardstick_of_cpus(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows of each size and way to enlarge; what is asked wrongly is told before anything runs."""

    def loops(size: int, upsample: str, rounds: int, *rest: Any) -> Group:
        of = f"{upsample} {size}"
        rows = {"published": 0.02, "published, pages kept": 0.015, "native (fp32)": 0.01}
        benches = [bench(f"{of}: {name}", each, size=size) for name, each in rows.items()]
        for each in benches:
            each.parameters["rounds"] = rounds
        return Group(of, tuple(benches), 1.0)

    monkeypatch.setattr(cpu, "loops", loops)
    monkeypatch.setattr(cpu, "step_work", lambda bench: None)
    monkeypatch.setattr(cpu, "convolves_bf16", lambda: False)
    monkeypatch.setattr(quality, "FILE", tmp_path / "none.json")
    code, out, _ = run("cpu", "--sizes", "64,96", "--rounds", "3", "--compiled", "none", "-o", "a")
    assert code == 0
    result = schema.read("a")
    assert (result["kind"], len(result["results"])) == ("cpu", 12)
    line = next(line for line in out.splitlines() if line.startswith("| nearest 96: native"))
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["2.00", "1.50"]
    assert "left out: quality: nothing was recorded" in out
    assert "left out: nearest 96: native (bf16): this CPU has no convolutions in bfloat16" in out
    for wrong, said in (
        (("--sizes", "100"), "--sizes: expected multiples of 32 from 64 on, got 100"),
        (("--upsample", "cubic"), "--upsample: expected bilinear, nearest, got 'cubic'"),
        (("--compiled", "all"), "--compiled: expected whole numbers"),
        (("--fits", "b.json"), "b.json: cannot be read"),
        (("-o", "a"), "expected a new file"),
    ):
        code, out, err = run("cpu", *wrong)
        assert (code, out) == (2, "") and said in err


def test_backends_are_chosen_by_name_and_precision() -> None:
    cpu = torch.device("cpu")
    listed = scenarios.steps(64, cpu, ["reference:fp32", "native:bf16"], (1, 3))
    assert [each.name for each in listed] == [
        "published",
        "published + host work",
        "reference (fp32)",
        "reference (fp32), F = 3",
        "native (bf16)",
        "native (bf16), F = 3",
    ]
    assert [each.check is None for each in listed[:3]] == [True, True, False]
    assert scenarios.default_backends(cpu)[0] == "reference:fp32"
    work = scenarios.step_work(listed[2])
    assert work is not None
    assert work["level0.up", "forward"].flops > 0
    restorations = scenarios.restorations(64, 20.0, cpu, "native:fp32", ["quick"])
    assert [each.name for each in restorations] == ["published", "native (fp32), quick"]
