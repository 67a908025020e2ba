"""Files to pictures and back: values, depth, range, alpha, profile, turns; what cannot be saved."""

import zlib
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageOps

from flashdip.engine.errors import InputError, OutputError
from flashdip.engine.images import Picture, check_save, load, save
from tests.pictures import PROFILE, chunk, exif, noise, png, write_tiff

DEPTHS = ("uint8", "uint16", "float32")


def again(path: Path) -> Path:
    """Load a file and save it under another name with the same suffix."""
    copy = path.with_name("again" + path.suffix)
    save(copy, load(path))
    return copy


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


def test_metadata_behind_the_pixels_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    block = exif(6).removeprefix(b"Exif\0\0")
    end = chunk(b"eXIf", block) + chunk(b"IEND", b"")
    path.write_bytes(png(1, 2, 8, 0, zlib.compress(b"\0\1\0\2"))[:-12] + end)
    picture = load(path)
    assert (picture.orientation, picture.pixels.shape) == (6, (1, 2, 1))
    assert_array_equal(np.rint(picture.pixels.ravel() * 255), [2, 1])


def test_broken_metadata_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    block = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x05\0\xff\xff\xff\xff" * 9
    Image.fromarray(noise(9, 7)).save(path, exif=block)
    picture = load(path)
    assert (picture.orientation, picture.icc) == (1, None)
