"""What `make bench-gpu` does around the GPU: parts that go on, limits, what is left out."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from flashdip.bench import baselines, gpu
from flashdip.bench.gpu import Part, compare, execute, run, store, stored
from flashdip.bench.measure import Variant, worker
from flashdip.bench.published import DENOISE
from flashdip.bench.table import picture

OF = {"gpu": "a GPU", "source": "1"}


def nothing(limit: float) -> dict[str, Any]:
    raise AssertionError("parts are computed by what executes them")


def parts() -> list[Part]:
    return [
        Part("gate", 10, nothing, gate=True),
        Part("fast", 10, nothing),
        Part("slow", 5, nothing),
    ]


class Executor:
    """Stores a result for each part, but for those that go wrong; keeps what was asked for."""

    def __init__(self, directory: Path, wrong: dict[str, str], of: dict[str, str] = OF) -> None:
        self.directory, self.wrong, self.of = directory, wrong, of
        self.asked: list[str] = []
        self.shown: list[str] = []

    def __call__(self, part: Part) -> str | None:
        self.asked.append(part.name)
        if part.name not in self.wrong:
            store(part, self.directory, self.of, {"value": part.limit})
        return self.wrong.get(part.name)

    def show(self, part: Part, result: dict[str, Any]) -> None:
        assert result == {"value": part.limit}
        self.shown.append(part.name)

    def run(self) -> int:
        return run(parts(), self.directory, self.of, self, self.show)


def test_a_second_call_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Executor(tmp_path / "results", {"fast": "cut after 10 s"})
    assert first.run() == 1
    assert first.shown == ["gate", "slow"]
    assert capsys.readouterr().out == "fast: cut after 10 s\n"
    second = Executor(first.directory, {})
    assert second.run() == 0
    assert (second.asked, second.shown) == (["fast"], ["gate", "fast", "slow"])


def test_nothing_is_measured_behind_a_closed_gate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    closed = Executor(tmp_path, {"gate": "failed (exit code 1)"})
    assert closed.run() == 1
    assert (closed.asked, closed.shown) == (["gate"], [])
    assert "No figures" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{", "[]", '{"of": {"gpu": "another"}, "result": {}}'])
def test_what_does_not_hold_is_done_again(tmp_path: Path, text: str) -> None:
    """A file that is cut short, or that other code or another GPU has left."""
    part = parts()[1]
    store(part, tmp_path, OF, {"value": math.pi})
    assert stored(part, tmp_path, OF) == {"value": math.pi}
    assert stored(part, tmp_path, OF | {"source": "2"}) is None
    (tmp_path / "fast.json").write_text(text)
    assert stored(part, tmp_path, OF) is None


def test_a_part_is_cut_with_all_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert execute([sys.executable, "-c", parent], 1.0) == "cut after 1 s"
    assert execute([sys.executable, "-c", "raise SystemExit(3)"], 30) == "failed (exit code 3)"
    assert execute([sys.executable, "-c", ""], 30) is None
    time.sleep(2.5)
    assert not mark.exists()


class Fake:
    """A worker whose steps take so many seconds on a clock of its own."""

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
    result = compare(variants, 600.0, start=start, energy=True, meter=lambda: 200 * clock[0])
    rows = result["rows"]
    assert list(rows) == ["triton fp16", "published", "patient"]
    assert math.isclose(rows["triton fp16"]["median"], 0.005)
    assert math.isclose(rows["triton fp16"]["ratio"], 10.0)
    assert math.isclose(rows["triton fp16"]["joules"], 1.0)
    assert rows["published"]["ratio"] == 1.0
    assert rows["published"]["n"] == gpu.ROUNDS
    assert math.isclose(rows["patient"]["first_step"], 100.01)
    assert rows["patient"]["memory"] > 0
    assert result["left_out"] == {
        "compiled": "no first step within 180 s: cut",
        "large": "OutOfMemoryError: CUDA out of memory. Tried to allocate 4 GiB",
    }
    assert clock[0] < 600
    json.dumps(result)


def test_time_is_kept(start: Callable[..., Any], clock: list[float]) -> None:
    """Fewer rounds where time is short; none where it does not do."""
    variants = {"published": made(10.0), "triton fp16": made(1.0)}
    result = compare(variants, 200.0, start=start)
    assert gpu.FEWEST <= result["rows"]["published"]["n"] < gpu.ROUNDS
    assert clock[0] < 200
    with pytest.raises(TimeoutError, match="no time left"):
        compare(variants, 60.0, start=start)


def stuck() -> Variant:
    return Variant(lambda: time.sleep(60))


def test_a_worker_that_does_not_answer_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="did not answer"), worker(stuck) as running:
        running.limit = 0.2
        running.seconds(steps=1, warmup=0)
    assert time.monotonic() - begun < 50


def test_results_are_shown(capsys: pytest.CaptureFixture[str], start: Callable[..., Any]) -> None:
    variants = {
        "triton fp16": made(0.01),
        "published": made(0.05),
        "torch.compile max-autotune": made(0.01, compilation=500.0),
    }
    result = json.loads(json.dumps(compare(variants, 600.0, start=start)))
    gpu.show(Console(width=110), Part("speed-512-F1", 1, nothing), result)
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if line.startswith("| triton fp16"))
    assert [cell.strip() for cell in row.split("|")[2:7]] == ["10.000"] * 3 + ["100.0", "5.00"]
    assert "torch.compile max-autotune: no first step within 180 s: cut" in out
    assert "TF32 in convolutions." in out
    assert "5.00 times published (goal 4)" in out


def test_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main(["--directory", str(tmp_path / "none")]) == 2
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "NVIDIA GPU" in out
    assert list(tmp_path.iterdir()) == []


def test_full_has_more_parts() -> None:
    short, full = ([part.name for part in gpu.parts(each)] for each in (False, True))
    assert set(short) < set(full)
    assert "speed-512-F4" in short and "speed-1024-F16" in full
    assert [part.gate for part in gpu.parts(False)[:4]] == [True, True, True, False]
    assert len(gpu.variants(512, 4)) == 7


@pytest.mark.parametrize("compiled", [False, True])
def test_plain_loop_fits(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """On a CPU, where nothing is compiled: the loss falls and the average follows."""
    monkeypatch.setattr("torch.compile", lambda function, mode: function)
    monkeypatch.setattr("torch.compiler.cudagraph_mark_step_begin", lambda: None)
    monkeypatch.setattr(
        baselines,
        "DENOISE",
        dict(DENOISE) | {"num_channels_down": (8,) * 5, "num_channels_up": (8,) * 5},
    )
    loop = baselines.PlainLoop(picture(64), compiled=compiled)
    losses = []
    draw = loop.draw

    def watched(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, output = draw(z)
        losses.append(loss.item())
        return loss, output

    loop.draw = watched
    for _ in range(8):
        loop.step()
    assert losses[-1] < losses[0]
    assert 0 < loop.average.mean() < 0.1
