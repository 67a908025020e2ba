"""The five restorations as functions: an image in, a `Result` dressed as the input was out.

    result = flashdip.denoise("noisy.png", sigma=25)
    result.write("clean.png")

An image is a path, an array [H, W] or [H, W, C], a tensor [C, H, W] or a `Picture`. Each function
checks what it was given, states the `Problem`, and leaves the rest to `fit`. Alpha is not fitted:
it passes through, except where it served as the mask and everything comes out opaque.
"""

from numbers import Integral
from pathlib import Path
from typing import Unpack

import numpy as np
import torch

from flashdip.engine import masks
from flashdip.engine.errors import ConfigError, InputError
from flashdip.engine.fit import fit
from flashdip.engine.images import MAX_PIXELS, Picture
from flashdip.engine.operators import Downsample, Identity, Mask, Operator
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
from flashdip.kernels.resample import Kernel


def denoise(image: Image, **options: Unpack[FitOptions]) -> Result:
    """Remove noise that is independent from pixel to pixel.

    Args:
        image: The noisy image.
        **options: See `FitOptions`. `sigma` is estimated from the image unless it is given.

    Raises:
        InputError: The image or an option cannot be used; the message says why.
    """
    return _restore_whole("denoise", image, options)


def dejpeg(image: Image, **options: Unpack[FitOptions]) -> Result:
    """Remove the blocks and rings that strong JPEG or WebP compression leaves.

    Args:
        image: The compressed image, in any format.
        **options: See `FitOptions`.

    Raises:
        InputError: The image or an option cannot be used; the message says why.
    """
    return _restore_whole("dejpeg", image, options)


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
    picture = picture_of(image, "image", options)
    masks.require_finite(picture)
    _check_factor(factor, picture, options.get("max_pixels", MAX_PIXELS))
    operator = Downsample(int(factor), kernel=kernel)
    return _restore("superres", picture, operator, options, factor=int(factor))


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
    return _restore_known("inpaint", picture, known, keep_known, options)


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
    picture = picture_of(image, "image", options)
    known = masks.from_marker(missing, picture)
    if missing.lower() == "alpha":
        picture = _opaque(picture)
    return _restore_known("restore", picture, known, keep_known, options)


def _restore_whole(task: str, image: Image, options: FitOptions) -> Result:
    picture = picture_of(image, "image", options)
    masks.require_finite(picture)
    return _restore(task, picture, Identity(), options)


def _restore_known(
    task: str, picture: Picture, known: masks.Known, keep: bool, options: FitOptions
) -> Result:
    masks.require_finite(picture, known)
    if keep and known.all():
        raise InputError(
            "mask: expected missing (black) pixels, got none: there is nothing to fill"
        )
    # Missing pixels may hold NaN, which would survive a multiplication by zero.
    picture = picture.with_pixels(np.where(known[:, :, None], picture.pixels, 0))
    mask = torch.from_numpy(known.astype(np.float32))[None, None]  # [1, 1, H, W]
    return _restore(task, picture, Mask(mask), options, known=mask, keep=keep)


def _restore(
    task: str,
    picture: Picture,
    operator: Operator,
    options: FitOptions,
    *,
    factor: int = 1,
    known: torch.Tensor | None = None,
    keep: bool = True,
) -> Result:
    """State the problem, fit it, and dress the fitted image as the input was."""
    height, width, channels = picture.pixels.shape
    shape = (channels, height * factor, width * factor)
    config = config_of(task, options)
    if accept := options.get("accept"):
        accept(picture.with_pixels(np.zeros((*shape[1:], channels), np.float32)))
    sigma = sigma_of(task, config, options, picture, whole=known is None)
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
    checkpoint = options.get("checkpoint")
    result = fit(
        problem,
        config,
        backend=options.get("backend", "auto"),
        device=options.get("device", "auto"),
        providers=names_in(options.get("provider") or ()),
        truth=truth_of(options, picture, shape),
        callback=options.get("callback"),
        init=options.get("init"),
        checkpoint=None if checkpoint is None else Path(checkpoint),
        interrupted=options.get("interrupted", lambda: False),
        notes=notes,
    )
    name = options.get("preset", "default")
    result.record.update(task=task, preset=DEFAULT if name == "default" else name)
    return result.dressed(picture)


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
