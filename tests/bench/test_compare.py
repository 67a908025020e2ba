"""`flashdip bench compare`: 15 % is flagged, noise is not, and machines are not mixed up."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashdip import cli
from flashdip.bench import schema
from flashdip.bench.compare import Change, compare
from tests.bench.results import steps

RUNS = 20
Run = Callable[..., tuple[int, str, str]]


def verdicts(changes: list[Change]) -> dict[str, str]:
    return {change.name: change.verdict for change in changes}


def test_it_is_silent_on_runs_of_the_same() -> None:
    """Twenty runs against a first one, with the spread of a shared machine."""
    base = steps(1000)
    for seed in range(RUNS):
        assert set(verdicts(compare(base, steps(seed))).values()) == {"measure", "same"}, seed


def test_a_slow_down_of_15_percent_is_flagged() -> None:
    """In each of twenty runs, and in no row but its own; the other way round it is a gain."""
    base = steps(1000)
    for seed in range(RUNS):
        run = steps(seed, slower={"native": 1.15})
        found = verdicts(compare(base, run))
        assert found.pop("native") == "slower", seed
        assert set(found.values()) == {"measure", "same"}, seed
        assert verdicts(compare(run, base))["native"] == "faster", seed


def test_a_machine_in_another_mood_changes_nothing() -> None:
    """All rows take 1.5 times as long, the baseline too."""
    busy = steps(1, slower=dict.fromkeys(("published", "reference", "native"), 1.5))
    found = compare(steps(2), busy)
    assert verdicts(found)["native"] == "same"
    native = next(change for change in found if change.name == "native")
    assert native.relative
    assert 0.93 < native.times < 1.07
    assert native.after / native.before > 1.3


def test_without_a_baseline_seconds_are_compared() -> None:
    base, slow = steps(3), steps(4, slower=dict.fromkeys(("published", "native"), 1.3))
    for run in (base, slow):
        for row in run["results"]:
            row["baseline"] = row["ratio"] = None
    found = {change.name: change for change in compare(base, slow)}
    assert (found["native"].verdict, found["native"].relative) == ("slower", False)
    assert found["published"].verdict == "slower"


@pytest.mark.parametrize(("rounds", "spread"), [(1, 0.0), (4, 0.01), (12, 0.5)])
def test_what_cannot_be_told_is_said(rounds: int, spread: float) -> None:
    """A few samples do not tell their spread; wild ones have too much of it."""
    one, two = (steps(seed, rounds=rounds, spread=spread) for seed in (5, 6))
    assert set(verdicts(compare(one, two)).values()) == {"measure", "unclear"}


def test_rows_of_one_run_only_are_left_out() -> None:
    less = steps(0)
    del less["results"][2]
    assert "reference" not in verdicts(compare(steps(1), less))
    assert "reference" not in verdicts(compare(less, steps(1)))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)
    schema.write("base.json", steps(0))
    schema.write("same.json", steps(1))
    schema.write("slow.json", steps(2, slower={"native": 1.15}))
    other = copy.deepcopy(steps(3))
    other["machine"]["hardware"]["cpu"] = "another CPU"
    other["machine"]["software"]["torch"] = "2.14.0"
    schema.write("other.json", other)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashdip", "bench", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


def test_the_command_prints_and_fails_on_a_slow_down(run: Run) -> None:
    code, out, err = run("compare", "base.json", "same.json")
    assert (code, err, "SLOWER" in out) == (0, "", False)
    code, out, err = run("compare", "base.json", "same.json", "slow.json")
    assert (code, err) == (1, "")
    (line,) = (line for line in out.splitlines() if "SLOWER" in line)
    assert line.startswith("| native ")


def test_other_machines_are_refused_unless_asked_for(run: Run) -> None:
    code, out, err = run("compare", "base.json", "other.json")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "other.json: expected the machine of base.json" in err
    assert "cpu: another CPU, not a CPU" in err
    code, out, _ = run("compare", "base.json", "other.json", "--across-machines")
    assert code == 0
    assert "torch: 2.13.0 -> 2.14.0" in out


def test_a_picture_shows_every_row(run: Run) -> None:
    assert run("compare", "base.json", "slow.json", "--picture", "change.svg")[0] == 1
    drawing = Path("change.svg").read_text()
    for text in ("native", "published", "base.json", "slow.json"):
        assert f"<!-- {text}" in drawing
    code, _, err = run("compare", "base.json", "slow.json", "--picture", "change.svg")
    assert (code, "--force" in err) == (2, True)


def test_no_picture_without_matplotlib(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("compare", "base.json", "same.json", "--picture", "change.png")
    assert code == 2
    assert "pip install 'flashdip[plots]'" in err
    assert not Path("change.png").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("compare base.json", "expected two results or more, got 1"),
        ("compare base.json nowhere.json", "nowhere.json: cannot be read"),
        ("validate broken.json", "results[1].hours: there is no such field"),
        ("leaderboard nowhere", "nowhere: expected a folder of results"),
        ("step --fits 0", "--fits: expected whole numbers from 1, with commas, got '0'"),
        ("kernels --precisions fp9", "--precisions: expected fp32, bf16, got 'fp9'"),
        ("step --device abacus", "'abacus'"),
    ],
)
def test_bad_input_gets_one_line(run: Run, line: str, said: str) -> None:
    broken: dict[str, Any] = steps(0)
    broken["results"][1]["hours"] = 3
    Path("broken.json").write_text(json.dumps(broken))
    code, out, err = run(*line.split())
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("flashdip: error: ")
    assert said in err


def test_rows_of_one_result_alone_are_named(run: Run) -> None:
    result = json.loads(Path("base.json").read_text())
    (row,) = (row for row in result["results"] if row["name"] == "native")
    result["results"].remove(row)
    Path("less.json").write_text(json.dumps(result))
    for files in (("base.json", "less.json"), ("less.json", "base.json")):
        code, out, _ = run("compare", *files)
        assert (code, out.splitlines()[-1]) == (0, "only in base.json: native")


def test_a_file_is_the_same_as_itself(run: Run) -> None:
    code, out, _ = run("compare", "base.json", "base.json", "--picture", "same.png")
    assert code == 0
    lines = [line for line in out.splitlines() if line.startswith("| native")]
    assert [line.split("|")[4].strip() for line in lines] == ["1.000"]
    assert Path("same.png").stat().st_size > 1000


def test_files_are_validated_and_drawn(run: Run) -> None:
    assert run("validate", "base.json", "slow.json")[:2] == (
        0,
        "base.json: a result of 'flashdip bench step'\n"
        "slow.json: a result of 'flashdip bench step'\n",
    )
    Path("results").mkdir()
    assert run("leaderboard", "results")[:2] == (
        0,
        "results: 0, drawn into results/leaderboard.html\n",
    )
    assert "Nobody has contributed" in Path("results/leaderboard.html").read_text()
