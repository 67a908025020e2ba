"""The five restorations as functions: an image in, a `Result` dressed as the input was out.

    result = flashdip.denoise("noisy.png", sigma=25)
    result.write("clean.png")

An image is a path, an array [H, W] or [H, W, C], a tensor [C, H, W] or a `Picture`. Each function
checks what it was given, states the `Problem`, and leaves the rest to `fit`; `state` goes as far as
the statement. Alpha is not fitted: it passes through, except where it served as the mask and
everything comes out opaque.
"""

from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch

from flashdip.engine import masks
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, InputError
from flashdip.engine.fit import fit
from flashdip.engine.images import MAX_PIXELS, Picture
from flashdip.engine.operators import Downsample, Identity, Mask, Operator
from flashdip.engine.planning import Plan, plan
from flashdip.engine.presets import DEFAULT
from flashdip.engine.problems import Problem
from flashdip.engine.result import Result
from flashdip.engine.task_options import (
    FitOptions,
    Image,
    config_of,
    names_in,
    picture_of,
    sigma_of,
    truth_of,
)
from flashdip.engine.tiled import fit_tiled
from flashdip.kernels.resample import Kernel


@dataclass(frozen=True, eq=False)
class Statement:
    """A restoration that is checked and stated, and not yet fitted.

    Attributes:
        problem: What is fitted.
        config: How.
        truth: The undamaged image, [C, H, W] in [0, 1], or None.
        notes: Lines that a person should see with the start of the fit and in the record.
        picture: What the result is dressed like; None: it stays as it comes.
        factor: How many times larger it is than what was measured; None: it cannot be tiled.
    """

    problem: Problem
    config: FitConfig
    truth: torch.Tensor | None
    notes: tuple[str, ...]
    picture: Picture | None
    factor: int | None = 1
    task: str | None = None


def state(task: str, image: Image, options: FitOptions, **own: Any) -> Statement:
    """State the problem that the function called `task` would fit.

    Args:
        task: Name of one of the five functions.
        image: See `Image`.
        options: See `FitOptions`.
        **own: What that function takes besides.

    Raises:
        ConfigError: There is no such task, or it takes nothing of such a name.
        InputError: The image or an option cannot be used; the message says why.
    """
    check_own(task, own)
    match task:
        case "superres":
            return _enlarged(image, own["factor"], own.get("kernel", "lanczos2"), options)
        case "inpaint":
            return _open(image, own.get("mask"), own.get("keep_known", True), options)
        case "restore":
            marker, keep = own.get("missing", "zero"), own.get("keep_known", True)
            return _marked(image, marker, keep, options)
        case _:
            return _whole(task, image, options)


OWN: dict[str, tuple[str, ...]] = {
    "denoise": (),
    "superres": ("factor", "kernel"),
    "inpaint": ("mask", "keep_known"),
    "dejpeg": (),
    "restore": ("missing", "keep_known"),
}
"""What each task takes besides `FitOptions`."""


def check_own(task: str, own: Collection[str]) -> None:
    """Check that a task takes what it is given besides `FitOptions`, and is given what it needs.

    Raises:
        ConfigError: It does not or is not, or there is no such task.
    """
    if task not in OWN:
        raise ConfigError(f"task: expected one of {', '.join(OWN)}, got {task!r}")
    for name in own:
        if name not in OWN[task]:
            raise ConfigError(f"{name}: {task} takes no such option: leave it out")
    if task == "superres" and "factor" not in own:
        raise ConfigError("factor: expected a whole number of at least 2 for superres, got none")


def denoise(image: Image, **options: Unpack[FitOptions]) -> Result:
    """Remove noise that is independent from pixel to pixel.

    The preset adapts to the noise level; see `flashdip.engine.presets.preset`.

    Args:
        image: The noisy image.
        **options: See `FitOptions`. `sigma` is estimated from the image unless it is given.

    Raises:
        InputError: The image or an option cannot be used; the message says why.
    """
    return solve(_whole("denoise", image, options), options)


def dejpeg(image: Image, **options: Unpack[FitOptions]) -> Result:
    """Remove the blocks and rings that strong JPEG or WebP compression leaves.

    Args:
        image: The compressed image, in any format.
        **options: See `FitOptions`.

    Raises:
        InputError: The image or an option cannot be used; the message says why.
    """
    return solve(_whole("dejpeg", image, options), options)


def superres(
    image: Image, *, factor: int, kernel: Kernel = "lanczos2", **options: Unpack[FitOptions]
) -> Result:
    """Enlarge an image to `factor` times its width and height.

    Args:
        image: The small image.
        factor: Whole number, at least 2.
        kernel: How the small image is taken to have been made; see `Downsample`.
        **options: See `FitOptions`; `truth` has the large size.

    Raises:
        InputError: The image or an option cannot be used; the message says why.
    """
    return solve(_enlarged(image, factor, kernel, options), options)


def inpaint(
    image: Image,
    *,
    mask: Image | None = None,
    keep_known: bool = True,
    **options: Unpack[FitOptions],
) -> Result:
    """Fill the pixels that a mask leaves open.

    Args:
        image: The image with holes.
        mask: 1 or white = known, 0 or black = missing; grey is cut at half. None takes the image's
            own transparent, NaN and infinite pixels as missing; the result is then opaque.
        keep_known: Paste the known pixels back over the fitted ones.
        **options: See `FitOptions`.

    Raises:
        InputError: The image, the mask or an option cannot be used; the message says why.
    """
    return solve(_open(image, mask, keep_known, options), options)


def restore(
    image: Image,
    *,
    missing: str = "zero",
    keep_known: bool = True,
    **options: Unpack[FitOptions],
) -> Result:
    """Fill missing pixels that the picture itself marks.

    Args:
        image: The image with marked pixels.
        missing: The mark: "zero" (all channels zero), "nan" (any channel NaN or infinite), "alpha"
            (transparent; the result is opaque) or "#rrggbb" (that colour).
        keep_known: Paste the known pixels back over the fitted ones.
        **options: See `FitOptions`.

    Raises:
        InputError: The image or an option cannot be used; the message says why.
    """
    return solve(_marked(image, missing, keep_known, options), options)


def _whole(task: str, image: Image, options: FitOptions) -> Statement:
    picture = picture_of(image, "image", options)
    masks.require_finite(picture)
    return _state(task, picture, Identity(), options)


def _enlarged(image: Image, factor: int, kernel: Kernel, options: FitOptions) -> Statement:
    picture = picture_of(image, "image", options)
    masks.require_finite(picture)
    _check_factor(factor, picture, options.get("max_pixels", MAX_PIXELS))
    operator = Downsample(int(factor), kernel=kernel)
    return _state("superres", picture, operator, options, factor=int(factor))


def _open(image: Image, mask: Image | None, keep: bool, options: FitOptions) -> Statement:
    picture = picture_of(image, "image", options)
    if mask is not None:
        known = masks.from_mask(picture_of(mask, "mask", options), picture)
    else:
        known = masks.finite(picture)
        if picture.alpha is not None:
            known &= masks.from_alpha(picture)
            picture = _opaque(picture)
        masks.require_some(known, "transparent, NaN or infinite")
        if known.all():
            raise InputError(
                "image: expected a mask, or transparent or NaN pixels in the image itself, got "
                "none of them: give the mask (--mask FILE, white = known)"
            )
    return _known("inpaint", picture, known, keep, options)


def _marked(image: Image, missing: str, keep: bool, options: FitOptions) -> Statement:
    picture = picture_of(image, "image", options)
    known = masks.from_marker(missing, picture)
    if missing.lower() == "alpha":
        picture = _opaque(picture)
    return _known("restore", picture, known, keep, options)


def _known(
    task: str, picture: Picture, known: masks.Known, keep: bool, options: FitOptions
) -> Statement:
    masks.require_finite(picture, known)
    if keep and known.all():
        raise InputError(
            "mask: expected missing (black) pixels, got none: there is nothing to fill"
        )
    # Missing pixels may hold NaN, which would survive a multiplication by zero.
    picture = picture.with_pixels(np.where(known[:, :, None], picture.pixels, 0))
    mask = torch.from_numpy(known.astype(np.float32))[None, None]  # [1, 1, H, W]
    return _state(task, picture, Mask(mask), options, known=mask, keep=keep)


def _state(
    task: str,
    picture: Picture,
    operator: Operator,
    options: FitOptions,
    *,
    factor: int = 1,
    known: torch.Tensor | None = None,
    keep: bool = True,
) -> Statement:
    """State the problem."""
    height, width, channels = picture.pixels.shape
    shape = (channels, height * factor, width * factor)
    config = config_of(task, options)
    if accept := options.get("accept"):
        accept(picture.with_pixels(np.zeros((*shape[1:], channels), np.float32)))
    sigma = sigma_of(task, config, options, picture, whole=known is None)
    config = config_of(task, options, sigma)
    notes = []
    if sigma is not None and options.get("sigma") is None:
        notes.append(f"noise level estimated as {sigma * 255:.1f} of 255 (--sigma sets it)")
    problem = Problem(
        observation=picture.tensor(),
        operator=operator,
        shape=shape,
        sigma=sigma,
        measured=known,
        known=known if keep else None,
    )
    truth = truth_of(options, picture, shape)
    return Statement(problem, config, truth, tuple(notes), picture, factor, task)


def planned(stated: Statement, options: FitOptions, *, timed: bool = False) -> Plan:
    """Return what the fit of a statement needs, and how it is tiled if that is too much.

    Args:
        stated: The restoration.
        options: See `FitOptions`.
        timed: Whether to run a few iterations, to estimate the time.

    Raises:
        UnavailableError: The backend or device cannot be used, or has too little memory.
    """
    return plan(
        stated.config,
        stated.problem.shape,
        backend=options.get("backend", "auto"),
        device=options.get("device", "auto"),
        timed=timed,
        factor=stated.factor,
        tile=options.get("tile"),
        limit=options.get("memory"),
    )


def solve(stated: Statement, options: FitOptions, found: Plan | None = None) -> Result:
    """Fit what was stated, in tiles if need be, and dress the fitted image as the input was.

    Args:
        stated: The restoration.
        options: See `FitOptions`.
        found: What `planned` returned; None: it is asked.
    """
    tell = options.get("planned")
    found = found or planned(stated, options, timed=tell is not None)
    if tell is not None:
        tell(found)
    checkpoint = options.get("checkpoint")
    how: dict[str, Any] = {
        "backend": options.get("backend", "auto"),
        "device": options.get("device", "auto"),
        "truth": stated.truth,
        "callback": options.get("callback"),
        "init": options.get("init"),
        "interrupted": options.get("interrupted", lambda: False),
        "notes": [*stated.notes, found.needs()],
    }
    providers = names_in(options.get("provider") or ())
    if found.tiling is None:
        file = None if checkpoint is None else Path(checkpoint)
        result = fit(stated.problem, stated.config, checkpoint=file, providers=providers, **how)
    elif providers:
        raise ConfigError(
            "provider: expected a picture that is fitted whole, got tiles: leave it out"
        )
    else:
        folder = options.get("tiles") if checkpoint is None else checkpoint
        folder = None if folder is None else Path(folder)
        result = fit_tiled(stated.problem, stated.config, found.tiling, folder=folder, **how)
    if stated.task is not None:
        name = options.get("preset", "default")
        preset = DEFAULT if name == "default" else name
        result.record.update(task=stated.task, preset=preset)
    return result if stated.picture is None else result.dressed(stated.picture)


def _check_factor(factor: int, picture: Picture, max_pixels: int) -> None:
    if not isinstance(factor, Integral) or factor < 2:
        raise ConfigError(f"factor: expected a whole number of at least 2, got {factor}")
    height, width = picture.pixels.shape[:2]
    if height * width * factor**2 > max_pixels:
        raise InputError(
            f"factor: expected a result of at most {max_pixels} pixels, got {factor} x "
            f"{masks.size(picture)} = {height * width * factor**2}: take a smaller factor or raise "
            "the limit (--max-pixels)"
        )


def _opaque(picture: Picture) -> Picture:
    return picture.with_pixels(picture.pixels, np.ones(picture.pixels.shape[:2], np.float32))
