"""The suites: which files belong to a picture, what was done to it, and how results are judged.

A folder holds one folder a suite; in it `NAME_GT.png` is the truth, `NAME_noisy.png`,
`NAME_masked.png` or `NAME_LR.png` the input, and every other `NAME_METHOD.png` a published result.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flashdip.engine.errors import ConfigError, InputError, ShapeError
from flashdip.engine.files import one_line
from flashdip.engine.images import load
from flashdip.engine.metrics import psnr, psnr_luma
from flashdip.engine.operators import Downsample, Identity, Mask, Operator

METHODS = ("deep_prior", "bm3d", "nlm", "papyan", "tv_prior", "bicubic")  # in the tables' order
Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Suite:
    """One of the paper's benchmarks.

    Attributes:
        name: Of its folder.
        task: The function of `flashdip.engine.tasks` that does it.
        given: Suffix of the input's files.
        preset: The paper's own settings.
        judge: PSNR in dB of an image against the truth, both [C, H, W], as published.
        options: For the task.
    """

    name: str
    task: str
    given: str
    preset: str
    judge: Callable[[Tensor, Tensor], float]
    options: Mapping[str, Any] = field(default_factory=dict)


SUITES = {
    suite.name: suite
    for suite in (
        Suite("denoise25", "denoise", "noisy", "published-denoise", psnr, {"sigma": 25.0}),
        Suite(
            "inpaint50",
            "restore",
            "masked",
            "published-restore50",
            psnr,
            # Published as drawn, with no known pixels pasted back.
            {"missing": "zero", "keep_known": False},
        ),
        Suite("sr4", "superres", "LR", "published-sr4", psnr_luma, {"factor": 4}),
    )
}


@dataclass(frozen=True, eq=False)
class Case:
    """One picture of a suite.

    Attributes:
        suite: Where it belongs.
        name: Of the picture.
        given: The input's file.
        observed: The input, [h, w, C] in [0, 1].
        truth: [H, W, C] in [0, 1].
        published: The published results by method, [H, W, C] each.
    """

    suite: Suite
    name: str
    given: Path
    observed: Pixels
    truth: Pixels
    published: dict[str, Pixels]

    def decibels(self, image: Pixels) -> float:
        """Return the PSNR of a result [H, W, C], rounded to 8 bits, as the suite is judged."""
        return self.suite.judge(_tensor(from_8_bits(in_8_bits(image))), _tensor(self.truth))

    def problem(self) -> tuple[Operator, Tensor, tuple[int, int, int]]:
        """Return the operator, the observation [1, C, h, w], and the image's shape."""
        height, width, channels = self.truth.shape
        observation = _tensor(self.observed)[None]
        operator: Operator = Identity()
        if self.suite.task == "restore":
            operator = Mask((observation > 0).any(1, keepdim=True))
        elif self.suite.task == "superres":
            operator = Downsample(self.suite.options["factor"])
        return operator, observation, (channels, height, width)


def find(data: Path, suites: Sequence[str], images: Sequence[str]) -> list[Case]:
    """Read the pictures of some suites.

    Args:
        data: The folder.
        suites: Names; those whose folder is missing are left out, unless none is left.
        images: Names of pictures; none: all. A name need not be in every suite.

    Raises:
        ConfigError: There is no such suite.
        InputError: Nothing was found, a picture that was asked for is nowhere, or one cannot be
            read.
    """
    if unknown := set(suites) - SUITES.keys():
        raise ConfigError(
            f"suite: expected {', '.join(SUITES)} or all, got {', '.join(sorted(unknown))}"
        )
    cases = [
        _read(suite, path)
        for suite in SUITES.values()
        if suite.name in suites
        for path in sorted((data / suite.name).glob("*_GT.png"))
        if not images or path.name.removesuffix("_GT.png") in images
    ]
    if not cases or (missing := set(images) - {case.name for case in cases}):
        what = ", ".join(sorted(missing)) if cases else "no such picture"
        folders = ", ".join(suites)
        raise InputError(
            f"{one_line(data)}: expected pictures NAME_GT.png{_among(images)} in {folders}, got "
            f"{'none of ' if cases else ''}{one_line(what)}: see --data, --suite and --images"
        )
    return cases


def in_8_bits(image: Pixels) -> NDArray[np.uint8]:
    """Round an image in [0, 1] as an 8-bit file would hold it."""
    bits: NDArray[np.uint8] = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return bits


def from_8_bits(image: NDArray[np.uint8]) -> Pixels:
    """Return what `in_8_bits` took, in [0, 1]."""
    return image.astype(np.float32) / np.float32(255)


def _among(images: Sequence[str]) -> str:
    return f" of {one_line(', '.join(images))}" if images else ""


def _read(suite: Suite, truth: Path) -> Case:
    name = truth.name.removesuffix("_GT.png")
    given = truth.with_name(f"{name}_{suite.given}.png")
    known = load(truth).pixels
    published = {
        method: _like(load(path).pixels, known, path)
        for path in sorted(truth.parent.glob(f"{name}_*.png"))
        if (method := path.stem.removeprefix(f"{name}_")) not in ("GT", suite.given)
        # A_B_GT.png is the picture A_B, not a result for A.
        and not any(path.name.startswith(f"{other}_") for other in _longer(name, truth.parent))
    }
    order = [*METHODS, *sorted(published.keys() - set(METHODS))]
    ordered = {method: published[method] for method in order if method in published}
    observed = load(given).pixels
    factor = suite.options.get("factor", 1)
    expected = (known.shape[0] // factor, known.shape[1] // factor, known.shape[2])
    if observed.shape != expected:
        raise ShapeError(
            f"{one_line(given)}: expected {list(expected)} (height, width, channels), got "
            f"{list(observed.shape)}"
        )
    return Case(suite, name, given, observed, known, ordered)


def _longer(name: str, folder: Path) -> list[str]:
    names = (path.name.removesuffix("_GT.png") for path in folder.glob(f"{name}_*_GT.png"))
    return [other for other in names if other != name]


def _like(image: Pixels, truth: Pixels, path: Path) -> Pixels:
    if image.shape != truth.shape:
        raise ShapeError(
            f"{one_line(path)}: expected {list(truth.shape)} (height, width, channels) like the "
            f"truth, got {list(image.shape)}"
        )
    return image


def _tensor(image: Pixels) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, 2, 0)))
