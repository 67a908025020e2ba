"""The format of results: what is refused, what is kept, what the documentation says of it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashdip.bench import leaderboard, schema
from flashdip.engine.errors import InputError, OutputError
from tests.bench.results import score, steps

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("made", [steps(0), score(100.0)], ids=["step", "gpu"])
def test_what_is_written_comes_back(made: dict[str, Any], tmp_path: Path) -> None:
    assert schema.problems(made) == []
    schema.write(tmp_path / "a.json", made)
    assert schema.read(tmp_path / "a.json") == made
    with pytest.raises(OutputError, match="--force"):
        schema.write(tmp_path / "a.json", made)


def set_at(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(result: dict[str, Any]) -> None:
        for key in path[:-1]:
            result = result[key]
        result[path[-1]] = to

    return change


def without(*path: Any) -> Callable[[dict[str, Any]], None]:
    def change(result: dict[str, Any]) -> None:
        for key in path[:-1]:
            result = result[key]
        del result[path[-1]]

    return change


WRONG = {
    "another format": (set_at("format", to="asv"), "format: expected 'flashdip-bench', got 'asv'"),
    "another version": (set_at("version", to=2), "version: expected 1, got 2"),
    "another kind": (set_at("kind", to="all"), "kind: expected one of step"),
    "no time": (set_at("created", to="yesterday"), "created: expected a time in ISO 8601"),
    "missing": (without("machine", "hardware", "cpu"), "machine.hardware.cpu: it is missing"),
    "null": (set_at("results", to=None), "results: expected objects, got null"),
    "unknown": (set_at("results", 1, "hours", to=3), "results[1].hours: there is no such field"),
    "not finite": (
        set_at("results", 0, "seconds", "p90", to=float("inf")),
        "results[0].seconds.p90: expected number, got inf",
    ),
    "negative": (set_at("results", 0, "memory", to=-1), "results[0].memory: expected count"),
    "a flag for a number": (set_at("results", 0, "ratio", to=True), "results[0].ratio: expected"),
    "out of order": (
        set_at("results", 0, "seconds", "p10", to=9.0),
        "results[0].seconds: expected 0 < p10 <= median <= p90",
    ),
    "too few samples": (
        set_at("results", 2, "seconds", "n", to=13),
        "results[2].seconds.samples: expected 13",
    ),
    "the same name": (set_at("results", 1, "name", to="native"), "results[1].name: expected"),
    "no such baseline": (
        set_at("results", 3, "baseline", to="other"),
        "results[3].baseline: expected a row, got other",
    ),
    "a ratio to nothing": (set_at("results", 3, "baseline", to=None), "results[3].ratio: expected"),
    "a failed gate": (
        set_at("results", 3, "gate", to={"output": {"error": 1.0, "allowed": 0.1}}),
        "results[3].gate.output: expected at most what is allowed",
    ),
    "half a gate": (
        set_at("results", 3, "gate", to={"output": {"error": 1.0}}),
        "results[3].gate.output.allowed: it is missing",
    ),
    "a score of nothing": (set_at("score", to={}), "score.restorations_per_hour: it is missing"),
    "nested parameters": (
        set_at("results", 0, "parameters", to={"a": {"b": 1}}),
        "results[0].parameters: expected plain",
    ),
    "a name that breaks the line": (
        set_at("machine", "hardware", "device", to="GPU\n\x1b[31m"),
        "machine.hardware.device: expected text",
    ),
}


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named(
    change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    made = copy.deepcopy(steps(0))
    change(made)
    assert any(line.startswith(said) for line in schema.problems(made)), schema.problems(made)
    (tmp_path / "a.json").write_text(json.dumps(made))
    with pytest.raises(InputError, match=r"a\.json: no result of"):
        schema.read(tmp_path / "a.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000])
def test_files_that_are_none_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"a\.json: "):
        schema.read(tmp_path / "a.json")
    with pytest.raises(InputError, match="cannot be read"):
        schema.read(tmp_path / "b.json")


def test_a_step_has_no_score_and_an_all_in_one_run_has_one() -> None:
    made = score(3.0)
    assert schema.problems(made | {"score": None}) == [
        "score: expected one where the kind is gpu, and null elsewhere"
    ]


def test_the_documentation_shows_the_format() -> None:
    assert schema.describe() in (ROOT / "docs" / "benchmarks.md").read_text()


def test_contributed_results_are_valid_and_drawn() -> None:
    """Whatever lies in bench/results; and the page there was drawn from just that."""
    results = ROOT / "bench" / "results"
    assert leaderboard.draw(leaderboard.collect(results)) == (
        results / "leaderboard.html"
    ).read_text(encoding="utf-8")


def test_the_leaderboard_ranks_and_escapes(tmp_path: Path) -> None:
    rates = {"slow": 10.0, "fast": 200.0, "middle": 50.0}
    for name, rate in rates.items():
        schema.write(tmp_path / f"{name}.json", score(rate, f"<b>{name}</b> & co"))
    page = leaderboard.draw(leaderboard.collect(tmp_path))
    order = [
        page.index(f"&lt;b&gt;{name}&lt;/b&gt; &amp; co") for name in ("fast", "middle", "slow")
    ]
    assert order == sorted(order)
    assert "<b>" not in page
    assert "5.0x" in page
    assert 'width="25.00"' in page  # of the bar: 50 of 200
    assert "3000, 900, -" in page
    for outside in ("http://", "https://", "src=", "url("):
        assert outside not in page
    schema.write(tmp_path / "step.json", steps(0))
    with pytest.raises(InputError, match=r"step\.json: expected a result of 'flashdip bench gpu'"):
        leaderboard.collect(tmp_path)
