"""Pictures from files and back: values, depth, range, alpha, profile, turns; and bad files."""

import io
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from numpy.testing import assert_allclose, assert_array_equal
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

from flashdip.engine import images
from flashdip.engine.errors import ImageError, InputError, OutputError, ShapeError
from flashdip.engine.images import Picture, as_picture, check_save, load, save

Array = NDArray[Any]
DEPTHS = ("uint8", "uint16", "float32")
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape: int, dtype: str = "uint8", seed: int = 0) -> Array:
    """Return random values over all of a type's range, its ends included."""
    rng = np.random.default_rng(seed)
    if dtype == "float32":
        return rng.random(shape, dtype=np.float32)
    top = np.iinfo(dtype).max
    values = rng.integers(0, top, shape, dtype=dtype, endpoint=True)
    values.flat[:2] = 0, top
    return values


def write_tiff(path: Path, values: Array, **options: Any) -> Path:
    tifffile.imwrite(path, values, **({"metadata": None} | options))
    return path


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def again(path: Path) -> Path:
    """Load a file and save it under another name with the same suffix."""
    copy = path.with_name("again" + path.suffix)
    save(copy, load(path))
    return copy


def refuses(path: Path, *words: str, max_pixels: int = images.MAX_PIXELS) -> None:
    """Check that loading gives one line that names the file and holds these words."""
    with pytest.raises(ImageError) as caught:
        load(path, max_pixels=max_pixels)
    message = str(caught.value)
    assert message.isprintable()
    for word in (path.name, "expected", "got", *words):
        assert word in message


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_comes_back_bit_for_bit(tmp_path: Path, channels: int, dtype: str) -> None:
    values = noise(9, 7, channels, dtype=dtype)
    path = tmp_path / "a.png"
    path.write_bytes(imagecodecs.png_encode(values))
    picture = load(path)
    top = np.iinfo(dtype).max
    colours = channels - (channels + 1) % 2
    assert (picture.dtype, picture.low, picture.high, picture.format) == (dtype, 0, top, "PNG")
    assert picture.pixels.dtype == np.float32
    assert_allclose(picture.pixels, values[:, :, :colours] / top, rtol=1e-6)
    if channels in (2, 4):
        assert picture.alpha is not None
        assert_allclose(picture.alpha, values[:, :, -1] / top, rtol=1e-6)
    else:
        assert picture.alpha is None
    back = imagecodecs.png_decode(again(path).read_bytes())
    assert back.dtype == dtype
    assert_array_equal(back.reshape(values.shape), values)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_png_of_few_bits_fills_the_range(tmp_path: Path, bits: int) -> None:
    row = zlib.compress(b"\0\x1b")  # 00 01 10 11
    path = tmp_path / "a.png"
    path.write_bytes(png(8 // bits, 1, bits, 0, row, chunk(b"tRNS", b"\0\1")))
    levels = [0x1B >> 8 - bits - place & 2**bits - 1 for place in range(0, 8, bits)]
    picture = load(path)
    assert picture.dtype == "uint8"
    assert_allclose(picture.pixels[0, :, 0], np.array(levels) / (2**bits - 1), rtol=1e-6)
    assert picture.alpha is not None
    assert_array_equal(picture.alpha[0], np.array(levels) != 1)


def test_png_palette_becomes_its_colours(tmp_path: Path) -> None:
    values = noise(9, 7, 3)
    palette = Image.fromarray(values).quantize(8)
    palette.save(tmp_path / "a.png", transparency=bytes([0, 128]))
    picture = load(tmp_path / "a.png")
    wanted = np.asarray(palette.convert("RGB"))
    assert_array_equal(np.rint(picture.pixels * 255), wanted)
    indices = np.asarray(palette)
    assert picture.alpha is not None
    assert_array_equal(
        np.rint(picture.alpha * 255), np.select([indices == 0, indices == 1], [0, 128], 255)
    )


@pytest.mark.parametrize("lossless", [True, False])
@pytest.mark.parametrize("channels", [3, 4])
def test_webp_comes_back_bit_for_bit(tmp_path: Path, channels: int, lossless: bool) -> None:
    values = noise(9, 7, channels)
    path = tmp_path / "a.webp"
    Image.fromarray(values).save(path, lossless=lossless, exact=True, icc_profile=PROFILE)
    with Image.open(path) as image:
        stored = np.asarray(image)
    if lossless:
        assert_array_equal(stored, values)
    with Image.open(again(path)) as image:
        assert_array_equal(np.asarray(image), stored)
        assert image.info["icc_profile"] == PROFILE


def test_jpeg_comes_back_close_and_not_subsampled(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 48 * 48 * 3).reshape(48, 48, 3).astype(np.uint8)
    for name, values in {"rgb.jpg": smooth, "grey.jpeg": smooth[:, :, 0]}.items():
        Image.fromarray(values).save(tmp_path / name, quality=90, icc_profile=PROFILE, dpi=(72, 72))
        with Image.open(tmp_path / name) as image:
            stored = np.asarray(image).astype(int)
        assert_array_equal(np.rint(load(tmp_path / name).pixels * 255).squeeze(), stored)
        with Image.open(again(tmp_path / name)) as image:
            assert np.abs(np.asarray(image).astype(int) - stored).max() <= 4
            assert image.info["icc_profile"] == PROFILE
            assert image.info["dpi"] == (72, 72)
            if image.mode == "RGB":
                assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", DEPTHS)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "layout", [{}, {"compression": "lzw", "tile": (16, 16)}, {"byteorder": ">"}]
)
def test_tiff_comes_back_bit_for_bit(
    tmp_path: Path, channels: int, dtype: str, layout: dict[str, Any]
) -> None:
    values = noise(9, 7, channels, dtype=dtype)
    photometric = "rgb" if channels == 3 else "minisblack"
    path = tmp_path / "a.tif"
    plane = values if channels > 1 else values[:, :, 0]
    contig: dict[str, Any] = {"planarconfig": "contig"} if channels > 1 else {}
    write_tiff(path, plane, photometric=photometric, **layout, **contig)
    picture = load(path)
    assert (picture.dtype, picture.alpha, picture.pixels.shape) == (dtype, None, values.shape)
    assert_allclose(picture.pixels, values / picture.high, rtol=1e-6)
    back = tifffile.imread(again(path))
    assert back.dtype == dtype
    assert_array_equal(back, plane)


@pytest.mark.parametrize("dtype", DEPTHS)
@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_tiff_alpha_comes_back_bit_for_bit(tmp_path: Path, dtype: str, kind: str) -> None:
    values = noise(9, 7, 4, dtype=dtype)
    if kind == "assocalpha":
        values[:, :, :3] = np.minimum(values[:, :, :3], values[:, :, 3:])
    path = write_tiff(tmp_path / "a.tif", values, photometric="rgb", extrasamples=[kind])
    picture = load(path)
    top = 1 if dtype == "float32" else np.iinfo(dtype).max
    alpha = values[:, :, 3] / top
    assert picture.alpha is not None
    assert_allclose(picture.alpha, alpha, rtol=1e-6)
    if kind == "assocalpha":
        assert_allclose(picture.pixels * alpha[:, :, None], values[:, :, :3] / top, atol=1e-6)
    with tifffile.TiffFile(again(path)) as file:
        page = file.pages.first
        assert [int(extra) for extra in page.extrasamples] == [2 if kind == "unassalpha" else 1]
        tolerance = 1e-6 if dtype == "float32" and kind == "assocalpha" else 0
        assert_allclose(page.asarray(), values, rtol=tolerance, atol=tolerance)


def test_tiff_keeps_rgb_beside_more_channels(tmp_path: Path) -> None:
    values = noise(9, 7, 4, dtype="uint16")
    path = write_tiff(tmp_path / "a.tif", values, photometric="rgb", extrasamples=["unspecified"])
    assert load(path).pixels.shape == (9, 7, 4)
    with tifffile.TiffFile(again(path)) as file:
        assert file.pages.first.photometric == tifffile.PHOTOMETRIC.RGB
        assert_array_equal(file.pages.first.asarray(), values)


def test_tiff_kinds_that_become_plain(tmp_path: Path) -> None:
    grey, rgb = noise(9, 7), noise(9, 7, 3)
    path = write_tiff(tmp_path / "white.tif", grey, photometric="miniswhite")
    assert_array_equal(np.rint(load(path).pixels[:, :, 0] * 255), 255 - grey)
    path = write_tiff(tmp_path / "planes.tif", np.moveaxis(rgb, -1, 0), photometric="rgb")
    assert_array_equal(np.rint(load(path).pixels * 255), rgb)
    colours = noise(3, 256, dtype="uint16", seed=1)
    path = write_tiff(tmp_path / "palette.tif", grey, photometric="palette", colormap=colours)
    assert_array_equal(np.rint(load(path).pixels * 255), (colours >> 8).T[grey])
    path = write_tiff(tmp_path / "bits.tif", grey > 99, photometric="minisblack")
    assert_array_equal(load(path).pixels[:, :, 0], grey > 99)
    twelve = noise(9, 7, dtype="uint16") >> 4
    path = write_tiff(tmp_path / "twelve.tif", twelve, photometric="minisblack", bitspersample=12)
    assert_allclose(load(path).pixels[:, :, 0], twelve / 4095, atol=1e-5)
    path = write_tiff(tmp_path / "jpeg.tif", rgb, photometric="rgb", compression="jpeg")
    assert_array_equal(np.rint(load(path).pixels * 255), tifffile.imread(path))


@pytest.mark.parametrize("dtype", ["int16", "uint32", "float16", "float64"])
def test_tiff_of_other_numbers_becomes_float(tmp_path: Path, dtype: str) -> None:
    values = (noise(9, 7, dtype="float32") * 3000 + 5).astype(dtype)
    picture = load(write_tiff(tmp_path / "a.tif", values, photometric="minisblack"))
    assert (picture.dtype, picture.low, picture.high) == (
        "float32",
        values.min().astype(np.float32),
        values.max().astype(np.float32),
    )
    save(tmp_path / "b.tif", picture)
    assert_allclose(tifffile.imread(tmp_path / "b.tif"), values, rtol=1e-6, atol=3e-4)


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([0.2, 0.5, np.nan, np.inf], 0, 1),
        ([-3, 5, np.nan, -np.inf], -3, 5),
        ([-3e38, 3e38, 0, 1], -3e38, 3e38),
        ([7, 7, 7, 7], 7, 14),
        ([np.nan, np.nan, np.inf, np.nan], 0, 1),
    ],
)
def test_float_range_is_that_of_the_finite_values(
    tmp_path: Path, values: list[float], low: float, high: float
) -> None:
    stored = np.array(values, dtype=np.float32).reshape(2, 2)
    path = write_tiff(tmp_path / "a.tif", stored, photometric="minisblack")
    picture = load(path)
    assert picture.low == np.float32(low)
    assert picture.high == np.float32(high)
    finite = np.isfinite(stored)
    scaled = picture.pixels[:, :, 0]
    assert_array_equal(np.isfinite(scaled), finite)
    if finite.any():
        assert scaled[finite].min() >= 0
        assert scaled[finite].max() <= 1
    rounding = (high - low) * 2.0**-23
    assert_allclose(tifffile.imread(again(path)), stored, rtol=1e-6, atol=rounding)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".jpg"])
def test_orientation(tmp_path: Path, suffix: str, orientation: int) -> None:
    values = np.kron(noise(3, 2, 3), np.ones((16, 16, 1), np.uint8))
    path = tmp_path / f"a{suffix}"
    if suffix == ".tif":
        tag = (274, 3, 1, orientation, True)
        write_tiff(path, values, photometric="rgb", extratags=[tag])
    else:
        options: dict[str, dict[str, Any]]
        options = {".webp": {"lossless": True}, ".jpg": {"quality": 95, "subsampling": 0}}
        Image.fromarray(values).save(path, exif=exif(orientation), **options.get(suffix, {}))
    with Image.open(path) as image:
        stored = np.asarray(image)
        upright = np.asarray(ImageOps.exif_transpose(image))
    picture = load(path)
    assert picture.orientation == orientation
    assert_array_equal(np.rint(picture.pixels * 255), upright)
    with Image.open(again(path)) as image:
        assert image.getexif().get(0x0112, 1) == orientation
        assert_allclose(np.asarray(image).astype(int), stored, atol=4 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("dtype", DEPTHS)
def test_dress_of_png_and_tiff(tmp_path: Path, dtype: str) -> None:
    picture = Picture(
        noise(9, 7, 3, dtype="float32"),
        noise(9, 7, dtype="float32"),
        dtype,
        icc=PROFILE,
        orientation=6,
        dpi=(300.0, 150.0),
    )
    for suffix in (".tif", ".png"):
        save(tmp_path / f"a{suffix}", picture)
        back = load(tmp_path / f"a{suffix}")
        assert back.icc == PROFILE
        assert back.orientation == 6
        assert back.dpi == pytest.approx((300, 150), abs=0.02)  # PNG counts pixels per metre
        assert back.dtype == ("uint16" if (suffix, dtype) == (".png", "float32") else dtype)
        step = 0.5 / 255 if dtype == "uint8" else 0.5 / 65535
        assert_allclose(back.pixels, picture.pixels, atol=step * 1.001)
        assert picture.alpha is not None
        assert back.alpha is not None
        assert_allclose(back.alpha, picture.alpha, atol=step * 1.001)


def test_saving_to_integers_rounds_and_clips(tmp_path: Path) -> None:
    pixels = np.array([[-0.5, 0.4 / 255, 0.6 / 255, 1.5]], dtype=np.float32)[:, :, None]
    save(tmp_path / "a.png", Picture(pixels, dtype="uint8"))
    assert_array_equal(imagecodecs.png_decode((tmp_path / "a.png").read_bytes()), [[0, 0, 1, 255]])
    save(tmp_path / "a.webp", Picture(pixels, dtype="uint16"))
    with Image.open(tmp_path / "a.webp") as image:
        assert_array_equal(np.asarray(image)[:, :, 1], [[0, 0, 1, 255]])


def test_saving_what_a_format_cannot_hold(tmp_path: Path) -> None:
    grey = noise(9, 7, 1, dtype="float32")
    clear = np.zeros((9, 7), np.float32)
    broken = np.where(np.arange(7)[:, None] == 3, np.nan, grey)
    for name, picture, words in [
        ("a.png", Picture(noise(9, 7, 5, dtype="float32")), "TIFF"),
        ("a.jpg", Picture(grey, clear), "transparent"),
        ("a.bmp", Picture(grey), r"\.png, .* got \.bmp"),
        ("a", Picture(grey), "no suffix"),
        ("a.webp", Picture(np.zeros((1, 20000, 1), np.float32)), "16383"),
    ]:
        with pytest.raises(InputError, match=words):
            check_save(tmp_path / name, picture)
        with pytest.raises(InputError, match=words):
            save(tmp_path / name, picture)
    for name in ("a.png", "a.jpg", "a.webp"):
        with pytest.raises(InputError, match="NaN"):
            save(tmp_path / name, Picture(broken))
    save(tmp_path / "opaque.jpg", Picture(grey, np.ones((9, 7), np.float32)))
    save(tmp_path / "nan.tif", Picture(broken))
    assert_array_equal(tifffile.imread(tmp_path / "nan.tif"), broken[:, :, 0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nan.tif", "opaque.jpg"]


def test_saving_over_a_file_needs_force(tmp_path: Path) -> None:
    picture = Picture(noise(9, 7, 1, dtype="float32"))
    save(tmp_path / "a.png", picture)
    with pytest.raises(OutputError, match="--force"):
        save(tmp_path / "a.png", picture)
    save(tmp_path / "a.png", picture, force=True)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OutputError, match=r"a\.png.*disk is full"):
        save(tmp_path / "a.png", Picture(noise(9, 7, 1, dtype="float32")))
    assert list(tmp_path.iterdir()) == []


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


def test_files_that_are_no_images(tmp_path: Path) -> None:
    refuses(tmp_path / "missing.png", "no such file", "check the path")
    refuses(tmp_path, "directory")
    refuses(tmp_path / "line\nbreak.png".replace("\n", " "), "no such file")
    with pytest.raises(ImageError, match=r"line break\.png"):
        load(tmp_path / "line\nbreak.png")
    with pytest.raises(ImageError, match="readable"):
        load("null\0byte")
    (tmp_path / "empty.png").write_bytes(b"")
    refuses(tmp_path / "empty.png", "empty")
    (tmp_path / "text.png").write_text("hello")
    refuses(tmp_path / "text.png", "PNG, JPEG, WebP or TIFF", "hello")
    os.mkfifo(tmp_path / "pipe.png")
    refuses(tmp_path / "pipe.png", "pipe")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated_files(tmp_path: Path, suffix: str, part: float) -> None:
    whole = tmp_path / f"whole{suffix}"
    Image.fromarray(noise(40, 30, 3)).save(whole)
    data = whole.read_bytes()
    path = tmp_path / f"part{suffix}"
    path.write_bytes(data[: int(len(data) * part)])
    refuses(path, "damaged, truncated")


def test_deep_png_truncated(tmp_path: Path) -> None:
    data = imagecodecs.png_encode(noise(40, 30, 3, dtype="uint16"))
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    refuses(tmp_path / "a.png", "damaged, truncated")


def test_several_frames_or_pages(tmp_path: Path) -> None:
    frames = [Image.fromarray(noise(9, 7, 3, seed=seed)) for seed in range(3)]
    for suffix in (".png", ".webp", ".tif"):
        path = tmp_path / f"a{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        refuses(path, "one still image")


def test_thumbnails_beside_a_tiff_are_ignored(tmp_path: Path) -> None:
    values = noise(16, 16)
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(values, photometric="minisblack", metadata=None)
        file.write(values[::2, ::2], photometric="minisblack", subfiletype=1, metadata=None)
    assert_array_equal(np.rint(load(tmp_path / "a.tif").pixels[:, :, 0] * 255), values)


def test_kinds_that_cannot_be_restored_as_they_are(tmp_path: Path) -> None:
    cmyk = Image.new("CMYK", (7, 9))
    cmyk.save(tmp_path / "a.jpg")
    cmyk.save(tmp_path / "a.tif")
    refuses(tmp_path / "a.jpg", "CMYK", "convert it to RGB")
    refuses(tmp_path / "a.tif", "SEPARATED", "convert it to RGB")
    write_tiff(tmp_path / "b.tif", np.zeros((9, 7), np.complex64), photometric="minisblack")
    refuses(tmp_path / "b.tif", "COMPLEX")
    write_tiff(tmp_path / "c.tif", noise(9, 7), compression="png", photometric="minisblack")
    refuses(tmp_path / "c.tif", "compression", "PNG")
    write_tiff(tmp_path / "d.tif", noise(3, 9, 7), volumetric=True, photometric="minisblack")
    refuses(tmp_path / "d.tif", "volume")
    alpha = np.full((9, 7, 2), 7, np.float32)
    write_tiff(
        tmp_path / "e.tif", alpha, photometric="minisblack", planarconfig="contig",
        extrasamples=["unassalpha"],
    )  # fmt: skip
    refuses(tmp_path / "e.tif", "alpha within [0, 1]")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_the_limit_on_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(noise(40, 30, 3)).save(path)
    refuses(path, "1,199 pixels", "30 x 40", "--max-pixels", max_pixels=1199)
    assert load(path, max_pixels=1200).pixels.shape == (40, 30, 3)


def test_many_channels_count_as_pixels(tmp_path: Path) -> None:
    path = write_tiff(
        tmp_path / "a.tif", noise(9, 7, 40), photometric="minisblack", planarconfig="contig"
    )
    refuses(path, "40 channels", max_pixels=629)
    assert load(path, max_pixels=630).pixels.shape == (9, 7, 40)


def chunk(name: bytes, content: bytes) -> bytes:
    size, check = len(content), zlib.crc32(name + content)
    return struct.pack(">I", size) + name + content + struct.pack(">I", check)


def png(width: int, height: int, bits: int, kind: int, pixels: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def patched_tiff(code: int, value: int, type: int = 4, **options: Any) -> bytes:
    """Return a small TIFF with one tag replaced by one value, LONG unless `type` says otherwise."""
    file = io.BytesIO()
    tifffile.imwrite(file, noise(48, 64), photometric="minisblack", metadata=None, **options)
    data = bytearray(file.getvalue())
    with tifffile.TiffFile(io.BytesIO(bytes(data))) as parsed:
        tag = parsed.pages.first.tags[code]
        struct.pack_into("<HI", data, tag.offset + 2, type, 1)
        struct.pack_into("<I", data, tag.offset + 8, value)
    return bytes(data)


def giant_jpeg_in_tiff() -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, noise(48, 64, 3), photometric="rgb", compression="jpeg")
    data = file.getvalue()
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", 60000, 60000) + data[place + 4 :]


def many_scans() -> bytes:
    file = io.BytesIO()
    Image.fromarray(noise(48, 64)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * 1000 + data[-2:]


def endless_pages() -> bytes:
    data = bytearray(patched_tiff(254, 1, subfiletype=1))  # a thumbnail, whose next page is itself
    (start,) = struct.unpack_from("<I", data, 4)
    (tags,) = struct.unpack_from("<H", data, start)
    struct.pack_into("<I", data, start + 2 + 12 * tags, start)
    return bytes(data)


def webp_canvas() -> bytes:
    flags_and_size = b"\0\0\0\0" + b"\xff\xff\0" + b"\xfe\xff\0"
    body = b"WEBPVP8X" + struct.pack("<I", 10) + flags_and_size
    return b"RIFF" + struct.pack("<I", len(body)) + body


BOMB = zlib.compress(bytes(200_000_000), 9)
PIXEL = zlib.compress(b"\0\0")
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "zipped text": (lambda: png(1, 1, 8, 0, PIXEL, chunk(b"zTXt", b"a\0\0" + BOMB)), "too large"),
    "zipped text behind the pixels": (
        lambda: png(1, 1, 8, 0, PIXEL)[:-12] + chunk(b"zTXt", b"a\0\0" + BOMB),
        "too large",
    ),
    "zipped profile": (
        lambda: png(1, 1, 8, 0, PIXEL, chunk(b"iCCP", b"a\0\0" + BOMB)),
        "too large",
    ),
    "giant PNG": (lambda: png(2**31 - 1, 2**31 - 1, 16, 6, b""), "--max-pixels"),
    "empty PNG": (lambda: png(0, 5, 8, 0, b""), "0 x 5"),
    "giant WebP canvas": (webp_canvas, "--max-pixels"),
    "giant TIFF": (lambda: patched_tiff(256, 2**32 - 1), "--max-pixels"),
    "empty TIFF": (lambda: patched_tiff(257, 0), "64 x 0"),
    "TIFF width of text": (lambda: patched_tiff(256, 64, type=2), "imagewidth is"),
    "TIFF channels": (lambda: patched_tiff(277, 60000), "failed to read"),
    "giant TIFF tile": (lambda: patched_tiff(322, 2**26, tile=(64, 64)), "tiles of 4,294,967,296"),
    "TIFF strip beyond the end": (lambda: patched_tiff(279, 2**31), "behind the file's end"),
    "TIFF strip without data": (lambda: patched_tiff(279, 0), "empty"),
    "missing TIFF strips": (lambda: patched_tiff(278, 8, compression="zlib"), "1 strips"),
    "endless TIFF pages": (endless_pages, "64 frames or pages"),
    "giant JPEG in TIFF": (giant_jpeg_in_tiff, "60000 x 60000"),
    "progressive JPEG": (many_scans, "scans"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_take_no_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "hostile"
    content, word = HOSTILE[name]
    path.write_bytes(content())
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        pytest.skip("this system does not let a process reset its peak of memory")
    before = peak_kilobytes()
    refuses(path, word)
    assert peak_kilobytes() - before < 50_000


def peak_kilobytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def test_a_file_too_large_for_its_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        file.truncate(1 << 40)  # sparse: takes no space
    refuses(path, "bytes", "--max-pixels")


def test_broken_metadata_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    block = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x05\0\xff\xff\xff\xff" * 9
    Image.fromarray(noise(9, 7)).save(path, exif=block)
    picture = load(path)
    assert (picture.orientation, picture.icc) == (1, None)


def test_surplus_bytes_are_not_worth_a_word(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png(1, 1, 16, 0, zlib.compress(b"\0\1\1" + bytes(99))) + b"more")
    assert_allclose(load(path).pixels, [[[257 / 65535]]], rtol=1e-6)
    assert capfd.readouterr() == ("", "")


def test_metadata_behind_the_pixels_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    block = exif(6).removeprefix(b"Exif\0\0")
    end = chunk(b"eXIf", block) + chunk(b"IEND", b"")
    path.write_bytes(png(1, 2, 8, 0, zlib.compress(b"\0\1\0\2"))[:-12] + end)
    picture = load(path)
    assert (picture.orientation, picture.pixels.shape) == (6, (1, 2, 1))
    assert_array_equal(np.rint(picture.pixels.ravel() * 255), [2, 1])
