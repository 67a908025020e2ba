"""When a watched file is taken: when it is complete, once, and again when it changes."""

import os
from pathlib import Path

import pytest

from flashdip.engine.batch import watch
from flashdip.engine.batch.inputs import Maker
from flashdip.engine.batch.storage import Outputs
from flashdip.engine.batch.watch import RefusedJob, Watched
from flashdip.engine.errors import InputError
from tests.batches import write_pictures


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(watch, "SECONDS", -1.0)
    return tmp_path / "in"


def watched(folder: Path, suffix: str | None = None) -> Watched:
    outputs = Outputs(str(folder.parent / "out"))
    return Watched([str(folder)], Maker("denoise", {"preset": "quick"}, {}, outputs, suffix=suffix))


def names(source: Watched) -> list[str]:
    return [job.name for job, _ in source.look()]


def test_a_file_is_taken_when_two_looks_agree_and_again_when_it_changes(folder: Path) -> None:
    source = watched(folder)
    assert names(source) == []  # not even the folder is there
    write_pictures(folder, 2)
    assert names(source) == []
    assert names(source) == ["1.png", "below/0.png"]
    assert names(source) == []
    path = folder / "1.png"
    with path.open("ab") as file:
        file.write(b"more")
    assert names(source) == []
    with path.open("ab") as file:
        file.write(b"and more")
    assert names(source) == []  # it still grows
    assert names(source) == ["1.png"]
    stamp = path.stat()
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert (names(source), names(source)) == ([], ["1.png"])
    path.unlink()
    assert (names(source), names(source)) == ([], [])
    assert not source.over


def test_what_cannot_be_a_job_is_refused_by_itself(folder: Path) -> None:
    """Two of one output, and a name that cannot be written down."""
    write_pictures(folder, 2)
    source = watched(folder, ".webp")
    assert (names(source), names(source)) == ([], ["1.webp", "below/0.webp"])
    (folder / "1.tif").write_bytes(b"")
    Path(os.fsdecode(bytes(folder) + b"/\xff.png")).write_bytes(b"")
    source.look()
    refused = {job.name: job for job, _ in source.look()}
    assert set(refused) == {"1.tif", "?.png"}
    for job in refused.values():
        assert isinstance(job, RefusedJob)
        job.name.encode()
        with pytest.raises(InputError, match="expected"):
            job.open()
