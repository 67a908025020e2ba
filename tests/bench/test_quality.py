"""Quality curves: what is recorded, when a fit ends, and that a second run goes on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from flashdip.bench import curves, quality
from flashdip.bench.cases import PUBLISHED
from flashdip.bench.curves import curve, fitted, ours, subject
from flashdip.bench.quality import FORMAT, current, reached, read, write
from flashdip.engine import images, presets
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import InputError
from flashdip.engine.fit import fit
from flashdip.engine.networks.skip import SkipConfig

TINY = FitConfig(
    network=SkipConfig(inputs=4, down=(8, 8), upsample="nearest"), iterations=20, precision="fp32"
)


def made(picture: str, preset: str, decibels: list[float], runs: int = 1) -> dict[str, Any]:
    """A fit as it is recorded, a reading every ten iterations."""
    return {
        "picture": picture,
        "preset": preset,
        "seed": 0,
        "runs": runs,
        "iterations": [10 * (index + 1) for index in range(len(decibels))],
        "decibels": decibels,
        "precision": "fp32",
        "commit": "abc",
        "config": fitted(preset).record(),
    }


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """All presets take moments; `best` is the mean of two runs."""
    monkeypatch.setattr(
        presets,
        "PRESETS",
        {
            key: replace(each, config=replace(TINY, runs=2 if key[1] == "best" else 1))
            for key, each in presets.PRESETS.items()
        },
    )


def test_runs_are_judged_by_their_mean() -> None:
    """As `fit` averages them, from the same seeds."""
    problem, clean = subject("astronaut", 32, None)
    config = replace(TINY, runs=2, seed=3)
    found = curve(problem, clean, config, device="cpu")
    assert (found["iterations"], found["ended"]) == ([10, 20], "fixed")
    result = fit(problem, config, backend="native", device="cpu", truth=clean)
    assert found["decibels"][-1] == pytest.approx(result.psnr, abs=2e-3)
    single = fit(problem, replace(config, runs=1), backend="native", device="cpu", truth=clean)
    assert single.psnr is not None
    assert abs(single.psnr - found["decibels"][-1]) > 1e-2


def test_a_fit_ends_past_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, clean = subject("astronaut", 32, None)
    values = iter([20.0, 22.0, 21.0, 21.5, 25.0])
    monkeypatch.setattr(curves, "psnr", lambda image, truth: next(values))
    found = curve(problem, clean, replace(TINY, iterations=50), device="cpu", past=20)
    assert found["decibels"] == [20.0, 22.0, 21.0, 21.5]
    assert found["ended"] == "past its peak"
    assert curves.peak(found["iterations"], found["decibels"]) == (22.0, 20)


def test_interrupted_fits_say_so() -> None:
    problem, clean = subject("astronaut", 32, None)
    found = curve(problem, clean, TINY, device="cpu", interrupted=lambda: True)
    assert (found["ended"], found["iterations"]) == ("interrupted", [])


def test_what_counts_is_the_first_time_near_the_peak() -> None:
    fits = [
        made("a", PUBLISHED, [28.0, 29.85, 30.0, 29.0]),
        made("a", "quick", [29.0, 29.79, 29.81, 29.9], runs=3),
        made("a", "best", [29.0, 29.1]),
        made("b", "quick", [40.0]),  # nothing to compare it with
    ]
    base, quick, best = reached(fits)
    assert (base.target_db, base.reached_at, base.peak_db, base.peak_at) == (29.8, 20, 30.0, 30)
    assert (quick.target_db, quick.reached_at, quick.peak_at, quick.runs) == (29.8, 30, 40, 3)
    assert (best.reached_at, best.peak_db) == (None, 29.1)
    assert [each.matched_at for each in (base, quick, best)] == [30, None, None]


def test_a_preset_that_was_changed_is_known(monkeypatch: pytest.MonkeyPatch, tiny: None) -> None:
    """Not by what only decides when a fit ends."""
    fit = json.loads(json.dumps(made("a", "quick", [30.0])))
    assert current(fit)
    key = ("denoise", "quick")
    for changes, same in (({"patience": 7, "stop": ("es-emv",)}, True), ({"eps": 1e-6}, False)):
        own = replace(presets.PRESETS[key], config=replace(TINY, **changes))
        monkeypatch.setattr(presets, "PRESETS", presets.PRESETS | {key: own})
        assert current(fit) is same
    assert not current(fit | {"preset": "no longer there"})
    assert PUBLISHED not in ours() and "quick" in ours()


def test_a_field_that_came_later_was_at_its_default(tiny: None) -> None:
    """So that what was recorded before stays as good as it was."""
    fit = json.loads(json.dumps(made("a", "quick", [30.0])))
    del fit["config"]["add_back"]
    assert current(fit)
    assert not current(fit | {"config": fit["config"] | {"add_back": 0.5}})


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Result]:
    def call(*options: str) -> Result:
        file = str(tmp_path / "quality.json")
        common = ["record", "--size", "64", "--device", "cpu", "-o", file]
        return CliRunner().invoke(quality.app, [*common, *options])

    return call


def test_a_second_run_goes_on(
    record: Callable[..., Result], tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is not made again, unless its preset was changed; nothing is lost."""
    asked: list[tuple[str, str]] = []
    real = curves.entry

    def watched(name: str, problem: Any, clean: Any, wanted: str, *rest: Any, **more: Any) -> Any:
        asked.append((name, wanted))
        return real(name, problem, clean, wanted, *rest, **more)

    monkeypatch.setattr(quality, "entry", watched)
    assert record("--pictures", "astronaut", "--presets", "quick").exit_code == 0
    assert asked == [("astronaut", PUBLISHED), ("astronaut", "quick")]
    asked.clear()
    found = record("--pictures", "astronaut,coffee", "--presets", "quick,best")
    assert found.exit_code == 0, found.output
    assert asked[0] == ("astronaut", "best") and len(asked) == 4
    assert "| coffee" in found.output
    written = read(tmp_path / "quality.json")
    assert written["size"] == 64
    assert [each["runs"] for each in written["fits"]] == [1, 1, 2, 1, 1, 2]
    whole = json.loads((tmp_path / "quality.json").read_text())
    assert "bench/published.py" in whole["about"]
    assert whole["reached"] == [each._asdict() for each in reached(written["fits"])]

    key = ("denoise", "quick")
    own = replace(presets.PRESETS[key], config=replace(TINY, learning_rate=0.02))
    monkeypatch.setattr(presets, "PRESETS", presets.PRESETS | {key: own})
    shown = CliRunner().invoke(quality.app, ["show", "-o", str(tmp_path / "quality.json")])
    assert "coffee, quick: that preset is another by now" in shown.output
    asked.clear()
    assert record("--pictures", "coffee", "--presets", "quick,best").exit_code == 0
    assert asked == [("coffee", "quick")]
    assert len(read(tmp_path / "quality.json")["fits"]) == 6


def test_interruption_keeps_what_is_done(
    record: Callable[..., Result], tmp_path: Path, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = curves.entry
    calls: list[str] = []

    def stopped(*arguments: Any, interrupted: Any, **options: Any) -> Any:
        calls.append(arguments[3])
        if len(calls) == 2:
            interrupted.signal = 2
        return real(*arguments, interrupted=interrupted, **options)

    monkeypatch.setattr(quality, "entry", stopped)
    found = record("--pictures", "astronaut", "--presets", "quick,best")
    assert found.exit_code == 130
    assert "2 fits are left" in found.output
    assert [fit["preset"] for fit in read(tmp_path / "quality.json")["fits"]] == [PUBLISHED]
    other = CliRunner().invoke(
        quality.app,
        ["record", "--pictures", "astronaut", "--size", "96", "-o", f"{tmp_path}/quality.json"],
    )
    assert "expected 64" in str(other.exception)


def test_pairs_are_cut_out_of(tmp_path: Path) -> None:
    folder = tmp_path / "denoise25"
    folder.mkdir()
    draw = np.random.default_rng(0)

    def put(name: str, shape: tuple[int, int, int]) -> np.ndarray[Any, Any]:
        pixels = draw.integers(0, 256, shape, dtype=np.uint8)
        images.save(folder / name, images.Picture((pixels / 255).astype(np.float32)))
        return pixels

    truth, noisy = put("house_GT.png", (70, 64, 3)), put("house_noisy.png", (70, 64, 3))
    problem, clean = subject("house", 64, tmp_path)
    assert torch.equal((clean * 255).round().byte(), torch.tensor(truth[3:67]).movedim(-1, 0))
    observed = (problem.observation[0] * 255).round().byte()
    assert torch.equal(observed, torch.tensor(noisy[3:67]).movedim(-1, 0))
    assert problem.sigma == pytest.approx(25 / 255)
    for each in ("grey_GT.png", "grey_noisy.png"):
        put(each, (64, 64, 1))
    with pytest.raises(InputError, match="expected three channels, got 1"):
        subject("grey", 64, tmp_path)
    with pytest.raises(InputError, match="expected sides of 96 pixels at least, got 64"):
        subject("house", 96, tmp_path)
    with pytest.raises(InputError, match="expected a photograph of scikit-image"):
        subject("house", 64, None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, f"expected the format '{FORMAT}'"),
        ({"version": 9}, "expected version 1, got 9"),
        ({"fits": {}}, "expected a size and a list of fits"),
        ({"fits": [{"picture": "a"}]}, "a fit lacks one of"),
    ],
)
def test_files_that_are_none_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    write(file, 64, [made("a", PUBLISHED, [30.0])])
    assert read(file)["fits"][0]["decibels"] == [30.0]
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=said):
        read(file)
    file.write_text("{")
    with pytest.raises(InputError, match="expected JSON"):
        read(file)
    with pytest.raises(InputError, match="cannot be read"):
        read(tmp_path / "none.json")


def test_what_comes_along_can_be_read() -> None:
    """Presets may be others by now; what is told of the curves is theirs."""
    if not quality.FILE.exists():
        pytest.skip("nothing was recorded")
    found = read(quality.FILE)
    told = json.loads(quality.FILE.read_text(encoding="utf-8"))["reached"]
    assert told == [each._asdict() for each in reached(found["fits"])]
