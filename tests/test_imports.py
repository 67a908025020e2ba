"""`import flashdip` and `flashdip --help` stay light."""

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "numpy",
    "scipy",
    "skimage",
    "PIL",
    "tifffile",
    "imagecodecs",
    "safetensors",
    "triton",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "ray",
    "matplotlib",
)


def loaded_after(code: str) -> list[str]:
    """Run `code` in a fresh interpreter and return which of the heavy modules it loaded."""
    report = f"\nimport sys; print('loaded', *[m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code + report], capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("module", ["flashdip", "flashdip.cli"])
def test_import_is_light(module: str) -> None:
    assert loaded_after(f"import {module}") == []


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_asking_the_command_line_is_light(option: str) -> None:
    code = f"""
import sys
from flashdip.cli import main
sys.argv = ["flashdip", "{option}"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
else:
    raise AssertionError("did not exit")
"""
    assert loaded_after(code) == []


def test_loading_a_picture_takes_no_torch() -> None:
    assert "torch" not in loaded_after("import flashdip; flashdip.load; flashdip.save")


def test_heavy_modules_are_seen() -> None:
    assert loaded_after("import flashdip; flashdip.fit") != []
