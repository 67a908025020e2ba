"""From a file to a file: what is published, what is kept, what is made again, what is refused."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flashdip.engine.batch.inputs import Found, Maker
from flashdip.engine.batch.jobs import Outcome
from flashdip.engine.batch.pictures import PictureJob
from flashdip.engine.batch.storage import Outputs
from flashdip.engine.batch.worker import HopelessError, Station, perform
from flashdip.engine.errors import DivergedError, InputError, OutputError
from flashdip.engine.images import load
from tests.batches import write_bad, write_pictures

OPTIONS: dict[str, Any] = {
    "preset": "quick",
    "iterations": 4,
    "precision": "fp32",
    "sigma": 20.0,
    "settings": {"network.down": "8,8", "network.inputs": "4", "read_every": "2"},
}
CPU = Station("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_pictures(tmp_path / "in", 6)
    (tmp_path / "out").mkdir()
    Outputs(str(tmp_path / "out")).prepare()
    return tmp_path


def jobs(folder: Path, *names: str, task: str = "denoise", **more: Any) -> list[PictureJob]:
    options = OPTIONS | more.pop("options", {})
    given: dict[str, Any] = {"own": {}} | more
    maker = Maker(task, options, outputs=Outputs(str(folder / "out")), **given)
    return [job for job, _ in maker.jobs([Found(str(folder / "in" / n), n) for n in names])]


def done(work: list[PictureJob]) -> dict[str, Outcome]:
    outcomes = list(perform(work, CPU))
    assert sorted(each.name for each in outcomes) == sorted(job.name for job in work)
    return {each.name: each for each in outcomes}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "out").glob("*.png")}


def test_what_is_published_is_a_picture_and_its_record(folder: Path) -> None:
    (one, *_) = jobs(folder, "1.png")
    outcome = done([one])["1.png"]
    assert (outcome.state, outcome.reason, outcome.result) == ("done", None, None)
    assert load(folder / "out" / "1.png").pixels.shape == (16, 24, 3)
    record = json.loads((folder / "out" / "1.png.json").read_text())
    assert (record["task"], record["picture"], record["iterations"]) == ("denoise", "1.png", 4)
    assert outcome.record["iterations"] == 4
    assert (outcome.record["width"], outcome.record["height"]) == (24, 16)
    assert outcome.thumbnails is not None
    assert all(data[8:12] == b"WEBP" for data in outcome.thumbnails)
    assert {path.name for path in (folder / "out").iterdir()} == {
        *(".flashdip", "1.png", "1.png.json")
    }


def test_the_picture_is_the_one_that_the_task_makes_by_itself(folder: Path) -> None:
    from flashdip.engine.tasks import denoise

    work = jobs(folder, "1.png", "3.png", options={"seed": 5})
    done(work)
    options: Any = OPTIONS | {"seed": 5}
    for job in work:
        alone = denoise(job.source, **options).image.permute(1, 2, 0).numpy()
        batch = load(folder / "out" / job.name).pixels
        assert np.abs(batch - alone).max() < 1.5 / 255


def test_what_was_published_is_kept_and_never_made_again(folder: Path) -> None:
    names = ("1.png", "2.png")
    first = done(jobs(folder, *names))
    before = times(folder)
    second = done(jobs(folder, *names))
    assert {each.state for each in second.values()} == {"kept"}
    assert times(folder) == before
    for name in names:
        assert second[name].record == first[name].record
        assert second[name].thumbnails == first[name].thumbnails


def test_whatever_decides_the_result_makes_it_anew(folder: Path) -> None:
    source = folder / "in" / "1.png"

    def again(**more: Any) -> str:
        return done(jobs(folder, "1.png", **more))["1.png"].state

    assert again() == "done"
    assert again(options={"seed": 1}) == "done"
    assert again(options={"seed": 1}) == "kept"
    assert again() == "done"
    assert again(options={"sigma": 21.0}) == "done"
    assert again(options={"sigma": 21.0}, truth=str(source)) == "done"
    assert again(task="dejpeg") == "done"
    assert again(task="dejpeg") == "kept"
    Image.fromarray(np.full((16, 24, 3), 99, np.uint8)).save(source)
    assert again(task="dejpeg") == "done"
    stored = source.stat()
    os.utime(source, ns=(stored.st_atime_ns, stored.st_mtime_ns + 10**9))
    assert again(task="dejpeg") == "kept"


def test_a_record_without_its_very_picture_counts_for_nothing(folder: Path) -> None:
    picture, record = folder / "out" / "1.png", folder / "out" / "1.png.json"
    done(jobs(folder, "1.png"))
    good = picture.read_bytes()
    picture.unlink()
    assert done(jobs(folder, "1.png"))["1.png"].state == "done"
    picture.write_bytes(good[:-7])
    assert done(jobs(folder, "1.png"))["1.png"].state == "done"
    picture.write_bytes((folder / "in" / "1.png").read_bytes())
    assert done(jobs(folder, "1.png"))["1.png"].state == "done"
    record.write_text(record.read_text()[:40])
    outcome = done(jobs(folder, "1.png"))["1.png"]
    assert outcome.state == "failed"  # nobody knows any more whose picture it is
    assert "--force" in str(outcome.reason)


def test_files_of_others_are_replaced_only_by_force(folder: Path) -> None:
    theirs = folder / "out" / "1.png"
    theirs.write_bytes(b"somebody's")
    outcome = done(jobs(folder, "1.png"))["1.png"]
    assert outcome.state == "failed"
    assert theirs.read_bytes() == b"somebody's"
    assert not (folder / "out" / "1.png.json").exists()
    assert done(jobs(folder, "1.png", force=True))["1.png"].state == "done"


def test_bad_pictures_fail_with_a_reason_and_the_rest_go_on(folder: Path) -> None:
    bad = write_bad(folder / "in")
    outcomes = done(jobs(folder, *bad, "1.png", "missing.png", "2.png"))
    states = {name: outcome.state for name, outcome in outcomes.items()}
    assert states == dict.fromkeys((*bad, "missing.png"), "failed") | {
        "1.png": "done",
        "2.png": "done",
    }
    for name in (*bad, "missing.png"):
        reason = outcomes[name].reason
        assert reason is not None
        assert name in reason
        assert "\n" not in reason


def test_masks_factors_and_truths(folder: Path) -> None:
    mask = np.full((16, 24), 255, np.uint8)
    mask[4:8, 4:8] = 0
    Image.fromarray(mask).save(folder / "mask.png")
    source = folder / "in" / "1.png"
    outcome = done(
        jobs(folder, "1.png", task="inpaint", mask=str(folder / "mask.png"), truth=str(source))
    )["1.png"]
    assert outcome.reason is None
    assert outcome.record["psnr"] > 10
    known = mask > 0
    given, filled = load(source).pixels, load(folder / "out" / "1.png").pixels
    assert np.array_equal(given[known], filled[known])
    assert not np.array_equal(given[~known], filled[~known])

    assert done(jobs(folder, "3.png", task="superres", own={"factor": 2}))["3.png"].reason is None
    assert load(folder / "out" / "3.png").pixels.shape == (32, 32, 3)


def test_formats_are_checked_before_the_fit(folder: Path) -> None:
    rgba = np.full((16, 16, 4), 120, np.uint8)
    rgba[:8, :, 3] = 60
    Image.fromarray(rgba).save(folder / "in" / "clear.png")
    outcome = done(jobs(folder, "clear.png", suffix=".jpg"))["clear.jpg"]
    assert "opaque picture for JPEG" in str(outcome.reason)


def test_links_lead_nowhere_outside(folder: Path) -> None:
    outside = folder / "outside"
    outside.mkdir()
    (folder / "out" / "below").symlink_to(outside)
    (folder / "out" / "1.png").symlink_to(outside / "target.png")
    outcomes = done(jobs(folder, "below/0.png", "1.png"))
    assert outcomes["below/0.png"].state == "failed"
    assert "link" in str(outcomes["below/0.png"].reason)
    assert outcomes["1.png"].state == "done"  # in place of the link
    assert not (folder / "out" / "1.png").is_symlink()
    assert not list(outside.iterdir())


def test_a_broken_disk_of_inputs_is_that_pictures_fault(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    genuine = Path.read_bytes

    def broken(path: Path) -> bytes:
        if path == folder / "in" / "1.png":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return genuine(path)

    monkeypatch.setattr(Path, "read_bytes", broken)
    outcomes = done(jobs(folder, "1.png", "3.png"))
    assert "Input/output error" in str(outcomes["1.png"].reason)
    assert outcomes["3.png"].state == "done"


def test_a_full_disk_is_nobodys_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HopelessError, match="disk is full"):
        next(perform(jobs(folder, "1.png", "3.png"), CPU))
    assert [path.name for path in (folder / "out").iterdir()] == [".flashdip"]
    assert not list((folder / "out" / ".flashdip" / "staging").iterdir())


def test_what_goes_wrong_together_is_tried_apart(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashdip.engine import fit_many as module

    genuine, sizes = module.fit_many, []

    def crowded(problems: Any, *arguments: Any, **options: Any) -> Any:
        sizes.append(len(problems))
        if len(problems) > 1:
            raise RuntimeError("CUDA out of memory")
        return genuine(problems, *arguments, **options)

    monkeypatch.setattr(module, "fit_many", crowded)
    outcomes = done(jobs(folder, "1.png", "2.png", "5.png"))
    assert {each.state for each in outcomes.values()} == {"done"}
    assert sorted(sizes) == [1, 1, 1, 2]


def test_what_is_too_large_is_tiled_and_goes_on_where_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its memory or by request; what an earlier run left of the tiles is used."""
    from flashdip.engine import tasks, tiled
    from flashdip.engine.fit import fit as genuine

    pixels = np.random.default_rng(0).integers(0, 255, (48, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "in" / "large.png")
    fitted: list[tuple[int, ...]] = []

    def fails_at_the_third(*arguments: Any, **options: Any) -> Any:
        fitted.append(arguments[0].shape)
        if len(fitted) == 3:
            raise RuntimeError("the power went")
        return genuine(*arguments, **options)

    monkeypatch.setattr(tiled, "fit", fails_at_the_third)
    (job,) = jobs(folder, "large.png", options={"tile": 32})
    assert done([job])["large.png"].state == "failed"
    assert done([job])["large.png"].state == "done"
    record = json.loads((folder / "out" / "large.png.json").read_text())
    assert record["tiles"]["grid"] == [2, 3]
    assert len(fitted) == 3 + 4  # two were done
    assert set(fitted) == {(3, 32, 32)}
    assert load(folder / "out" / "large.png").pixels.shape == (48, 80, 3)
    assert [path.name for path in (folder / "out" / ".flashdip").iterdir()] == ["staging"]
    assert done([job])["large.png"].state == "kept"

    asked: list[Any] = []

    def planned(stated: Any, options: Any) -> Any:
        asked.append(options)
        return genuine_plan(stated, options)

    genuine_plan = tasks.planned
    monkeypatch.setattr(tasks, "planned", planned)
    (plain,) = jobs(folder, "1.png")
    enough = replace(CPU, room=200, share=100)
    assert next(perform([replace(plain, memory=100)], enough)).state == "done"
    assert asked == []  # it fits into the room
    small = replace(CPU, room=1, share=1)
    outcome = next(perform([replace(plain, name="2.png", memory=100)], small))
    assert "memory" in str(outcome.reason)  # not even its tiles do
    assert asked[0]["memory"] > 1


def test_fits_that_diverge_before_any_image_fail(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashdip.engine import fit_many as module

    genuine = module.fit_many

    def diverging(problems: Any, *arguments: Any, **options: Any) -> Any:
        yield from (each for each in genuine(problems, *arguments, **options) if each[0] != 1)
        raise DivergedError("fits of the problems 1: expected a finite loss")

    monkeypatch.setattr(module, "fit_many", diverging)
    names = ("2.png", "5.png")
    outcomes = done(jobs(folder, *names))
    assert [outcomes[name].state for name in names] == ["done", "failed"]
    assert "learning_rate" in str(outcomes["5.png"].reason)


def test_outputs_elsewhere_are_reached_through_fsspec(folder: Path) -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    outputs = Outputs("memory://bucket/out")
    outputs.prepare()
    files.pipe_file("/bucket/in/1.png", (folder / "in" / "1.png").read_bytes())
    (job,) = jobs(folder, "1.png")
    job = replace(job, source="memory://bucket/in/1.png", outputs=outputs)
    assert done([job])["1.png"].state == "done"
    assert done([job])["1.png"].state == "kept"
    assert {Path(path).name for path in files.find("/bucket/out")} == {"1.png", "1.png.json"}
    files.pipe_file("/bucket/out/1.png", b"half")
    assert done([job])["1.png"].state == "done"
    assert outputs.read("nothing.png") is None


def test_a_bucket_is_an_input_like_a_folder(folder: Path) -> None:
    import fsspec

    from flashdip.engine.batch.inputs import expand

    files = fsspec.filesystem("memory")
    for name in ("a.png", "b/c.png", "b/.d.png", "notes.txt"):
        files.pipe_file(f"/pictures/{name}", b"x")
    outputs = Outputs("memory://elsewhere")

    def found(address: str) -> list[tuple[str, str]]:
        return [(one.source, one.name) for one in expand([address], outputs)]

    a, c = ("memory://pictures/a.png", "a.png"), ("memory://pictures/b/c.png", "b/c.png")
    assert found("memory://pictures") == [a, c]
    assert found("memory://pictures/*.png") == [a]
    assert found("memory://pictures/b/c.png") == [(c[0], "c.png")]
    with pytest.raises(InputError):
        found("memory://pictures/none")


def test_an_unusable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        Outputs(str(tmp_path / "file")).prepare()
