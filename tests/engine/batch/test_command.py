"""`flashdip batch` as a person meets it: plans, manifests, watched folders, exit codes."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from flashdip.engine.batch.jobs import Outcome
from flashdip.engine.batch.progress import Tally, show_batch
from tests.batches import published, start, write_bad, write_pictures

FAST = ("--workers", "2", "--iterations", "10", "--stop", "fixed")


def test_a_manifest_and_what_is_left_at_the_end(tmp_path: Path) -> None:
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    write_pictures(inputs, 4)
    write_bad(inputs)
    (inputs / "list.csv").write_text(
        "image,output,seed,truth\n1.png,one/1.png,3,1.png\n2.png,,,\nempty.png,,,\n"
    )
    process = start(inputs / "list.csv", outputs, *FAST, "--json")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (1, "")
    summary = json.loads(out)
    assert summary == json.loads((outputs / "summary.json").read_text())
    assert summary["counts"] == {"done": 2, "kept": 0, "failed": 1, "waiting": 0, "diverged": 0}
    jobs = {job["name"]: job for job in summary["jobs"]}
    assert jobs["one/1.png"]["seed"] == 3
    assert jobs["one/1.png"]["psnr"] > 10
    assert jobs["empty.png"]["state"] == "failed"
    assert sorted(published(outputs)) == ["2.png", "one/1.png"]


def test_presets_of_several_runs(tmp_path: Path) -> None:
    """The mean of each picture's."""
    write_pictures(tmp_path / "in", 2)
    process = start(tmp_path / "in", tmp_path / "out", *FAST, "--set", "runs=3", "--json")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert json.loads(out)["counts"]["done"] == 2
    for name in published(tmp_path / "out"):
        record = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert [run["seed"] for run in record["runs"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--preset", "nothing"), "nothing"),
        (("--workers", "0"), "workers"),
        (("--device", "cuda:7"), "device"),
        (("--task", "superres"), "factor"),
        (("--mask", "mask.png"), "mask"),
        (("--ray", "auto", "--workers", "2"), "workers"),
        (("--format", "gif"), "gif"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    tmp_path: Path, more: tuple[str, ...], words: str
) -> None:
    write_pictures(tmp_path / "in", 1)
    process = start(tmp_path / "in", tmp_path / "out", *more)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1), err
    assert words in err


def test_a_dry_run_plans_and_touches_nothing(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", 6)
    (tmp_path / "in" / "empty.png").write_bytes(b"")
    more = ("--workers", "2", "--iterations", "10", "--dry-run")
    process = start(tmp_path / "in", tmp_path / "out", *more, "--json")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    plan = json.loads(out)
    assert plan["pictures"] == 7
    assert [station["device"] for station in plan["workers"]] == ["cpu", "cpu"]
    groups = {(group["width"], group["height"]): group for group in plan["groups"]}
    expected = {(16, 16): 2, (24, 16): 2, (32, 32): 2, (None, None): 1}
    assert {size: group["pictures"] for size, group in groups.items()} == expected
    large, small = groups[32, 32], groups[16, 16]
    assert large["memory_bytes"] >= small["memory_bytes"] > 100e6
    assert large["seconds"] > small["seconds"] > 0
    each = [group["seconds"] * group["pictures"] for group in plan["groups"] if group["seconds"]]
    assert plan["seconds"] == pytest.approx(sum(each) / 2)
    assert not (tmp_path / "out").exists()


def test_a_watched_folder_is_served_until_ctrl_c(tmp_path: Path) -> None:
    inputs, outputs, later = tmp_path / "in", tmp_path / "in" / "out", tmp_path / "later"
    write_pictures(inputs, 2)
    write_pictures(later, 3)
    process = start(inputs, outputs, *FAST, "--watch")

    def wait(count: int) -> dict[str, tuple[int, str]]:
        until = time.monotonic() + 60
        while True:
            found = published(outputs) if outputs.exists() else {}
            if len(found) >= count:
                return found
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < until
            time.sleep(0.1)

    first = wait(2)
    growing = inputs / "2.png"
    data = (later / "2.png").read_bytes()
    with growing.open("wb") as file:
        file.write(data[: len(data) // 2])
    time.sleep(1)  # less than lies between two looks
    growing.write_bytes(data)
    shutil.copy(later / "2.png", inputs / "1.png")  # in place of another picture
    found = wait(3)
    until = time.monotonic() + 30
    while found.get("1.png", first["1.png"]) == first["1.png"]:  # not there while it is replaced
        assert time.monotonic() < until
        time.sleep(0.1)
        found = published(outputs)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert found["below/0.png"] == first["below/0.png"]
    summary = json.loads((outputs / "summary.json").read_text())
    assert {job["name"]: job["state"] for job in summary["jobs"]} == {
        **{"1.png": "done", "2.png": "done", "below/0.png": "done"}
    }


def outcomes() -> list[Outcome]:
    ended = [Outcome(f"{i}.png", "done") for i in range(3)]
    ended.append(Outcome("[red]bad[/red].png", "failed", "it is broken"))
    return [*ended, Outcome("k.png", "kept"), Outcome("d.png", "done", record=DIVERGED)]


DIVERGED = {"stop_reason": "diverged"}


def test_a_tally_in_words() -> None:
    tally = Tally(left=6, running=2)
    for outcome in outcomes():
        tally.count(outcome)
    tally.part = 0.4
    tally._begun -= 3600
    assert (tally.done, tally.kept, tally.failed, tally.diverged) == (4, 1, 1, 1)
    line = "4 done, 1 kept, 2 running, 1 failed, 6 left, 4 an hour, 1:30:00 to go"
    assert tally.line() == line
    assert "to go" not in Tally(left=6).line()


def test_a_file_gets_a_line_for_each_failure(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally()
    with show_batch(quiet=False) as show:
        for outcome in (*outcomes(), None):
            show(tally, outcome)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line for line in err.splitlines() if "broken" in line] == [
        "batch: [red]bad[/red].png: it is broken"
    ]
    assert len(err.splitlines()) == 2


def test_a_terminal_gets_a_live_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    tally = Tally(left=7, part=0.5)
    with show_batch(quiet=False) as show:
        for outcome in outcomes():
            tally.count(outcome)
            show(tally, outcome)
    err = capsys.readouterr().err
    assert "[red]bad[/red].png: it is broken" in err
    assert "an hour" in err
    assert "to go" in err


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with show_batch(quiet=True) as show:
        show(Tally(), outcomes()[3])
    assert capsys.readouterr() == ("", "")
