"""What `make bench-gpu` does around the GPU: parts that go on, limits, what is left out."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from flashdip.bench import baselines, gpu
from flashdip.bench.cases import picture
from flashdip.bench.gpu import Part, execute, run, store, stored
from flashdip.bench.measure import Variant, worker
from flashdip.bench.published import DENOISE

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


def stuck() -> Variant:
    return Variant(lambda: time.sleep(60))


def test_a_worker_that_does_not_answer_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="did not answer"), worker(stuck) as running:
        running.limit = 0.2
        running.seconds(steps=1, warmup=0)
    assert time.monotonic() - begun < 50


def figures(median: float, ratio: float) -> dict[str, Any]:
    spread = {"median": median, "p10": median, "p90": median, "ratio": ratio}
    return spread | {"first_step": 1.0, "memory": 1 << 20}


def test_results_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    result = {
        "rows": {"triton fp16": figures(0.01, 5.0), "published": figures(0.05, 1.0)},
        "left_out": {"torch.compile max-autotune": "no first step within 180 s: cut"},
        "tf32": {"convolutions": True, "matrix products": False},
    }
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
