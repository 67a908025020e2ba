"""A small fit as a step's files, and by the backend: what the tests of the examples share."""

from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from flashdip.cli import app
from flashdip.engine import images, tasks
from flashdip.engine.result import Result

SMALL = {
    "network.down": "8,8",
    "network.skip": "2",
    "network.inputs": "4",
    "average": "0.9",
    "stop": "fixed",
}
OPTIONS = [part for name, value in SMALL.items() for part in ("--set", f"{name}={value}")]


def write_pictures(folder: Path) -> None:
    """Write noisy.png, 18x21 pixels of three channels, and mask.png."""
    draw = np.random.default_rng(0)
    noisy = draw.integers(0, 256, (21, 18, 3), np.uint8)
    images.save(folder / "noisy.png", images.as_picture(noisy))
    mask = 255 * draw.integers(0, 2, (21, 18), np.uint8)
    images.save(folder / "mask.png", images.as_picture(mask))


def export_step(*arguments: str) -> str:
    """Run `export-step` with a small network; return what it said."""
    found = CliRunner().invoke(app, ["export-step", *arguments, *OPTIONS])
    if found.exception is not None and not isinstance(found.exception, SystemExit):
        raise found.exception
    assert found.exit_code == 0, found.output
    return found.output


def fitted(task: str, iterations: int, image: object = "noisy.png", **own: object) -> Result:
    """Return what the backend makes of the same."""
    function = getattr(tasks, task)
    settings = SMALL | {"iterations": str(iterations)}
    options: dict[str, object] = {"backend": "onnx", "provider": "cpu", "device": "cpu"}
    options |= {"sigma": 25, "settings": settings}
    found: Result = function(image, **(options | own))
    return found
