"""The explicit prior that the paper argues against, total variation on pixels, at each task.

The same damage as in the paper's suites, on one picture; methods that know no network beside the
network, each judged as its suite is.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flashdip.bench.explore.subject import Bits
from flashdip.bench.parity.rivals import rivals
from flashdip.bench.parity.suites import SUITES, Case, Pixels, Suite, from_8_bits, in_8_bits
from flashdip.engine import tasks
from flashdip.engine.demo import add_noise
from flashdip.engine.events import Event
from flashdip.engine.images import as_picture
from flashdip.engine.task_options import FitOptions

NETWORK = "network"


def damage(suite: Suite, clean: Bits, seed: int) -> Bits:
    """Do to a picture [H, W, 3] what the suite undoes.

    Args:
        suite: Denoising, half of the pixels missing, or enlarging.
        clean: The picture.
        seed: Of noise and mask.
    """
    if suite.task == "denoise":
        return add_noise(clean, suite.options["sigma"], seed)
    if suite.task == "restore":
        known = np.random.default_rng(seed).random(clean.shape[:2]) > 0.5
        return np.where(known[:, :, None], np.maximum(clean, 1), 0).astype(np.uint8)
    from PIL import Image

    height, width = (side // suite.options["factor"] for side in clean.shape[:2])
    return np.asarray(Image.fromarray(clean).resize((width, height), Image.Resampling.LANCZOS))


def tv(
    clean: Bits,
    options: FitOptions,
    *,
    suites: Sequence[str] = tuple(SUITES),
    seed: int = 0,
    callback: Callable[[str, Event], None] = lambda name, event: None,
) -> dict[str, dict[str, Any]]:
    """Undo each damage by every method.

    Args:
        clean: The picture, [H, W, 3].
        options: Of the network's fits.
        suites: Which damages.
        seed: Of the damage.
        callback: Receives the name of a suite and the events of its fit.

    Returns:
        For each suite "decibels" and "images" ([H, W, 3] in [0, 1]) by method; the network is
        `NETWORK`, what was measured is "given".
    """
    found: dict[str, dict[str, Any]] = {}
    for name in suites:
        suite = SUITES[name]
        given = damage(suite, clean, seed)
        case = Case(suite, name, Path(name), from_8_bits(given), from_8_bits(clean), {})
        images: dict[str, Pixels] = {method: rival.image for method, rival in rivals(case).items()}
        own: dict[str, Any] = dict(options) | dict(suite.options)
        if suite.task == "restore":
            own["keep_known"] = True  # the image of least variation keeps what was measured, too
        result = getattr(tasks, suite.task)(
            as_picture(given), callback=partial(callback, name), **own
        )
        images[NETWORK] = np.moveaxis(result.image.numpy(), 0, 2)
        found[name] = {
            "decibels": {method: case.decibels(image) for method, image in images.items()},
            "images": {"given": from_8_bits(given)}
            | {method: from_8_bits(in_8_bits(image)) for method, image in images.items()},
        }
    return found
