"""`export` and `render` as a person meets them."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from typer.testing import CliRunner

from flashdip import cli
from flashdip.engine.errors import ConfigError, FlashDIPError
from flashdip.engine.images import load
from flashdip.engine.metrics import psnr
from flashdip.engine.result import Result
from tests.engine.onnx.fitted import fitted


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work beside a saved fit."""
    monkeypatch.chdir(tmp_path)
    fitted().save("fit")
    return tmp_path


def run(*arguments: str) -> str:
    """Run the command line in this process; return what it printed, or raise its error."""
    done = CliRunner().invoke(cli.app, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    return done.stderr


def test_a_fit_goes_into_a_model_and_comes_out_as_a_picture(folder: Path) -> None:
    printed = run("export", "fit", "-o", "m.onnx").splitlines()[-1]
    assert printed.startswith("m.onnx written: 4")
    assert " dB between what it draws and the fit's picture (" in printed
    assert run("render", "m.onnx", "-o", "m.tif", "--provider", "cpu") == "m.tif written\n"
    picture = Result.load("fit").image
    drawn = load("m.tif").tensor()[0]
    assert psnr(drawn, picture) == pytest.approx(float(printed.split(": ")[1].split()[0]), abs=0.1)
    assert run("render", "m.onnx", "-o", "m.png", "-q") == ""
    assert psnr(load("m.png").tensor()[0], picture) > 44


def test_the_network_as_it_is(folder: Path) -> None:
    printed = run("export", "fit", "-o", "m.onnx", "--no-distil", "--fp16")
    assert "(the network as the fit left it)" in printed
    notes = {entry.key: entry.value for entry in onnx.load("m.onnx").metadata_props}
    assert (notes["distilled"], notes["precision"]) == ("no", "fp16")
    assert run("export", "fit", "-o", "m.onnx", "--no-distil", "--force", "-q") == ""


def test_too_few_steps_are_said(folder: Path) -> None:
    printed = run("export", "fit", "-o", "m.onnx", "--steps", "1", "--size", "31x24")
    assert "picture at the fit's size (" in printed
    assert "steps, short of 45 dB: more --steps may bring it nearer)" in printed


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("export none -o m.onnx", "none: expected result.json"),
        ("export fit -o none/m.onnx", "expected an existing folder"),
        ("export fit -o m.onnx --size 40x40", "fit: size: expected 31x24"),
        ("export fit -o m.onnx --size 40", "size: expected WIDTHxHEIGHT such as 640x480"),
        ("export fit -o m.onnx --device nothing", "device"),
        ("render none.onnx -o p.png", "none.onnx: there is no such file"),
        ("render fit/restored.tif -o p.png", "expected an ONNX model"),
        ("render own.onnx -o p.png --provider nothing", "provider: expected some of"),
        ("render own.onnx -o p.png --precision int8", "precision: expected one of"),
        ("render own.onnx -o p.png --max-pixels 9", "expected at most 9 pixels, got 31x24"),
        ("render own.onnx -o p.gif", "expected a name that ends in"),
        ("render own.onnx -o none/p.png", "expected an existing folder"),
    ],
)
def test_bad_input_leaves_nothing(folder: Path, line: str, words: str) -> None:
    run("export", "fit", "-o", "own.onnx", "--no-distil")
    before = sorted(folder.rglob("*"))
    with pytest.raises(FlashDIPError) as caught:
        run(*line.split())
    assert words in str(caught.value)
    assert sorted(folder.rglob("*")) == before


def test_a_provider_that_is_not_here_is_no_silent_cpu(folder: Path) -> None:
    run("export", "fit", "-o", "m.onnx", "--no-distil")
    with pytest.raises(FlashDIPError, match=r"provider tensorrt: .*pip install"):
        run("render", "m.onnx", "-o", "p.png", "--provider", "tensorrt,cuda")
    assert not Path("p.png").exists()


def test_a_second_run_needs_force(folder: Path) -> None:
    for line in ("export fit -o m.onnx --no-distil", "render m.onnx -o p.png"):
        run(*line.split())
        with pytest.raises(FlashDIPError, match="--force"):
            run(*line.split())
        run(*line.split(), "--force")


def test_an_error_of_a_saved_fit_names_it(folder: Path) -> None:
    result = fitted()
    other = result.record | {"config": result.record["config"] | {"input": "meshgrid"}}
    Result(result.image, other, result.weights, result.picture).save("wrong")
    with pytest.raises(ConfigError):
        run("export", "wrong", "-o", "m.onnx")


def test_ctrl_c_writes_the_best_network_so_far(folder: Path) -> None:
    """A picture of noise, which no distilling gets near in its time."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    Image.fromarray(noise).save("noise.png")
    small = "--set network.down=8,8 --set network.inputs=4 --iterations 2 --sigma 20 -q"
    fit = f"denoise noise.png -o p.png --precision fp32 --save-dir noisy {small}"
    run(*fit.split())
    result = Result.load("noisy")
    assert (result.record["task"], result.record["preset"]) == ("denoise", "balanced")
    hard = load("noise.png").tensor()[0]
    Result(hard, result.record, result.weights | {"image": hard}, result.picture).save("hard")
    command = [sys.executable, "-m", "flashdip.cli", "export", "hard", "-o", "m.onnx"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--steps", "1000000"], stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        assert process.stderr is not None
        next(line for line in process.stderr if "it/s" in line)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        process.wait()
        watchdog.cancel()
    assert (process.returncode, "Traceback" in rest) == (130, False)
    assert "m.onnx written" in rest
    run("render", "m.onnx", "-o", "drawn.png")
