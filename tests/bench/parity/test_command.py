"""`flashdip parity`: what it prints and writes, that it goes on where it was, what it refuses."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashdip import cli
from flashdip.bench.parity.run import InterruptedFitError, run
from flashdip.bench.parity.suites import find
from flashdip.engine import tasks
from flashdip.engine.task_options import FitOptions

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Call:
    """Run the command line in an empty folder; return its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashdip", "parity", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return command


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note each call of a task."""
    made: list[str] = []
    for name in ("denoise", "restore", "superres"):
        original = getattr(tasks, name)

        def noted(
            *arguments: object, _of: str = name, _fit: object = original, **rest: object
        ) -> object:
            made.append(_of)
            return _fit(*arguments, **rest)  # type: ignore[operator]

        monkeypatch.setattr(tasks, name, noted)
    return made


def test_it_prints_and_writes_what_it_found(call: Call, data: Path, fits: list[str]) -> None:
    code, out, err = call("--data", str(data), "--preset", "quick", "-q")
    assert (code, err) == (0, "")
    assert fits == ["denoise", "denoise", "restore", "superres"]
    for words in ("denoise25", "paper", "NLM", "TV", "bicubic", "quoted", "run", "it/s", "mean"):
        assert words in out
    rows = json.loads(Path("parity/parity.json").read_text())
    first = rows[0]
    assert (first["suite"], first["image"], first["size"]) == ("denoise25", "one", [32, 32, 3])
    assert first["quoted"]["deep_prior"] == pytest.approx(20 * np.log10(255), abs=0.01)
    assert set(first["run"]) == {"nlm", "tv"}
    truth = np.asarray(Image.open(data / "denoise25" / "one_GT.png")) / 255
    ours = np.asarray(Image.open("parity/denoise25/one/quick.png")) / 255
    assert first["decibels"] == pytest.approx(-10 * np.log10(np.square(ours - truth).mean()))
    assert f"{first['decibels']:.2f}" in out

    lines = Path("parity/parity.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| one ") and "48.1" in line]
    (means,) = [line for line in lines if line.startswith("| mean")]
    nlm = np.mean([row["run"]["nlm"]["decibels"] for row in rows[:2]])
    assert f" {nlm:.2f} " in means
    assert line.count("|") == means.count("|")
    cells = [cell.strip() for cell in means.split("|")[1:-1]]
    assert cells[2] == ""  # the second picture has no published result of this method
    sheet = np.asarray(Image.open("parity/contact.png"))
    assert sheet.shape[0] == 4 * (32 + 24 + 8)
    assert sheet.shape[1] == 8 * (32 + 8) + 8  # truth, input, ours, three published, two run


def test_a_second_run_makes_nothing_again(call: Call, data: Path, fits: list[str]) -> None:
    options = ("--data", str(data), "--suite", "denoise25", "-q", "--json")
    first = call(*options, "--images", "one")
    second = call(*options)
    assert fits == ["denoise", "denoise"]
    assert json.loads(second[1])[0] == json.loads(first[1])[0]
    assert call(*options, "--seed", "5", "--images", "one")[0] == 0
    assert len(fits) == 3


def test_an_interrupted_fit_goes_on_to_the_same_bits(
    data: Path, tmp_path: Path, fits: list[str]
) -> None:
    (case,) = find(data, ["denoise25"], ["one"])
    options = FitOptions(preset="quick", iterations=8)
    whole = run(case, tmp_path / "whole", options)
    asked = iter([False] * 3 + [True] * 9)
    with pytest.raises(InterruptedFitError, match="the same command goes on"):
        run(case, tmp_path / "parts", options, interrupted=lambda: next(asked))
    place = tmp_path / "parts" / "denoise25" / "one"
    assert not (place / "quick.json").exists()
    assert len(list(place.glob("*.ckpt"))) == 1
    parts = run(case, tmp_path / "parts", options)
    np.testing.assert_array_equal(parts.image, whole.image)
    assert parts.record["decibels"] == whole.record["decibels"]
    assert list(place.glob("*.ckpt")) == []


def test_a_damaged_record_is_made_anew(data: Path, tmp_path: Path, fits: list[str]) -> None:
    (case,) = find(data, ["inpaint50"], ["one"])
    options = FitOptions(preset="quick")
    first = run(case, tmp_path, options)
    record = tmp_path / "inpaint50" / "one" / "quick.json"
    record.write_text(record.read_text()[:40])
    again = run(case, tmp_path, options)
    assert len(fits) == 2
    np.testing.assert_array_equal(first.image, again.image)


def test_published_stands_for_each_suites_own_preset(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashdip.engine.presets import PRESETS

    asked = []
    from flashdip.engine.task_options import config_of as original

    def config_of(task: str, options: FitOptions) -> object:
        asked.append((task, options["preset"]))
        return original(task, options)

    monkeypatch.setattr("flashdip.bench.parity.run.config_of", config_of)
    for suite in ("denoise25", "inpaint50", "sr4"):
        (case,) = find(data, [suite], ["one"])
        run(case, tmp_path, FitOptions(preset="published"))
    assert [name for _, name in asked] == [
        "published-denoise", "published-restore50", "published-sr4"
    ]  # fmt: skip
    assert set(asked) <= set(PRESETS)


BAD = {
    "unknown suite": (("--suite", "denoise9"), "denoise25, inpaint50, sr4"),
    "unknown picture": (("--images", "nobody"), "--images"),
    "no folder": (("-o", "no/where"), "folder"),
}


@pytest.mark.parametrize(("own", "words"), BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_line(call: Call, data: Path, own: tuple[str, ...], words: str) -> None:
    code, out, err = call("--data", str(data), *own)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
