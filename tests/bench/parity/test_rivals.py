"""The other methods: what they gain, how their strength is chosen, and BM3D's terms."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from skimage.restoration import denoise_tv_chambolle

from flashdip.bench.parity import rivals
from flashdip.bench.parity.rivals import TV_WEIGHTS, non_local_means, total_variation
from flashdip.bench.parity.suites import find
from flashdip.engine.demo import add_noise, photograph
from flashdip.engine.errors import UnavailableError


def decibels(image: np.ndarray, truth: np.ndarray) -> float:
    return float(-10 * np.log10(np.square(image - truth).mean()))


def test_variation_is_weighted_nearly_as_if_the_truth_were_known() -> None:
    for size, sigma in ((64, 10), (96, 25), (64, 50)):
        clean = photograph(size)
        noisy, truth = add_noise(clean, sigma, 1) / 255, clean / 255
        found = total_variation(noisy.astype(np.float32), sigma / 255)
        best = max(
            decibels(denoise_tv_chambolle(noisy, weight=w * sigma / 255, channel_axis=-1), truth)
            for w in TV_WEIGHTS
        )
        assert decibels(found, truth) > best - 0.25
        assert decibels(found, truth) > decibels(noisy, truth) + 1.5


def test_non_local_means_gains() -> None:
    clean = photograph(96)
    noisy = (add_noise(clean, 25, 1) / 255).astype(np.float32)
    gained = decibels(non_local_means(noisy, 25 / 255), clean / 255)
    assert gained > decibels(noisy, clean / 255) + 5


def test_each_task_has_its_methods(data: Path) -> None:
    found = {case.suite.name: rivals.rivals(case) for case in find(data, ["inpaint50", "sr4"], [])}
    assert {name: set(methods) for name, methods in found.items()} == {
        "inpaint50": {"tv"},
        "sr4": {"tv", "bicubic"},
    }
    for case in find(data, ["inpaint50"], []):
        tv = found["inpaint50"]["tv"]
        assert tv.image.shape == case.truth.shape
        assert case.decibels(tv.image) > case.decibels(case.observed) + 8
        assert tv.seconds > 0


def test_without_its_package_bm3d_is_refused_with_the_way_to_get_it(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flashdip.bench.parity.rivals.find_spec", lambda name: None)
    (case,) = find(data, ["denoise25"], ["one"])
    with pytest.raises(UnavailableError, match=r"non-commercial.*flashdip\[baselines-nc\]"):
        rivals.rivals(case, bm3d=True)


def test_the_terms_of_bm3d_are_shown_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in for the package, which is for non-commercial use only."""
    calls: list[float] = []

    def run(noisy: np.ndarray, sigma: float) -> np.ndarray:
        calls.append(sigma)
        return noisy

    module: Any = ModuleType("bm3d")
    module.bm3d = module.bm3d_rgb = run
    licence = SimpleNamespace(name="LICENSE", read_text=lambda: "the terms themselves")
    package = SimpleNamespace(version="9.9", files=[licence], metadata={})
    monkeypatch.setitem(sys.modules, "bm3d", module)
    monkeypatch.setattr("flashdip.bench.parity.rivals.find_spec", lambda name: module)
    monkeypatch.setattr("flashdip.bench.parity.rivals.distribution", lambda name: package)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (case,) = find(data, ["denoise25"], ["one"])
    found = rivals.rivals(case, bm3d=True)["bm3d"]
    assert "the terms themselves" in capsys.readouterr().err
    np.testing.assert_array_equal(found.image, case.observed)
    assert calls == [25 / 255]
    rivals.rivals(case, bm3d=True)
    assert capsys.readouterr().err == ""


def test_bm3d_is_in_no_other_extra() -> None:
    import tomllib

    root = Path(__file__).parents[3]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for name, packages in extras.items():
        assert any("bm3d" in each or "baselines" in each for each in packages) == (
            name == "baselines-nc"
        )
    for file in ("cpu.txt", "gpu.txt"):
        assert "bm3d" not in (root / "constraints" / file).read_text()
