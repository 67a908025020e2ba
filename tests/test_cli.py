"""The command line as a person meets it: help, files written or refused, messages, exit codes."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from flashdip import cli

TINY = (
    *("--set", "network.down=8,8", "--set", "network.inputs=4", "--set", "read_every=2"),
    *("--iterations", "4", "--precision", "fp32", "--sigma", "20"),
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that holds a small noisy picture, the clean one, and a mask."""
    y, x = np.mgrid[:24, :32] / 32
    clean = np.rint(60 + 150 * np.stack([x, y, (x + y) / 2], axis=2))
    noisy = np.clip(clean + np.random.default_rng(0).normal(0, 20, clean.shape), 1, 255)
    known = np.full((24, 32), 255, np.uint8)
    known[4:9, 20:] = 0
    for name, pixels in (("clean", clean), ("noisy", noisy), ("mask", known)):
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{name}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process; return its exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flashdip", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, out, err

    return call


def test_help_shows_examples_and_loads_neither_torch_nor_a_command() -> None:
    script = (
        "import sys; from flashdip import cli; sys.argv = ['flashdip', '--help']\n"
        "try: cli.main()\n"
        "finally: print(*(m for m in sys.modules if m in ('torch', 'numpy', 'PIL')"
        " or m.startswith('flashdip.')), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(done.stderr.split())
    assert loaded == {
        "flashdip.cli", "flashdip.engine", "flashdip.engine.errors", "flashdip.engine.files"
    }  # fmt: skip
    assert "flashdip denoise noisy.png -o clean.png --sigma 25" in done.stdout
    for name, (_, _, summary) in cli.COMMANDS.items():
        assert name in done.stdout
        assert summary in done.stdout


def test_the_table_says_what_the_commands_say() -> None:
    for target, _, summary in cli.COMMANDS.values():
        module, _, name = target.partition(":")
        command = getattr(importlib.import_module(module), name)
        text = command.info.help if isinstance(command, typer.Typer) else command.__doc__
        assert text is not None
        assert text.startswith(summary.rstrip("."))


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_its_own_help(run: Run, name: str) -> None:
    code, out, err = run(name, "--help")
    assert (code, err) == (0, "")
    assert f"flashdip {name}" in out
    restoring = ("denoise", "superres", "inpaint", "dejpeg", "restore", "batch")
    assert ("--sigma" in out) == (name in restoring)


def test_a_group_of_commands_is_registered_by_its_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "extra_commands.py").write_text(
        "import typer\napp = typer.Typer()\n"
        "@app.command()\ndef one(n: int) -> None:\n    print('one', n)\n"
        "@app.command()\ndef two() -> None:\n    print('two')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    line = ("extra_commands:app", "Look", "Two more.")
    monkeypatch.setitem(cli.COMMANDS, "extra", line)
    assert "Two more." in run("--help")[1]
    assert "extra_commands" not in sys.modules
    assert run("extra", "one", "3")[:2] == (0, "one 3\n")
    assert run("extra", "three")[0] == 2


def test_version(run: Run) -> None:
    assert run("--version")[:2] == (0, f"flashdip {importlib.metadata.version('flashdip')}\n")


def test_denoise_writes_a_picture_like_the_input(run: Run, folder: Path) -> None:
    code, out, err = run("denoise", "noisy.png", "-o", "out.png", "--truth", "clean.png", *TINY)
    assert (code, out) == (0, "")
    assert "4/4" in err
    assert "dB against the truth" in err
    with Image.open("out.png") as image:
        assert (image.size, image.mode) == ((32, 24), "RGB")
        assert np.asarray(image).std() > 0


def test_the_truth_does_not_change_a_byte(run: Run, folder: Path) -> None:
    run("denoise", "noisy.png", "-o", "a.png", "-q", *TINY)
    run("denoise", "noisy.png", "-o", "b.png", "-q", "--truth", "clean.png", *TINY)
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()


def test_superres_and_inpaint_and_restore(run: Run, folder: Path) -> None:
    assert run("superres", "noisy.png", "--factor", "2", "-o", "s.png", "-q", *TINY)[0] == 0
    with Image.open("s.png") as image:
        assert image.size == (64, 48)

    known = np.asarray(Image.open("mask.png")) > 0
    noisy = np.asarray(Image.open("noisy.png"))
    assert run("inpaint", "noisy.png", "--mask", "mask.png", "-o", "i.png", "-q", *TINY)[0] == 0
    filled = np.asarray(Image.open("i.png"))
    np.testing.assert_array_equal(filled[known], noisy[known])
    assert (filled[~known] != noisy[~known]).any()

    Image.fromarray(np.where(known[:, :, None], noisy, 0)).save("holes.png")
    assert run("restore", "holes.png", "-o", "r.png", "--no-keep-known", "-q", *TINY)[0] == 0
    restored = np.asarray(Image.open("r.png"))
    assert restored[~known].min() > 0
    assert (restored[known] != noisy[known]).mean() > 0.5


def test_json_is_all_there_is_on_stdout(run: Run, folder: Path) -> None:
    code, out, err = run(
        "denoise", "noisy.png", "-o", "out.png", "--json", "--save-dir", "saved", *TINY
    )
    record = json.loads(out)
    assert (code, record["iterations"], record["sigma"]) == (0, 4, 20 / 255)
    assert "4/4" in err
    saved = json.loads(Path("saved/result.json").read_text())
    assert record | {"picture": saved["picture"]} == saved
    assert Path("saved/fit.safetensors").exists()


@pytest.mark.parametrize(
    ("task", "own"),
    [
        ("denoise", ()),
        ("superres", ("--factor", "2")),
        ("inpaint", ("--mask", "mask.png")),
        ("restore", ("--missing", "#010203", "--no-keep-known")),
        ("dejpeg", ()),
    ],
)
def test_a_report_tells_what_came_of_which_file(
    run: Run, folder: Path, task: str, own: tuple[str, ...]
) -> None:
    pixels = np.array(Image.open("noisy.png"))
    pixels[3:6, 3:9] = (1, 2, 3)
    Image.fromarray(pixels).save("a<b>&.png")
    options = ("-o", "out.png", "--report", "page.html", "-q", *TINY)
    assert run(task, "a<b>&.png", *own, *options) == (0, "", "")
    text = Path("page.html").read_text()
    assert "<h1>a&lt;b&gt;&amp;.png</h1>" in text
    said = "Mean of 3 runs, of 12 iterations" if task == "superres" else "Image of iteration 4 of 4"
    assert said in text
    assert 'id="stage"' in text
    assert run(task, "a<b>&.png", *own, *options, "--force")[0] == 0


def test_quiet_prints_nothing(run: Run, folder: Path) -> None:
    assert run("dejpeg", "noisy.png", "-o", "out.png", "--quiet", *TINY) == (0, "", "")


def test_budget_is_a_stopping_rule(run: Run, folder: Path) -> None:
    options = (*TINY, "--iterations", "100000", "--budget", "0", "--json", "-q")
    record = json.loads(run("dejpeg", "noisy.png", "-o", "out.png", *options)[1])
    assert (record["stop_reason"], record["iterations"]) == ("budget", 2)


def test_a_checkpoint_carries_on(run: Run, folder: Path) -> None:
    options = ("--checkpoint", "fit.ckpt", "-q", "--force", "--json", *TINY)
    first = run("dejpeg", "noisy.png", "-o", "a.png", *options)
    assert first[0] == 0
    picture = Path("a.png").read_bytes()
    second = run("dejpeg", "noisy.png", "-o", "a.png", *options)
    assert second[0] == 0
    assert Path("a.png").read_bytes() == picture


def test_init_takes_what_save_dir_wrote(run: Run, folder: Path) -> None:
    network = ("--set", "network.upsample=nearest", "--set", "network.skip=4")
    same = ("--preset", "quick", *TINY, *network)
    assert run("denoise", "noisy.png", "-o", "a.png", "--save-dir", "first", "-q", *same)[0] == 0
    options = ("-o", "b.png", "--init", "first", "--json", *same)
    code, out, err = run("dejpeg", "noisy.png", *options)
    assert (code, json.loads(out)["init"]["source"]) == (0, "first")
    assert "begins with the weights of first" in err


def make_bad_files() -> None:
    whole = Path("noisy.png").read_bytes()
    Path("truncated.png").write_bytes(whole[: len(whole) // 2])
    Path("text.png").write_text("no picture")
    Path("empty.png").write_bytes(b"")
    Path("folder.png").mkdir()
    Path("file").write_text("")
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("red", "blue")]
    frames[0].save("moving.png", save_all=True, append_images=frames[1:])
    Image.new("L", (33, 24), 255).save("wide_mask.png")
    Image.new("L", (32, 24), 0).save("black_mask.png")
    Image.open("noisy.png").crop((0, 0, 12, 12)).save("tiny.png")
    Image.new("L", (32, 24), 9).save("grey.png")
    import tifffile

    pixels = np.full((24, 32), 0.5, np.float32)
    pixels[3:5, 7] = np.nan
    tifffile.imwrite("nan.tif", pixels)
    tifffile.imwrite("five.tif", np.full((24, 32, 5), 9, np.uint8), planarconfig="contig")


BAD = {
    "missing file": ("denoise nowhere.png", "nowhere.png", "no such file"),
    "truncated file": ("denoise truncated.png", "truncated.png", "truncated"),
    "no image": ("denoise text.png", "text.png", "PNG, JPEG, WebP or TIFF"),
    "empty file": ("denoise empty.png", "empty.png", "empty"),
    "directory": ("denoise folder.png", "folder.png", "directory"),
    "animation": ("denoise moving.png", "moving.png", "2 frames"),
    "too many pixels": ("denoise noisy.png --max-pixels 100", "32 x 24", "--max-pixels"),
    "too small": ("denoise tiny.png", "16", "12x12"),
    "mask of another size": ("inpaint noisy.png --mask wide_mask.png", "32x24", "33x24"),
    "all-zero mask": ("inpaint noisy.png --mask black_mask.png", "mask", "invert"),
    "no mask": ("inpaint noisy.png", "--mask", "white = known"),
    "nothing marked": ("restore noisy.png --missing zero", "zero", "got none"),
    "unknown mark": ("restore noisy.png --missing one", "missing", "'one'"),
    "uncovered NaN": ("dejpeg nan.tif", "got 2 of 768", "--missing nan"),
    "negative sigma": ("denoise noisy.png --sigma -3", "sigma", "got -3"),
    "unknown preset": ("denoise noisy.png --preset fats", "'fats'", "balanced"),
    "unknown field": ("denoise noisy.png --set speed=9", "speed", "learning_rate"),
    "no field": ("denoise noisy.png --set speed", "FIELD=VALUE", "'speed'"),
    "field out of range": ("denoise noisy.png --set average=2", "average", "got 2"),
    "unknown rule": ("denoise noisy.png --stop soon", "stop", "'soon'"),
    "negative budget": ("denoise noisy.png --budget -1", "budget", "got -1"),
    "no iterations": ("denoise noisy.png --iterations 0", "iterations", "at least 1"),
    "unknown backend": ("denoise noisy.png --backend tpu", "backend", "'tpu'"),
    "unknown device": ("denoise noisy.png --device abacus", "device", "'abacus'"),
    "unknown precision": ("denoise noisy.png --precision fp8", "precision", "'fp8'"),
    "backend that cannot": (
        "denoise noisy.png --backend reference --precision bf16",
        "reference",
        "bf16",
    ),
    "provider elsewhere": ("denoise noisy.png --provider cpu", "provider", "--backend onnx"),
    "unknown provider": ("denoise noisy.png --backend onnx --provider npu", "provider", "'npu'"),
    "factor 1": ("superres noisy.png --factor 1", "factor", "at least 2"),
    "factor too large": ("superres noisy.png --factor 1000", "--max-pixels", "768000000"),
    "unknown kernel": ("superres noisy.png --factor 2 --kernel cubic", "lanczos2", "'cubic'"),
    "truth of another size": ("superres noisy.png --factor 2 --truth clean.png", "64x48", "32x24"),
    "truth of other channels": ("denoise noisy.png --truth grey.png", "truth", "of 1"),
    "missing truth": ("denoise noisy.png --truth nowhere.png", "nowhere.png", "no such file"),
    "five channels into PNG": ("dejpeg five.tif", "got 5", "TIFF"),
    "no checkpoint": ("denoise noisy.png --checkpoint noisy.png", "checkpoint", "noisy.png"),
    "checkpoint in no folder": ("denoise noisy.png --checkpoint no/c", "no", "folder"),
    "save-dir in no folder": ("denoise noisy.png --save-dir no/d", "no", "folder"),
    "save-dir that is a file": ("denoise noisy.png --save-dir file", "--save-dir", "directory"),
    "init that is no fit": ("denoise noisy.png --init folder.png", "--save-dir", "folder.png"),
    "report in no folder": ("denoise noisy.png --report no/r.html", "no", "folder"),
    "report exists": ("denoise noisy.png --report clean.png", "clean.png", "--force"),
    "report where the picture goes": ("denoise noisy.png --report out.png", "out.png", "two"),
    "report in save-dir": ("denoise noisy.png --save-dir d --report d/result.json", "d", "folder"),
    "output exists": ("denoise noisy.png -o clean.png", "clean.png", "--force"),
    "output is a directory": ("denoise noisy.png -o folder.png --force", "folder.png", "directory"),
    "output in no folder": ("denoise noisy.png -o no/out.png", "no", "folder"),
    "output of no format": ("denoise noisy.png -o out.bmp", ".bmp", ".png"),
    "output without suffix": ("denoise noisy.png -o out", "suffix", ".png"),
}


@pytest.mark.parametrize(("line", "names", "advises"), BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_line_and_leaves_nothing(
    run: Run, folder: Path, line: str, names: str, advises: str
) -> None:
    make_bad_files()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    words = line.split()
    code, out, err = run(*words, *(() if "-o" in words else ("-o", "out.png")))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("flashdip: error: ")
    assert names in err
    assert advises in err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    "line", ["denoise", "denoise a.png", "nonsense", "superres a.png -o b.png"]
)
def test_wrong_usage_exits_with_2(run: Run, line: str) -> None:
    code, out, err = run(*line.split())
    assert (code, out) == (2, "")
    assert "Usage: flashdip" in err
    assert "Traceback" not in err


def test_names_cannot_break_the_line_or_the_terminal(run: Run, folder: Path) -> None:
    _, _, err = run("denoise", "no\n\x1b[31mred.png", "-o", "out.png")
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_a_second_run_needs_force(run: Run, folder: Path) -> None:
    arguments = ("dejpeg", "noisy.png", "-o", "out.png", "--save-dir", "saved", "-q", *TINY)
    assert run(*arguments)[0] == 0
    Path("out.png").unlink()
    assert run(*arguments)[0] == 2
    assert not Path("out.png").exists()
    assert run(*arguments, "--force")[0] == 0


def test_a_full_disk_is_said_and_leaves_nothing(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(folder.iterdir())

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = run("dejpeg", "noisy.png", "-o", "out.png", "-q", *TINY)
    assert (code, err.count("\n")) == (2, 1)
    assert "disk is full" in err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_fit_with_the_image_written(
    folder: Path, number: signal.Signals, code: int
) -> None:
    command = [sys.executable, "-m", "flashdip.cli", "dejpeg", "noisy.png", "-o", "out.png"]
    endless = [*TINY, "--iterations", "100000000", "--stop", "fixed", "--json"]
    with subprocess.Popen(
        [*command, *endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        assert process.stderr is not None
        for line in process.stderr:
            if "it/s" in line:
                break
        process.send_signal(number)
        out, err = process.communicate()
        watchdog.cancel()
    assert (process.returncode, "Traceback" in err) == (code, False)
    assert json.loads(out)["stop_reason"] == "interrupted"
    with Image.open("out.png") as image:
        assert image.size == (32, 24)


def test_presets_as_table_and_json(run: Run) -> None:
    rows = json.loads(run("presets", "--json")[1])
    table = run("presets")[1]
    assert {row["task"] for row in rows} == {"denoise", "superres", "inpaint", "dejpeg", "restore"}
    for row in rows:
        assert row["name"] in table
    assert "balanced (default)" in table
    (best,) = (row for row in rows if (row["task"], row["name"]) == ("denoise", "best"))
    assert best["runs"] > 1 and f"{best['runs']} x {best['iterations']} it" in table
    measured = [row["measured"] for row in rows if row["measured"]]
    assert measured
    for seen in measured:
        assert f"{seen['after'] - seen['before']:+.1f} dB, {seen['seconds']:.0f} s" in table
        assert seen["picture"] in " ".join(table.split())


def test_demo_writes_its_folder_and_overwrites_only_its_own(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flashdip.engine.presets import preset

    tiny = preset("denoise").override({"network.down": "8,8", "iterations": "4"})
    monkeypatch.setattr("flashdip.engine.task_options.preset", lambda *asked: tiny)

    code, out, _ = run("demo", "--size", "32", "-o", "shown", "--budget", "0")
    assert code == 0
    assert json.loads(Path("shown/result.json").read_text())["stop_reason"] == "budget"
    code, out, _ = run("demo", "--size", "32", "-o", "shown")
    assert code == 0
    assert json.loads(Path("shown/result.json").read_text())["stop_reason"] == "iterations"
    assert out.count("dB") == 3
    names = {"clean.png", "comparison.png", "noisy.png", "restored.png", "result.json"}
    assert {path.name for path in Path("shown").iterdir()} == names | {"report.html"}
    noise = np.asarray(Image.open("shown/noisy.png")).astype(float)
    noise -= np.asarray(Image.open("shown/clean.png"))
    assert 15 < noise.std() < 26  # sigma 25, less what was clipped
    assert run("demo", "--size", "32", "-o", "shown")[0] == 0

    code, _, err = run("demo", "--size", "32", "-o", ".")  # holds another clean.png
    assert (code, "clean.png" in err) == (2, True)
