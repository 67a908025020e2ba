"""The picture that the experiments are made with."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdip.engine.demo import photograph
from flashdip.engine.errors import InputError
from flashdip.engine.files import one_line
from flashdip.engine.images import load

STEP = 32  # sides are cut to multiples, as the paper does
Bits = NDArray[np.uint8]


def subject(path: Path | None, size: int) -> Bits:
    """Return a colour picture in 8 bits, [H, W, 3].

    Args:
        path: Its file; None: the photograph that comes along, at this size.
        size: Longer side that larger pictures are shrunk to, in pixels; then the sides are cut,
            centred, to multiples of `STEP`.

    Raises:
        InputError: It is smaller than `STEP`, or has another number of channels than 1 or 3.
    """
    if path is None:
        return photograph(size // STEP * STEP)
    from PIL import Image

    pixels = load(path).pixels
    if pixels.shape[2] not in (1, 3) or not np.isfinite(pixels).all():
        raise InputError(f"{one_line(path)}: expected a finite picture of 1 or 3 channels")
    bits = np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    bits = np.broadcast_to(bits, (*bits.shape[:2], 3))
    scale = min(1.0, size / max(bits.shape[:2]))
    height, width = (round(side * scale) for side in bits.shape[:2])
    small = Image.fromarray(np.ascontiguousarray(bits)).resize(
        (width, height), Image.Resampling.LANCZOS
    )
    kept = [side // STEP * STEP for side in (height, width)]
    if min(kept) == 0:
        raise InputError(
            f"{one_line(path)}: expected sides of at least {STEP} pixels, got {width}x{height} at "
            f"a size of {size}"
        )
    top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
    return np.asarray(small)[top : top + kept[0], left : left + kept[1]]


def tensor(bits: Bits) -> Tensor:
    """Return a picture [H, W, 3] as an image [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(bits, 2, 0))).float()[None] / 255
