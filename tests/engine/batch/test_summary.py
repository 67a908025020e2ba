"""What a batch leaves: numbers for programs, a table that is harmless, a page that is closed."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

from flashdip.engine.batch.jobs import Outcome
from flashdip.engine.batch.journal import Journal
from flashdip.engine.batch.progress import Tally
from flashdip.engine.batch.storage import Outputs
from flashdip.engine.batch.summary import FILES, table, write

EVIL = '<img src=x onerror="alert(1)">&.png'
RECORD = {
    **{"psnr": 31.5, "iterations": 40, "stop_reason": "es-wmv", "seconds_setup": 0.5},
    **{"seconds_fit": 2.0, "width": 24, "height": 16, "channels": 3, "notes": ["=1+1", "b"]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    outputs = Outputs(str(tmp_path))
    outputs.prepare()
    tally = Tally()
    with Journal(tmp_path / "journal") as journal:
        names = ["a.png", "b/c d.png", "javascript:alert(1).png", EVIL, "waits.png"]
        journal.add([(name, f"/in/{name}", 1) for name in names])
        outcomes = [
            Outcome("a.png", "done", record=RECORD, thumbnails=(b"before", b"after")),
            Outcome("b/c d.png", "kept", record={**RECORD, "psnr": None}),
            Outcome("javascript:alert(1).png", "done", record={**RECORD, "psnr": 9.0}),
            Outcome(EVIL, "failed", '=HYPERLINK("http://evil") <script>alert(2)</script>'),
        ]
        for outcome in outcomes:
            journal.ended(outcome, 1)
            tally.count(outcome)
        write(journal, outputs, "denoise", tally)
    return tmp_path


def test_the_numbers(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["counts"] == {
        **{"done": 2, "kept": 1, "failed": 1, "waiting": 1},
        "diverged": 0,
    }
    assert not summary["complete"]
    jobs = {job["name"]: job for job in summary["jobs"]}
    assert jobs["a.png"] == {"name": "a.png", "source": "/in/a.png", "state": "done",
                             "attempts": 0, "reason": None} | RECORD  # fmt: skip
    assert jobs["waits.png"]["state"] == "waiting"
    assert {path.name for path in folder.iterdir()} == {".flashdip", "journal", *FILES}


def test_no_cell_is_a_formula(folder: Path) -> None:
    rows = list(csv.DictReader(io.StringIO((folder / "summary.csv").read_text())))
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    (failed,) = (row for row in rows if row["state"] == "failed")
    assert failed["reason"].startswith("'=HYPERLINK")
    assert failed["name"] == EVIL
    (done,) = (row for row in rows if row["name"] == "a.png")
    assert (done["psnr"], done["notes"]) == ("31.5", "'=1+1; b")
    for start in ("=", "+", "-", "@", "\t=", "\r+", "\n @", "\0="):
        text = table([{"name": f"{start}cmd|' /C calc'!A0", "psnr": -1.5}])
        (row,) = csv.DictReader(io.StringIO(text, newline=""))
        assert row["name"].startswith(("'", "?"))
        assert row["psnr"] == "-1.5"


def test_the_page_holds_no_markup_from_outside(folder: Path) -> None:
    text = (folder / "index.html").read_text()
    assert "<img src=x" not in text
    assert "alert(2)</script>" not in text
    assert text.count("<script>") == 1
    assert "default-src 'none'" in text
    links = re.findall(r'href="([^"]*)"', text)
    assert sorted(links) == ["a.png", "b/c%20d.png", "javascript%3Aalert%281%29.png"]
    assert len(re.findall(r"<tr><td", text)) == 5
    assert text.count("data:image/webp") == 2
    assert "31.50" in text
    assert text.index("HYPERLINK") < text.index(">a.png<")  # what failed comes first


def test_a_long_page_is_cut_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashdip.engine.batch.summary.MOST_ROWS", 2)
    outputs = Outputs(str(tmp_path))
    outputs.prepare()
    with Journal(":memory:") as journal:
        journal.add([(name, "/in", 1) for name in ("a.png", "b.png", "c.png")])
        journal.ended(Outcome("c.png", "failed", "broken"), 1)
        assert len(write(journal, outputs, "denoise", Tally())["jobs"]) == 3
    text = (tmp_path / "index.html").read_text()
    assert "3 pictures" in text
    assert "Shown: the first 2" in text
    assert re.findall(r'data-key="(.\.png)"', text) == ["c.png", "a.png"]
