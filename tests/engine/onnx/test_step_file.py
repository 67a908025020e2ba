"""`export-step`, and the example in Python that needs neither FlashDIP nor PyTorch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from typer.testing import CliRunner

from flashdip.cli import app
from flashdip.engine import images
from flashdip.engine.errors import FlashDIPError
from flashdip.engine.presets import preset
from tests.engine.onnx.stepping import export_step, fitted, write_pictures

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "docs" / "step" / "fit.py"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder with pictures."""
    write_pictures(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_example(*arguments: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Run it where neither torch nor this package may be loaded; return the picture."""
    script = (
        f"import runpy, sys; sys.argv = ['fit.py', *{list(arguments)!r}]\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
        "assert not {'torch', 'flashdip'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    from PIL import Image

    with Image.open(arguments[1]) as picture:
        return np.asarray(picture)


def test_the_example_fits_the_picture(folder: Path) -> None:
    """Twelve iterations: the picture that the backend returns; 60 lines at most."""
    said = export_step("noisy.png", "-o", "step.onnx", "--preset", "quick")
    assert "step.onnx written" in said and "20x24 pixels" in said
    assert f"up to {preset('denoise', 'quick').iterations} times" in said
    found = run_example("step.onnx", "out.ppm", "12")
    expected = fitted("denoise", 12, preset="quick").picture.pixels
    np.testing.assert_allclose(found / 255, expected, rtol=0, atol=1.01 / 255)
    assert len(EXAMPLE.read_text().splitlines()) <= 60


def test_a_step_for_a_size_takes_any_picture(folder: Path) -> None:
    """Which comes from a NumPy file; the state has no observation."""
    export_step("18x21", "-o", "step.onnx", "--preset", "quick")
    assert "observation" not in load_file("step.safetensors")
    observation = images.load(Path("noisy.png")).tensor().numpy()
    np.save("noisy.npy", observation)
    found = run_example("step.onnx", "out.ppm", "5", "noisy.npy")
    expected = fitted("denoise", 5, preset="quick").picture.pixels
    np.testing.assert_allclose(found / 255, expected, rtol=0, atol=1.01 / 255)


@pytest.mark.parametrize(
    ("task", "options", "own"),
    [
        ("inpaint", ["--mask", "mask.png"], {"mask": "mask.png", "keep_known": False}),
        ("superres", ["--factor", "2", "--kernel", "box"], {"factor": 2, "kernel": "box"}),
    ],
)
def test_other_tasks(folder: Path, task: str, options: list[str], own: dict[str, object]) -> None:
    """A mask, a factor; a learning rate that follows the graph's own schedule."""
    size = ["--set", "iterations=6", "--preset", "quick", "--task", task]
    export_step("noisy.png", "-o", "step.onnx", *size, *options)
    state = load_file("step.safetensors")
    session = onnxruntime.InferenceSession("step.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    for _ in range(6):
        made = dict(zip(names, session.run(names, state), strict=True))
        state |= {k.removeprefix("next_"): v for k, v in made.items() if k.startswith("next_")}
    result = fitted(task, 6, preset="quick", **own)
    assert preset(task, "quick").schedule == "cosine"
    torch.testing.assert_close(torch.from_numpy(made["image"][0]), result.image, rtol=0, atol=1e-6)


def test_every_preset_becomes_a_small_graph_of_standard_operators(folder: Path) -> None:
    """The default network at its full width: at most 2,500 nodes."""
    found = CliRunner().invoke(
        app, ["export-step", "64x64", "-o", "step.onnx", "--preset", "published-denoise"]
    )
    assert found.exit_code == 0
    model = onnx.load("step.onnx")
    assert len(model.graph.node) <= 2500
    assert {node.domain for node in model.graph.node} == {""}
    onnx.checker.check_model(model, full_check=True)
    state = load_file("step.safetensors")
    for value in model.graph.input:
        if value.name != "observation":
            sides = [side.dim_value for side in value.type.tensor_type.shape.dim]
            assert list(state[value.name].shape) == sides


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "nowhere.png"),
        (["8x8"], "sides of at least 16"),
        (["64x64", "--mask", "mask.png"], "mask: expected a picture"),
        (["noisy.png", "--preset", "fast"], "preset: expected"),
        (["noisy.png", "--factor", "2", "--kernel", "cubic"], "kernel: expected"),
        (["noisy.png", "-o", "x.safetensors"], "x.safetensors"),
        (["noisy.png", "-o", "noisy.png"], "--force"),
        (["noisy.png", "-o", "no/step.onnx"], "folder"),
    ],
)
def test_bad_usage(folder: Path, arguments: list[str], message: str) -> None:
    """One line, before anything is written."""
    before = sorted(folder.iterdir())
    with pytest.raises(FlashDIPError, match=message):
        export_step(*(arguments if "-o" in arguments else [*arguments, "-o", "step.onnx"]))
    assert sorted(folder.iterdir()) == before
