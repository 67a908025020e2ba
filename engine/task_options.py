"""The options that all five restorations share, and what they amount to: config, noise, truth."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, TypeAlias, TypedDict

import torch
from numpy.typing import NDArray

from flashdip.engine import masks
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, InputError, ShapeError
from flashdip.engine.events import Event
from flashdip.engine.images import MAX_PIXELS, Picture, as_picture
from flashdip.engine.noise_level import estimate_sigma
from flashdip.engine.planning import Plan
from flashdip.engine.presets import preset
from flashdip.engine.warm import Init

Image: TypeAlias = str | PathLike[str] | NDArray[Any] | torch.Tensor | Picture


class FitOptions(TypedDict, total=False):
    """What all five functions accept by keyword; each may be left out.

    Attributes:
        preset: Name of the preset, "default" if left out.
        sigma: Standard deviation of the noise, in 1/255 of the full range at any depth; None lets
            it be estimated where it is needed.
        iterations, seed, precision, stop, budget: In place of the preset's values. `stop` is one
            or more of fixed, es-wmv, es-emv, discrepancy and budget, as a list or joined by commas.
            `budget` is in seconds and adds "budget" to `stop`.
        settings: Any field of `FitConfig` by name, as text: `{"average": "none"}`.
        backend, device: Names, or "auto".
        provider: Of ONNX Runtime, with the backend "onnx": one or more of cpu, cuda, tensorrt, ...
            as a list or joined by commas.
        truth: The undamaged image; it is reported on and never steers the fit.
        callback: Called with each `Event`.
        init: Result of an earlier fit, or the folder it was saved in, to begin with its weights.
        checkpoint: File to save the state of the fit in, and to continue from; a folder where the
            picture is tiled.
        tile: Side of the tiles that the picture is cut into, in pixels of the result; None: it is
            tiled only if it does not fit into memory.
        memory: Bytes, or text such as "6GB", that this process may have; None: what is there.
        planned: Given, before the fit, what it needs, time included; may raise.
        tiles: Folder for the tiles of a picture that is tiled, unless `checkpoint` says another.
        interrupted: Asked between iterations; True ends the fit with the best image so far.
        max_pixels: Largest input and output, in pixels.
        accept: Given, before the fit, a blank picture with the result's size and dress; raises
            what speaks against it, such as a file format that cannot hold it.
    """

    preset: str
    sigma: float | None
    iterations: int | None
    stop: str | Sequence[str] | None
    budget: float | None
    seed: int | None
    precision: str | None
    settings: Mapping[str, str] | None
    backend: str
    device: str
    provider: str | Sequence[str] | None
    truth: Image | None
    callback: Callable[[Event], None] | None
    init: Init | None
    checkpoint: str | PathLike[str] | None
    tile: int | None
    memory: int | str | None
    planned: Callable[[Plan], object]
    tiles: str | PathLike[str] | None
    interrupted: Callable[[], bool]
    max_pixels: int
    accept: Callable[[Picture], object]


def picture_of(image: Image, name: str, options: FitOptions) -> Picture:
    """Read an image, mask or truth, no larger than the options allow.

    Args:
        image: See `Image`.
        name: What messages call an array: image, mask, truth.
        options: All that the caller gave by keyword.

    Raises:
        InputError: It cannot be used.
        TypeError: An option has a name that there is not.
    """
    if unknown := options.keys() - FitOptions.__annotations__.keys():
        raise TypeError(f"unexpected keyword argument {sorted(unknown)[0]!r}: see FitOptions")
    return as_picture(image, name=name, max_pixels=options.get("max_pixels", MAX_PIXELS))


def config_of(task: str, options: FitOptions, sigma: float | None = None) -> FitConfig:
    """Take the preset, the options that replace its values, the settings by name, and `stop`.

    `stop` comes last because the rule "budget" is refused before there is a budget.

    Args:
        sigma: Standard deviation of the noise in [0, 1], to which the preset adapts; None: that of
            the options.
    """
    if sigma is None and (given_sigma := options.get("sigma")) is not None:
        sigma = given_sigma / 255
    named = {key: options.get(key) for key in ("iterations", "budget", "seed", "precision")}
    given: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    config = replace(preset(task, options.get("preset", "default"), sigma), **given)
    config = config.override(options.get("settings") or {})
    stop = options.get("stop")
    rules: Sequence[str] = config.stop if stop is None else names_in(stop)
    if options.get("budget") is not None:
        rules = [*rules, "budget"]
    unique: tuple[Any, ...] = tuple(dict.fromkeys(rules))
    return replace(config, stop=unique)


def names_in(given: str | Sequence[str]) -> list[str]:
    """Return names that were given as a list, or joined by commas."""
    return [name.strip() for name in (given.split(",") if isinstance(given, str) else given)]


def sigma_of(
    task: str, config: FitConfig, options: FitOptions, picture: Picture, *, whole: bool
) -> float | None:
    """Return the noise level in [0, 1]: given, or estimated where it is needed, or None.

    Args:
        whole: All pixels were measured, so that an estimate is possible.

    Raises:
        ConfigError: It is outside [0, 255], or is needed and can be had in neither way.
    """
    sigma = options.get("sigma")
    if sigma is not None:
        if not (math.isfinite(sigma) and 0 <= sigma <= 255):
            raise ConfigError(
                f"sigma: expected 0 to 255 (1/255 of the full range, at any depth), got {sigma:g}"
            )
        return float(sigma) / 255
    needed = "discrepancy" in config.stop
    if needed and not whole:
        raise ConfigError(
            "sigma: expected the noise level for the stopping rule discrepancy, got none, and it "
            "cannot be estimated between missing pixels: give it (--sigma)"
        )
    return estimate_sigma(picture.pixels) if needed or task == "denoise" else None


def truth_of(
    options: FitOptions, picture: Picture, shape: tuple[int, int, int]
) -> torch.Tensor | None:
    """Read the truth, [C, H, W] = `shape`, on the scale of the picture; None if none was given.

    Raises:
        ShapeError: It has another size or number of channels.
        InputError: It holds NaN or infinity, or cannot be read.
    """
    given = options.get("truth")
    if given is None:
        return None
    truth = picture_of(given, "truth", options)
    height, width, channels = truth.pixels.shape
    if (channels, height, width) != shape:
        raise ShapeError(
            f"truth: expected {shape[2]}x{shape[1]} pixels (width x height) of {shape[0]} "
            f"channel(s) like the result, got {width}x{height} of {channels}"
        )
    if not masks.finite(truth).all():
        raise InputError("truth: expected finite pixels, got NaN or infinity: PSNR has no value")
    pixels = truth.pixels
    if truth.dtype == picture.dtype == "float32":
        # Each float file was scaled by its own range: bring the truth onto the image's.
        stored = pixels * (truth.high - truth.low) + truth.low
        pixels = (stored - picture.low) / (picture.high - picture.low)
    return truth.with_pixels(pixels).tensor()[0]  # [C, H, W]
