"""Pictures in memory: their shapes, their tensors, and what else can be made one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from flashdip.engine.errors import ImageError, InputError, ShapeError
from flashdip.engine.images import Picture, as_picture, load
from tests.pictures import PROFILE, exif, noise


def test_picture_checks_its_shapes() -> None:
    for shape in [(9, 7), (0, 7, 3), (9, 7, 0)]:
        with pytest.raises(ShapeError, match="expected"):
            Picture(np.zeros(shape, np.float32))
    with pytest.raises(ShapeError, match=r"alpha: expected \[9, 7\]"):
        Picture(np.zeros((9, 7, 3), np.float32), np.zeros((7, 9), np.float32))


def test_tensor_and_with_pixels(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(noise(9, 7, 4)).save(path, exif=exif(8), icc_profile=PROFILE)
    picture = load(path)
    tensor = picture.tensor()
    assert tensor.shape == (1, 3, 7, 9)
    assert_array_equal(tensor[0].permute(1, 2, 0), picture.pixels)
    same = picture.with_pixels(tensor.requires_grad_())
    assert_array_equal(same.pixels, picture.pixels)
    assert same.alpha is picture.alpha
    assert (same.icc, same.orientation, same.dtype) == (PROFILE, 8, "uint8")
    assert_array_equal(picture.with_pixels(picture.pixels).pixels, same.pixels)
    assert picture.with_pixels(tensor, alpha=None).alpha is None


def test_alpha_grows_with_the_pixels() -> None:
    step = np.array([[0, 0, 1, 1]] * 4, dtype=np.float32)
    picture = Picture(np.zeros((4, 4, 1), np.float32), step)
    larger = picture.with_pixels(torch.zeros(1, 8, 8))
    assert larger.alpha is not None
    assert_array_equal(larger.alpha[:, :2], 0)
    assert_array_equal(larger.alpha[:, -2:], 1)
    assert np.all(np.diff(larger.alpha, axis=1) >= 0)


def test_as_picture_takes_arrays() -> None:
    assert_array_equal(as_picture(noise(9, 7) > 99).pixels[:, :, 0], noise(9, 7) > 99)
    for dtype in ("uint8", "uint16"):
        values = noise(9, 7, 3, dtype=dtype)
        picture = as_picture(values)
        assert picture.dtype == dtype
        assert_allclose(picture.pixels, values / np.iinfo(dtype).max, rtol=1e-6)
    wide = as_picture(np.array([[-2.0, 6.0]]))
    assert (wide.low, wide.high, wide.pixels.ravel().tolist()) == (-2, 6, [0, 1])
    own = noise(9, 7, 2, dtype="float32")
    picture = as_picture(own)
    own[:] = 0
    assert picture.pixels.max() > 0.5
    assert as_picture(picture) is picture


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 3, 9, 7), (3, 9, 7)])
def test_as_picture_takes_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.linspace(-0.2, 1.2, 3 * 9 * 7).reshape(shape).to(dtype)
    picture = as_picture(tensor)
    assert (picture.low, picture.high) == (0, 1)
    assert_array_equal(picture.tensor()[0], tensor.reshape(3, 9, 7).float())


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (np.zeros(5, np.uint8), ShapeError, r"photo: expected \[H, W\]"),
        (np.zeros((5, 0, 3), np.uint8), ShapeError, r"\[5, 0, 3\]"),
        (np.zeros((5, 5), np.int64), InputError, "int64"),
        (np.zeros((5, 5), complex), InputError, "complex128"),
        (torch.zeros(2, 3, 5, 5), ShapeError, r"\[2, 3, 5, 5\]"),
        (torch.zeros(3, 5, 5, dtype=torch.uint8), InputError, "uint8"),
        (torch.full((3, 5, 5), 255.0), InputError, "from 255 to 255"),
        ([[0.0]], InputError, "got list"),
    ],
)
def test_as_picture_refuses(source: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        as_picture(source, name="photo")


def test_as_picture_takes_paths(tmp_path: Path) -> None:
    Image.fromarray(noise(9, 7)).save(tmp_path / "a.png")
    assert as_picture(str(tmp_path / "a.png")).format == "PNG"
    with pytest.raises(ImageError, match="--max-pixels"):
        as_picture(tmp_path / "a.png", max_pixels=62)
