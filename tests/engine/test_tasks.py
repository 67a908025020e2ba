"""The five functions: which problem they state, what they refuse, and how the result is dressed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashdip.engine import tasks
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, FlashDIPError, InputError, ShapeError
from flashdip.engine.images import Picture, as_picture, load, save
from flashdip.engine.operators import Downsample, Mask
from flashdip.engine.presets import preset
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result, plain_picture

TINY: dict[str, Any] = {
    "iterations": 4,
    "precision": "fp32",
    "settings": {"network.down": "8,8", "network.inputs": "4", "read_every": "2"},
}


def photo(height: int = 24, width: int = 32, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Return a smooth 8-bit picture without any pixel that is zero."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(4 * x + channel) * np.cos(3 * y + seed) for channel in range(channels)]
    pixels: np.ndarray = np.rint(140 + 100 * np.stack(waves, axis=2)).astype(np.uint8)
    return pixels


def holes(height: int = 24, width: int = 32) -> np.ndarray:
    """Return where a picture is known: everywhere but in a block that touches an edge."""
    known = np.ones((height, width), dtype=bool)
    known[4:9, 20:] = False
    return known


class Stated:
    """What a task handed to `fit`."""

    problem: Problem
    config: FitConfig
    arguments: dict[str, Any]


@pytest.fixture
def stated(monkeypatch: pytest.MonkeyPatch) -> Stated:
    """Replace the fit by one that keeps what it was given and returns a grey image."""
    seen = Stated()

    def fit(problem: Problem, config: FitConfig, **arguments: Any) -> Result:
        seen.problem, seen.config, seen.arguments = problem, config, arguments
        image = problem.paste(torch.full((1, *problem.shape), 0.5))[0]
        return Result(image, {"psnr": None}, {}, plain_picture(image))

    monkeypatch.setattr(tasks, "fit", fit)
    return seen


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_sigma_is_in_1_255_of_the_range_at_any_depth(stated: Stated, dtype: type) -> None:
    image = photo().astype(dtype) * dtype(257 if dtype is np.uint16 else 1)
    tasks.denoise(image / np.float32(255) if dtype is np.float32 else image, sigma=25)
    assert stated.problem.sigma == 25 / 255


def test_sigma_is_estimated_for_denoising(stated: Stated) -> None:
    clean = photo(96, 96)
    noise = np.random.default_rng(1).normal(0, 20, clean.shape)
    tasks.denoise(np.clip(clean + noise, 0, 255).astype(np.uint8))
    assert stated.problem.sigma == pytest.approx(20 / 255, rel=0.1)


def test_the_preset_adapts_to_the_estimated_noise(stated: Stated) -> None:
    clean = photo(96, 96)
    for level in (5, 60):
        noise = np.random.default_rng(1).normal(0, level, clean.shape)
        tasks.denoise(np.clip(clean + noise, 0, 255).astype(np.uint8), preset="quick")
        assert (
            stated.config == preset("denoise", "quick", level / 255) != preset("denoise", "quick")
        )


@pytest.mark.parametrize(("task", "own"), [("dejpeg", {}), ("superres", {"factor": 2})])
def test_sigma_is_estimated_elsewhere_only_if_a_rule_needs_it(
    stated: Stated, task: str, own: dict[str, Any]
) -> None:
    getattr(tasks, task)(photo(), **own)
    assert stated.problem.sigma is None
    getattr(tasks, task)(photo(), stop="discrepancy,fixed", **own)
    assert stated.problem.sigma is not None
    assert stated.config.stop == ("discrepancy", "fixed")


def test_superres_states_the_large_size_and_the_kernel(stated: Stated) -> None:
    result = tasks.superres(photo(10, 12), factor=3, kernel="box")
    assert stated.problem.shape == (3, 30, 36)
    operator = stated.problem.operator
    assert isinstance(operator, Downsample)
    assert (operator.factor, operator.kernel) == (3, "box")
    assert result.picture.pixels.shape == (30, 36, 3)


def test_known_pixels_come_back_bit_for_bit(tmp_path: Path) -> None:
    image, known = photo(), holes()
    result = tasks.inpaint(image, mask=known, **TINY)
    result.write(tmp_path / "a.png")
    written = np.rint(load(tmp_path / "a.png").pixels * 255).astype(np.uint8)
    np.testing.assert_array_equal(written[known], image[known])

    fitted = tasks.inpaint(image, mask=known, keep_known=False, **TINY)
    pixels = np.rint(fitted.picture.pixels * 255)
    assert (pixels[known] != image[known]).mean() > 0.5
    np.testing.assert_array_equal(fitted.image[:, ~known], result.image[:, ~known])


@pytest.mark.parametrize(
    "mask",
    [
        holes(),
        holes().astype(np.uint8),
        holes().astype(np.uint8) * 255,
        holes().astype(np.uint16) * 65535,
        holes().astype(np.float32),
        np.where(holes(), 128, 127).astype(np.uint8),
        np.where(holes()[:, :, None], [255, 128, 100], [90, 128, 100]).astype(np.uint8),
    ],
    ids=["bool", "0-1", "8-bit", "16-bit", "float", "cut at half", "colour"],
)
def test_masks_are_read_alike(stated: Stated, mask: np.ndarray) -> None:
    image = photo()
    tasks.inpaint(image, mask=mask)
    known = torch.from_numpy(holes().astype(np.float32))
    assert isinstance(stated.problem.operator, Mask)
    torch.testing.assert_close(stated.problem.operator.mask[0, 0], known, rtol=0, atol=0)
    expected = torch.from_numpy(image / np.float32(255)).permute(2, 0, 1) * known
    torch.testing.assert_close(stated.problem.observation[0], expected, rtol=0, atol=1e-7)


def with_alpha() -> Picture:
    return replace(as_picture(photo()), alpha=np.where(holes(), 1, 0.3).astype(np.float32))


def test_alpha_as_the_mask_comes_out_opaque(stated: Stated) -> None:
    for result in (tasks.inpaint(with_alpha()), tasks.restore(with_alpha(), missing="alpha")):
        assert result.picture.alpha is not None
        assert (result.picture.alpha == 1).all()
        assert stated.problem.known is not None
        np.testing.assert_array_equal(stated.problem.known[0, 0].numpy() > 0, holes())


def test_alpha_passes_through_otherwise(stated: Stated) -> None:
    picture = with_alpha()
    for result in (tasks.denoise(picture, sigma=5), tasks.inpaint(picture, mask=holes())):
        np.testing.assert_array_equal(result.picture.alpha, picture.alpha)


def broken() -> np.ndarray:
    image = (photo() / 255).astype(np.float32)
    image[~holes()] = np.nan
    image[~holes(), 1] = np.inf
    return image


@pytest.mark.parametrize("task", ["inpaint", "restore"])
def test_nan_marks_missing_pixels(stated: Stated, task: str) -> None:
    own = {"missing": "nan"} if task == "restore" else {}
    result = getattr(tasks, task)(broken(), **own)
    assert stated.problem.known is not None
    np.testing.assert_array_equal(stated.problem.known[0, 0].numpy() > 0, holes())
    assert torch.isfinite(stated.problem.observation).all()
    assert np.isfinite(result.picture.pixels).all()


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize(
    ("missing", "mark"), [("zero", (0, 0, 0)), ("#FF00fe", (255, 0, 254)), ("#030303", (3, 3, 3))]
)
def test_marked_pixels_are_found(
    stated: Stated, missing: str, mark: tuple[int, int, int], depth: int
) -> None:
    image = photo()
    image[~holes()] = mark
    image[0, 0] = (mark[0], mark[1], mark[2] + 1)  # only nearly marked
    if depth == 16:
        image = image.astype(np.uint16) * 257
    tasks.restore(image, missing=missing)
    assert stated.problem.known is not None
    np.testing.assert_array_equal(stated.problem.known[0, 0].numpy() > 0, holes())


def test_zero_is_the_stored_zero_of_a_float_file(stated: Stated) -> None:
    image = photo().astype(np.float32) - 300  # from -260 to -60: its range does not begin at zero
    image[~holes()] = 0
    tasks.restore(image, missing="zero")
    assert stated.problem.known is not None
    np.testing.assert_array_equal(stated.problem.known[0, 0].numpy() > 0, holes())


def test_options_replace_what_the_preset_says(stated: Stated) -> None:
    tasks.denoise(
        photo(),
        preset="quick",
        iterations=7,
        seed=3,
        precision="fp32",
        stop="es-emv, fixed",
        budget=60,
        settings={"average": "none", "network.skip": "2"},
        backend="reference",
        device="cpu",
    )
    config = stated.config
    assert (config.iterations, config.seed, config.precision) == (7, 3, "fp32")
    assert (config.stop, config.budget) == (("es-emv", "fixed", "budget"), 60)
    assert (config.average, config.network.skip) == (None, 2)
    assert (stated.arguments["backend"], stated.arguments["device"]) == ("reference", "cpu")


def test_the_rule_budget_may_take_its_seconds_from_settings(stated: Stated) -> None:
    tasks.dejpeg(photo(), stop=["budget"], settings={"budget": "5"})
    assert (stated.config.stop, stated.config.budget) == (("budget",), 5)


def test_a_float_truth_is_put_on_the_scale_of_the_image(stated: Stated) -> None:
    clean = photo().astype(np.float32)
    noisy = clean * 2 - 100
    tasks.dejpeg(noisy, truth=clean)
    low, high = noisy.min(), noisy.max()
    expected = torch.from_numpy((clean - low) / (high - low)).permute(2, 0, 1)
    torch.testing.assert_close(stated.arguments["truth"], expected, rtol=0, atol=1e-6)


def test_the_truth_does_not_change_a_bit(tmp_path: Path) -> None:
    image = photo()
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 20, image.shape), 0, 255)
    for name, truth in (("without.png", None), ("with.png", image)):
        result = tasks.denoise(noisy.astype(np.uint8), sigma=20, truth=truth, **TINY)
        assert (result.psnr is None) == (truth is None)
        result.write(tmp_path / name)
    assert (tmp_path / "without.png").read_bytes() == (tmp_path / "with.png").read_bytes()


def test_accept_sees_the_result_before_the_fit(stated: Stated) -> None:
    def refuse(blank: Picture) -> None:
        assert blank.pixels.shape == (48, 64, 3)
        assert blank.dtype == "uint8"
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        tasks.superres(photo(), factor=2, accept=refuse)
    assert not hasattr(stated, "problem")


def test_misspelt_options_are_not_ignored() -> None:
    with pytest.raises(TypeError, match="'itertions'"):
        tasks.denoise(photo(), itertions=5)  # type: ignore[call-arg]


ALL = np.zeros((24, 32), dtype=bool)
REFUSED: dict[str, tuple[type[FlashDIPError], str, str, dict[str, Any]]] = {
    "mask of another size": (
        ShapeError,
        "mask: .*32x24.*33x24",
        "inpaint",
        {"mask": holes(24, 33)},
    ),
    "all-zero mask": (InputError, "mask: .*invert", "inpaint", {"mask": ALL}),
    "all-known mask": (InputError, "nothing to fill", "inpaint", {"mask": ~ALL}),
    "no mask at all": (InputError, "--mask", "inpaint", {}),
    "negative sigma": (ConfigError, "sigma: .*got -1", "denoise", {"sigma": -1}),
    "sigma of NaN": (ConfigError, "sigma: .*got nan", "denoise", {"sigma": float("nan")}),
    "factor 1": (ConfigError, "factor: .*at least 2, got 1", "superres", {"factor": 1}),
    "factor 2.5": (ConfigError, "factor: .*whole number.*2.5", "superres", {"factor": 2.5}),
    "result too large": (
        InputError,
        "at most 1000 pixels.*5 x 32x24 = 19200.*--max-pixels",
        "superres",
        {"factor": 5, "max_pixels": 1000},
    ),
    "kernel": (
        ConfigError,
        "kernel: .*lanczos2.*'lanczos4'",
        "superres",
        {"factor": 2, "kernel": "lanczos4"},
    ),
    "nothing is zero": (InputError, "zero in all channels, got none", "restore", {}),
    "no alpha": (InputError, "without alpha", "restore", {"missing": "alpha"}),
    "no NaN": (InputError, "NaN or infinite, got none", "restore", {"missing": "nan"}),
    "unknown mark": (ConfigError, "missing: .*'#12'", "restore", {"missing": "#12"}),
    "unknown preset": (ConfigError, "preset: .*'fast'", "denoise", {"preset": "fast"}),
    "unknown field": (ConfigError, "speed: .*iterations", "dejpeg", {"settings": {"speed": "9"}}),
    "unknown rule": (ConfigError, "stop: .*'es-wmw'", "dejpeg", {"stop": "es-wmw"}),
    "unknown backend": (ConfigError, "backend: .*'tpu'", "dejpeg", {"backend": "tpu"}),
    "budget rule without budget": (ConfigError, "budget", "dejpeg", {"stop": "budget"}),
    "sigma between holes": (
        ConfigError,
        "sigma: .*missing pixels",
        "inpaint",
        {"mask": holes(), "stop": "discrepancy"},
    ),
    "truth of another size": (
        ShapeError,
        "truth: .*32x24.*24x32",
        "dejpeg",
        {"truth": photo(32, 24)},
    ),
    "truth of another depth": (
        ShapeError,
        "truth: .*of 3 .*of 1$",
        "dejpeg",
        {"truth": photo(channels=1)},
    ),
    "truth with NaN": (InputError, "truth: .*NaN", "dejpeg", {"truth": broken()}),
}


@pytest.mark.parametrize(("error", "message", "task", "own"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_input_is_refused_with_one_line(
    error: type[FlashDIPError], message: str, task: str, own: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message) as caught:
        getattr(tasks, task)(photo(), **own)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", ["denoise", "dejpeg", "superres"])
def test_nan_is_refused_where_nothing_covers_it(task: str) -> None:
    count = int((~holes()).sum())
    own = {"factor": 2} if task == "superres" else {}
    with pytest.raises(InputError, match=f"got {count} of 768.*inpaint.*--missing nan"):
        getattr(tasks, task)(broken(), **own)


def test_nan_under_known_is_refused() -> None:
    mask = holes()
    mask[4, 20] = True
    with pytest.raises(InputError, match=r"got 1 of 768 .*the mask says known"):
        tasks.inpaint(broken(), mask=mask)
    with pytest.raises(InputError, match="NaN or infinite everywhere"):
        tasks.inpaint(np.full((24, 32), np.nan, np.float32))


def test_images_under_16_pixels_are_refused_unless_the_result_is_larger(stated: Stated) -> None:
    with pytest.raises(ShapeError, match=r"16 pixels.*15x40"):
        tasks.dejpeg(photo(40, 15))
    tasks.superres(photo(8, 9), factor=2)
    assert stated.problem.shape == (3, 16, 18)


def test_colour_marks_of_grey_and_many_channels() -> None:
    with pytest.raises(InputError, match="grey"):
        tasks.restore(photo(channels=1), missing="#ff00ff")
    with pytest.raises(InputError, match="1 or 3 channels"):
        tasks.restore(photo(channels=5), missing="#ff00ff")


def test_the_result_is_dressed_as_the_input_was(tmp_path: Path) -> None:
    dress = replace(
        as_picture(photo(channels=1).astype(np.uint16) * 200),
        icc=None,
        orientation=6,
        dpi=(72.0, 72.0),
    )
    save(tmp_path / "in.png", dress)
    result = tasks.denoise(tmp_path / "in.png", sigma=3, **TINY)
    result.write(tmp_path / "out.png")
    written = load(tmp_path / "out.png")
    assert (written.dtype, written.orientation) == ("uint16", 6)
    assert written.pixels.shape == (24, 32, 1)
    np.testing.assert_allclose(written.pixels[:, :, 0], result.image[0], rtol=0, atol=1 / 65535)
