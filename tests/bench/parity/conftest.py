"""A small folder in the layout of the paper's benchmarks, made from a photograph all may use."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flashdip.engine.demo import add_noise, photograph
from flashdip.engine.presets import preset

SIDE = 32


def store(path: Path, pixels: NDArray[np.uint8]) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One picture of each suite, two in denoise25; "published" results are off by known amounts."""
    folder = tmp_path_factory.mktemp("parity")
    clean = photograph(SIDE)
    for name, truth in (("one", clean), ("one_two", clean[::-1])):
        start = folder / "denoise25" / name
        store(start.with_name(f"{name}_GT.png"), truth)
        store(start.with_name(f"{name}_noisy.png"), add_noise(truth, 25, 0))
        store(start.with_name(f"{name}_nlm.png"), truth // 2)
        if name == "one":
            store(start.with_name("one_other.png"), truth)
            store(start.with_name("one_deep_prior.png"), truth ^ np.uint8(1))
    grey: NDArray[np.uint8] = clean[:, :, 0].clip(1)
    known = np.random.default_rng(0).random(grey.shape) > 0.5
    store(folder / "inpaint50" / "one_GT.png", grey)
    store(folder / "inpaint50" / "one_masked.png", np.where(known, grey, 0).astype(np.uint8))
    store(folder / "sr4" / "one_GT.png", clean)
    small = Image.fromarray(clean).resize((SIDE // 4, SIDE // 4), Image.Resampling.LANCZOS)
    store(folder / "sr4" / "one_LR.png", np.asarray(small))
    return folder


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every preset one of moments."""
    base = (
        preset("denoise")
        .override(
            {"network.down": "4,4", "iterations": "6", "read_every": "2", "precision": "fp32"}
        )
        .override({"stop": "fixed"})
    )
    monkeypatch.setattr("flashdip.engine.task_options.preset", lambda *asked: base)
