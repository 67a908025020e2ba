"""The search for presets: what goes on to the next round, and that it can be interrupted."""

from pathlib import Path

import pytest

from flashdip.bench import recipes
from flashdip.bench.recipes import Curve, Journal, Rung, damaged, draw, front, picture, search
from flashdip.engine.errors import ConfigError, InputError

TINY = {
    "network.down": "8,8",
    "network.inputs": "4",
    "network.upsample": "nearest",
    "iterations": "20",
    "precision": "fp32",
    "window": "5",
}
RUNG = Rung("small", ("astronaut",), 32, (0,))


def test_the_front_is_told_from_what_stays_below_it() -> None:
    """A recipe counts where it comes closest: by being cheap, or by being good."""
    cheap = Curve([10, 20], [28.0, 29.5], [1.0, 2.0])
    good = Curve([10, 20], [28.0, 31.0], [10.0, 20.0])
    worse = Curve([10, 20], [27.0, 30.0], [10.0, 20.0])
    below = front({"cheap": cheap, "good": good, "worse": worse})
    assert (below["cheap"], below["good"]) == (0, 0)
    assert below["worse"] == pytest.approx(1)
    assert good.best == (31.0, 20)
    assert (good.within(15), good.within(5)) == (28.0, 0.0)


def test_a_search_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial is made once; a line that was cut off is made again."""
    file = tmp_path / "trials.jsonl"
    two = {"fast": TINY, "slow": {**TINY, "learning_rate": "0.001"}}
    curves = search("denoise", two, [RUNG], Journal(file), None, tell=lambda line: None)
    assert curves["fast"].iterations == [10, 20]
    assert curves["fast"].best[0] > curves["slow"].best[0]
    draw(curves, tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 0

    first, second = file.read_text().splitlines()
    file.write_text(f"{first}\n{second[:50]}")
    calls: list[str] = []
    real = recipes.trial

    def counted(*arguments: object) -> dict[str, object]:
        calls.append("trial")
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(recipes, "trial", counted)
    again = search("denoise", two, [RUNG], Journal(file), None, tell=lambda line: None)
    assert len(calls) == 1
    assert again["fast"] == curves["fast"]
    assert again["slow"].decibels == curves["slow"].decibels
    assert len(file.read_text().splitlines()) == 2


def test_problems_of_each_task() -> None:
    """Their operator takes the picture to the observation; what is unknown is named."""
    clean = picture("astronaut", 32, None)
    for task in ("superres", "restore"):
        problem = damaged(task, clean, 0)
        assert (problem.operator(clean[None]) - problem.observation).abs().max() < 1e-6
    assert damaged("denoise", clean, 0).sigma == pytest.approx(25 / 255)
    with pytest.raises(ConfigError, match="task: expected denoise, restore or superres"):
        damaged("dejpeg", clean, 0)
    with pytest.raises(InputError, match=r"nobody: expected NAME_GT\.png"):
        picture("nobody", 32, None)
