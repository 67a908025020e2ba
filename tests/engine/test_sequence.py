"""Sequences: what comes in goes out likewise, each from the one before, nothing done twice."""

import json
import sys
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from flashdip import cli
from flashdip.engine.errors import ConfigError, ImageError, InputError
from flashdip.engine.events import Event, Noted, Started
from flashdip.engine.frames import open_frames
from flashdip.engine.images import MAX_PIXELS
from flashdip.engine.sequence import savings, sequence
from flashdip.engine.tasks import denoise

TINY: dict[str, Any] = {
    "iterations": 8,
    "precision": "fp32",
    "sigma": 20,
    "device": "cpu",
    "settings": {"network.down": "8,8", "network.inputs": "4", "read_every": "2"},
}
LINE = (
    *("--set", "network.down=8,8", "--set", "network.inputs=4", "--set", "read_every=2"),
    *("--iterations", "8", "--precision", "fp32", "--sigma", "20", "--device", "cpu"),
)


def frame(index: int, channels: int = 3, height: int = 24, width: int = 32) -> np.ndarray:
    """Return one noisy frame of waves that wander, 8 bits."""
    y, x = np.mgrid[:height, :width] / width
    waves = [np.sin(4 * x + c + 0.1 * index) * np.cos(3 * y) for c in range(channels)]
    clean = 130 + 80 * np.stack(waves, axis=2)
    noise = np.random.default_rng(index).normal(0, 20, clean.shape)
    pixels: np.ndarray = np.clip(clean + noise, 1, 254).astype(np.uint8)
    return pixels


def test_each_begins_with_the_weights_of_the_one_before() -> None:
    """And may do half the iterations; what that saved is recorded."""
    frames = [frame(index) for index in range(3)]
    results = list(sequence(frames, **TINY))
    first = denoise(frames[0], **TINY)
    second = denoise(frames[1], **TINY | {"iterations": 4, "init": first})
    assert torch.equal(results[0].image, first.image)
    assert torch.equal(results[1].image, second.image)
    assert [result.iterations for result in results] == [8, 4, 4]
    assert [result.record["sequence"]["saved"] for result in results] == [None, 4, 4]
    saved = savings([result.record for result in results])
    assert saved == {
        "frames": 3,
        "cold": 1,
        "warm": 2,
        "cold_iterations": 8.0,
        "warm_iterations": 4.0,
        "saved": 0.5,
    }


def test_a_stopping_rule_ends_a_warm_fit_sooner() -> None:
    """At the same residual: that is what is saved, and not by asking for fewer."""
    options = TINY | {"iterations": 400, "stop": "discrepancy", "sigma": 22}
    results = list(sequence((frame(index) for index in range(3)), **options))
    assert all(result.stop_reason == "discrepancy" for result in results)
    first, *others = (result.iterations for result in results)
    assert max(others) < 0.6 * first


def test_frames_are_asked_for_one_at_a_time() -> None:
    """A camera may make them; a frame of another size begins anew."""
    asked = []

    def camera() -> Any:
        for index, width in enumerate((32, 32, 40)):
            asked.append(index)
            yield frame(index, width=width)

    events: list[Event] = []
    results = sequence(camera(), "dejpeg", callback=events.append, **TINY)
    next(results)
    assert asked == [0]
    rest = list(results)
    assert [result.iterations for result in rest] == [4, 8]
    assert Noted("frame 3 cannot begin with the weights of the one before") in events
    with pytest.raises(ConfigError, match="task: expected one of denoise"):
        sequence(camera(), "sharpen")
    with pytest.raises(ConfigError, match="truth: expected none with a sequence"):
        sequence(camera(), truth=frame(0))
    with pytest.raises(TypeError, match="'speed'"):
        next(sequence(camera(), speed=3))


class After:
    """Interrupts after so many questions."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


@pytest.mark.parametrize("at", [5, 11, 14])
def test_a_stopped_sequence_goes_on(tmp_path: Path, at: int) -> None:
    """Frames that are done are not done again; the last ones have the same bits."""
    frames = [frame(index) for index in range(4)]
    whole = list(sequence(frames, **TINY))
    kept = tmp_path / "kept"
    part = list(sequence(frames, **TINY, checkpoint=kept, interrupted=After(at)))
    assert part[-1].stop_reason == "interrupted"
    done = len(part) - 1
    events: list[Event] = []
    rest = list(sequence(frames, **TINY, checkpoint=kept, callback=events.append))
    assert sum(isinstance(event, Started) for event in events) == 4 - done
    assert torch.equal(rest[-1].image, whole[-1].image)
    first = rest[0].picture.pixels
    np.testing.assert_allclose(first, whole[0].picture.pixels.clip(0, 1), atol=1 / 255)
    assert savings([r.record for r in rest]) == savings([r.record for r in whole])
    assert [p.parent.name for p in kept.rglob("fit.safetensors")] == ["frame-00003"]
    with pytest.raises(InputError, match="belongs to another sequence or other settings"):
        list(sequence(frames[::-1], **TINY, checkpoint=kept))
    for other in ({"seed": 3}, {"init": whole[0]}):
        with pytest.raises(InputError, match="belongs to another sequence or other settings"):
            list(sequence(frames, **TINY | other, checkpoint=kept))


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path: Path) -> None:
    for index in (10, 2, 1):
        Image.fromarray(frame(index)).save(tmp_path / f"f{index}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    frames = open_frames(tmp_path, MAX_PIXELS)
    assert frames.names == ("f1.png", "f2.png", "f10.png")
    for index, picture in zip((1, 2, 10), frames.read(), strict=True):
        np.testing.assert_array_equal(np.rint(picture.pixels * 255), frame(index))
    (tmp_path / "f1.png").unlink()
    (tmp_path / "f2.png").unlink()
    with pytest.raises(ImageError, match=r"folder of at least two pictures .* got 1"):
        open_frames(tmp_path, MAX_PIXELS)


def test_float_pages_share_one_range(tmp_path: Path) -> None:
    """So that noise is as strong in all of them; thumbnails are no pages."""
    pages = [np.full((20, 24), value, np.float32) for value in (-2.0, 1.0, 6.0)]
    pages[1][3] = 0.0
    with tifffile.TiffWriter(tmp_path / "volume.tif") as writer:
        writer.write(pages[0])
        writer.write(pages[0][:5, :5], subfiletype=1)
        for page in pages[1:]:
            writer.write(page)
    frames = open_frames(tmp_path / "volume.tif", MAX_PIXELS)
    assert (frames.kind, len(frames.names)) == ("pages", 3)
    pictures = list(frames.read())
    assert [(picture.low, picture.high) for picture in pictures] == [(-2.0, 6.0)] * 3
    assert [float(picture.pixels[0, 0, 0]) for picture in pictures] == [0.0, 0.375, 1.0]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run `flashdip denoise ... --sequence` in a folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashdip", "denoise", *arguments, *LINE, "--sequence"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


def test_a_folder_comes_as_a_folder(run: Run) -> None:
    Path("in").mkdir()
    for index in range(3):
        Image.fromarray(frame(index)).save(f"in/{index}.png")
    code, out, err = run("in", "-o", "out", "--json")
    assert code == 0
    assert json.loads(out)["sequence"]["saved"] == 0.5
    assert "3 frames, 8 iterations from random weights, 4 on average from the frame" in err
    assert sorted(path.name for path in Path("out").iterdir()) == ["0.png", "1.png", "2.png"]
    assert {path.name for path in Path().iterdir()} == {"in", "out"}
    with Image.open("out/2.png") as image:
        assert (image.size, image.mode) == ((32, 24), "RGB")
    code, _, err = run("in", "-o", "out")
    assert (code, "--force" in err) == (2, True)
    assert run("in", "-o", "out", "--force", "-q") == (0, "", "")


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_a_volume_comes_as_a_volume(run: Run, dtype: str) -> None:
    """Of the same depth and number of pages."""
    pages = np.stack([frame(index, channels=1)[:, :, 0] for index in range(3)])
    scale = {"uint8": 1, "uint16": 257, "float32": 3}[dtype]
    volume = pages.astype(dtype) * np.dtype(dtype).type(scale)
    tifffile.imwrite("volume.tif", volume, photometric="minisblack")
    assert run("volume.tif", "-o", "out.tif", "-q")[0] == 0
    restored = tifffile.imread("out.tif")
    assert (restored.shape, restored.dtype) == (volume.shape, volume.dtype)
    assert 0 < np.abs(restored.astype(float) - volume).mean() < 100 * scale
    assert [path.name for path in Path().iterdir() if path.is_dir()] == []
    code, _, err = run("volume.tif", "-o", "out.png")
    assert (code, "ends in .tif" in err) == (2, True)


def test_channels_come_as_channels(run: Run) -> None:
    values = frame(0, channels=5)
    tifffile.imwrite("five.tif", values, planarconfig="contig", photometric="minisblack")
    code, out, _ = run("five.tif", "-o", "out.tif", "--json")
    assert (code, json.loads(out)["sequence"]["frames"]) == (0, 5)
    assert all(record["shape"] == [1, 24, 32] for record in json.loads(out)["frames"])
    restored = tifffile.imread("out.tif")
    assert (restored.shape, restored.dtype) == (values.shape, values.dtype)


def test_what_is_no_sequence_gets_one_line(run: Run) -> None:
    Image.fromarray(frame(0, channels=1)[:, :, 0]).save("grey.png")
    Image.fromarray(frame(0)).save("rgb.png")
    for words, said in (
        (("grey.png", "-o", "out.png"), "got one grey picture: leave out --sequence"),
        (("nowhere", "-o", "out"), "no such file"),
        (("rgb.png", "-o", "out.png", "--truth", "rgb.png"), "--truth: expected one picture"),
        (("rgb.png", "-o", "out.png", "--report", "r.html"), "--report: expected one picture"),
        (("rgb.png", "-o", "grey.png"), "--force"),
        (("rgb.png", "-o", "out"), "ends in .png"),
    ):
        code, out, err = run(*words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err
    code, out, _ = run("rgb.png", "-o", "out.png", "--dry-run")
    assert code == 0
    assert out.startswith("3 frames, each: 32x24 pixels on cpu")
    assert {path.name for path in Path().iterdir()} <= {"grey.png", "rgb.png"}


def test_a_video_without_the_extra_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    Path("film.mp4").write_bytes(b"film")
    code, _, err = run("film.mp4", "-o", "out.mp4")
    assert (code, "pip install 'flashdip[video]'" in err) == (2, True)


@pytest.mark.skipif(util.find_spec("av") is None, reason="needs the extra `video`")
def test_a_video_comes_as_a_video(run: Run) -> None:
    import imageio.v3 as imageio

    frames = np.stack([frame(index) for index in range(3)])
    imageio.imwrite("film.mp4", frames, plugin="pyav", codec="libx264", fps=10)
    assert run("film.mp4", "-o", "out.mp4", "-q")[0] == 0
    assert imageio.imread("out.mp4", plugin="pyav").shape == frames.shape
    assert imageio.immeta("out.mp4", plugin="pyav")["fps"] == 10
