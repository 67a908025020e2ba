"""Which files belong together, and that results are judged as the paper's authors judged them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from flashdip.bench.parity.suites import SUITES, find, in_8_bits
from flashdip.engine.errors import ConfigError, InputError, ShapeError
from tests.bench.parity.conftest import SIDE, store

SHARED = Path(__file__).parents[4] / "shared" / "parity"


def test_pictures_and_their_published_results_are_found(data: Path) -> None:
    cases = find(data, list(SUITES), [])
    names = [(case.suite.name, case.name, list(case.published)) for case in cases]
    assert names == [
        ("denoise25", "one", ["deep_prior", "nlm", "other"]),
        ("denoise25", "one_two", ["nlm"]),
        ("inpaint50", "one", []),
        ("sr4", "one", []),
    ]
    assert cases[3].observed.shape == (SIDE // 4, SIDE // 4, 3)
    assert [case.name for case in find(data, ["denoise25"], ["one_two"])] == ["one_two"]


def test_decibels_are_of_the_8_bit_image(data: Path) -> None:
    """A step of 255 everywhere is 48.13 dB; less than half a step is rounded away."""
    (case,) = find(data, ["denoise25"], ["one"])
    assert case.decibels(case.published["deep_prior"]) == pytest.approx(
        20 * np.log10(255), abs=0.01
    )
    assert case.decibels(case.truth + np.float32(0.4 / 255)) == 200
    assert case.decibels(case.truth - np.float32(0.6 / 255)) < 50
    np.testing.assert_array_equal(in_8_bits(np.array([[-1, 0.5, 7]], np.float32)), [[0, 128, 255]])


def test_problems_explain_the_inputs(data: Path) -> None:
    """The truth, through the operator, is what was measured: up to noise, exactly, up to PIL's."""
    errors = {}
    for case in find(data, list(SUITES), ["one"]):
        operator, observation, shape = case.problem()
        truth = np.moveaxis(case.truth, 2, 0)
        assert truth.shape == shape
        measured = operator(torch.from_numpy(np.ascontiguousarray(truth))[None])
        errors[case.suite.name] = float((measured - observation).square().mean().sqrt()) * 255
    assert errors["inpaint50"] == 0
    assert 15 < errors["denoise25"] < 26
    assert errors["sr4"] < 12


def test_what_is_not_there_is_said(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"suite: expected denoise25, .*got denoise50"):
        find(data, ["denoise50"], [])
    with pytest.raises(InputError, match=r"expected pictures .* of one, three .*got none of three"):
        find(data, ["denoise25"], ["one", "three"])
    with pytest.raises(InputError, match=r"got no such picture.*--data"):
        find(tmp_path, list(SUITES), [])
    shutil.copytree(data / "sr4", tmp_path / "sr4")
    store(tmp_path / "sr4" / "one_bicubic.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(
        ShapeError, match=r"one_bicubic.png: expected \[32, 32, 3\].*got \[8, 8, 3\]"
    ):
        find(tmp_path, ["sr4"], [])
    (tmp_path / "sr4" / "one_bicubic.png").unlink()
    shutil.copy(tmp_path / "sr4" / "one_GT.png", tmp_path / "sr4" / "one_LR.png")
    with pytest.raises(ShapeError, match=r"one_LR.png: expected \[8, 8, 3\].*got \[32, 32, 3\]"):
        find(tmp_path, ["sr4"], [])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the authors' own pictures are not here")
def test_the_published_images_have_the_published_quality() -> None:
    """Every figure that the authors' own images were found to have, to its last digit."""
    suites = json.loads((SHARED / "reference.json").read_text())["suites"]
    compared = 0
    for case in find(SHARED, list(SUITES), []):
        known = suites[case.suite.name][case.name]
        for method, image in case.published.items():
            figure = known.get(method, known.get(f"{method}_Y"))
            if figure is not None:
                assert case.decibels(image) == pytest.approx(figure, abs=0.0051), method
                compared += 1
    assert compared == 19
