"""Add noise to a photograph that anyone may use, restore it, and show the three side by side."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

SIGMA = 25.0
BUDGET = 172.0  # seconds: the rest of 3 minutes is for setting up and writing
FILES = ("clean.png", "noisy.png", "restored.png", "comparison.png", "report.html", "result.json")
_CROP = (40, 0, 424, 384)  # left, upper, right, lower: head, flag and helmet


def photograph(size: int) -> NDArray[np.uint8]:
    """Return scikit-image's astronaut (Eileen Collins, by NASA, public domain), cropped and shrunk.

    Args:
        size: Side of the square in pixels, at most 384.

    Returns:
        [size, size, 3].
    """
    from PIL import Image
    from skimage.data import astronaut

    picture = Image.fromarray(astronaut())
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS, box=_CROP))


def add_noise(clean: NDArray[np.uint8], sigma: float, seed: int) -> NDArray[np.uint8]:
    """Add white Gaussian noise and clip to 8 bits, as a camera's file would hold it.

    Args:
        clean: [H, W, C].
        sigma: Standard deviation, in 1/255 of the range.
        seed: Of the noise.
    """
    noise = np.random.default_rng(seed).normal(0, sigma, clean.shape)
    return np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)


def side_by_side(
    pictures: list[NDArray[np.uint8]], labels: list[str], gap: int = 8, band: int = 24
) -> NDArray[np.uint8]:
    """Lay pictures of one size [H, W, 3] in a row on white, each under its label."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = pictures[0].shape[:2]
    columns = len(pictures)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, height + band + gap), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=min(14, max(8, width // 18)))
    for column, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
        left = gap + column * (width + gap)
        sheet.paste(Image.fromarray(picture), (left, band))
        draw.text((left + width // 2, band // 2), label, fill="black", font=font, anchor="mm")
    return np.asarray(sheet)


def demo(
    directory: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write to; made anew.")
    ] = Path("demo"),
    size: Annotated[
        int, typer.Option(min=32, max=384, help="Side of the picture in pixels.")
    ] = 224,
    seed: Annotated[int, typer.Option(help="Of the noise and of the fit.")] = 0,
    preset: Annotated[str, typer.Option(help="See 'flashdip presets'.")] = "default",
    budget: Annotated[
        float, typer.Option(metavar="SECONDS", help="After which a fit ends, as on a slow machine.")
    ] = BUDGET,
) -> None:
    """Restore a noisy photograph that comes along, and show what it gained.

    It takes 3 minutes at most, unless --budget or --preset asks for more.
    """
    _make_ready(directory)

    from flashdip.engine.images import as_picture, load, save
    from flashdip.engine.metrics import psnr
    from flashdip.engine.progress import Interruption, show_progress
    from flashdip.engine.tasks import denoise

    clean = photograph(size)
    noisy = add_noise(clean, SIGMA, seed)
    typer.echo(f"A photograph of {size}x{size} pixels, with noise of sigma {SIGMA:g} added.")
    with Interruption() as interruption, show_progress("demo") as show:
        result = denoise(
            noisy,
            sigma=SIGMA,
            seed=seed,
            preset=preset,
            budget=budget,
            truth=clean,
            callback=interruption.watch(show),
            interrupted=interruption,
        )
    result.write_record(directory / "result.json", force=True)
    result.report(directory / "report.html", name="a photograph, with noise added", force=True)
    result.write(directory / "restored.png", force=True)
    written = load(directory / "restored.png")
    truth = as_picture(clean).tensor()
    before, after = psnr(as_picture(noisy).tensor(), truth), psnr(written.tensor(), truth)
    restored = np.rint(written.pixels * 255).astype(np.uint8)
    labels = ["clean", f"noisy, {before:.2f} dB", f"restored, {after:.2f} dB"]
    sheet = side_by_side([clean, noisy, restored], labels)
    for name, picture in (("clean", clean), ("noisy", noisy), ("comparison", sheet)):
        save(directory / f"{name}.png", as_picture(picture), force=True)
    seconds = result.record["seconds_setup"] + result.record["seconds_fit"]
    typer.echo(
        f"PSNR {before:.2f} dB before, {after:.2f} dB after ({after - before:+.2f} dB), "
        f"{seconds:.0f} s. Look at {directory / 'comparison.png'} and report.html"
    )
    if interruption.signal is not None and result.stop_reason == "interrupted":
        raise typer.Exit(128 + interruption.signal)


def _make_ready(directory: Path) -> None:
    """Make the folder, or see that it is an earlier demo's, whose files may be overwritten.

    Raises:
        OutputError: It cannot be written to, or holds other files of these names.
    """
    from flashdip.engine.files import check_writable

    if not directory.exists():
        check_writable(directory, force=False)
        directory.mkdir()
    earlier = (directory / "result.json").exists()
    for name in FILES:
        check_writable(directory / name, force=earlier)
