"""The methods that a network is compared with, run here: NLM, TV, bicubic; BM3D where it may be.

None of them sees the truth; strengths follow from the noise level.
"""

import sys
import warnings
from collections.abc import Callable
from importlib.metadata import distribution
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from flashdip.bench.measure import clock
from flashdip.bench.parity.suites import Case, Pixels, from_8_bits, in_8_bits
from flashdip.bench.total_variation import least_variation
from flashdip.engine.errors import UnavailableError
from flashdip.engine.files import user_cache

NLM_STRENGTH = 0.6  # of sigma, as scikit-image advises
TV_WEIGHTS = np.geomspace(0.4, 2.5, 9)  # of sigma, to choose from


class Rival(NamedTuple):
    """An image [H, W, C] in [0, 1], and the seconds it took."""

    image: Pixels
    seconds: float


def rivals(case: Case, *, bm3d: bool = False) -> dict[str, Rival]:
    """Run the methods that can do a case, by name.

    Args:
        case: What to restore.
        bm3d: Run BM3D too, on denoising.

    Raises:
        UnavailableError: BM3D was asked for and is not installed.
    """
    methods: dict[str, Callable[[Case], Pixels]] = {}
    if case.suite.task == "denoise":
        methods["nlm"] = lambda case: non_local_means(case.observed, _sigma(case))
        methods["tv"] = lambda case: total_variation(case.observed, _sigma(case))
        if bm3d:
            methods["bm3d"] = _bm3d
    else:
        methods["tv"] = _completed
        if case.suite.task == "superres":
            methods["bicubic"] = _bicubic
    return {name: _timed(method, case) for name, method in methods.items()}


def _timed(method: Callable[[Case], Pixels], case: Case) -> Rival:
    images: list[Pixels] = []
    seconds = clock(lambda: images.append(method(case)), steps=1, warmup=0)
    return Rival(images[0], seconds)


def _sigma(case: Case) -> float:
    return float(case.suite.options["sigma"]) / 255


def non_local_means(noisy: Pixels, sigma: float) -> Pixels:
    """Denoise by non-local means (Buades, Coll and Morel 2005), scikit-image's.

    Args:
        noisy: [H, W, C] in [0, 1].
        sigma: Of the noise.
    """
    from skimage.restoration import denoise_nl_means

    found = denoise_nl_means(
        noisy,
        patch_size=5,
        patch_distance=6,
        h=NLM_STRENGTH * sigma,
        sigma=sigma,
        fast_mode=True,
        channel_axis=-1,
    )
    return np.asarray(found, dtype=np.float32)


def total_variation(noisy: Pixels, sigma: float) -> Pixels:
    """Denoise by total variation (Rudin, Osher and Fatemi 1992), scikit-image's.

    Of `TV_WEIGHTS` the one with the least estimated error is taken: Stein's unbiased estimate, with
    the divergence from one random probe (Ramani, Blu and Unser 2008).

    Args:
        noisy: [H, W, C] in [0, 1].
        sigma: Of the noise.
    """
    from skimage.restoration import denoise_tv_chambolle

    def denoised(image: NDArray[np.float64], weight: float) -> NDArray[np.float64]:
        found = denoise_tv_chambolle(
            image, weight=weight * sigma, eps=1e-4, max_num_iter=300, channel_axis=-1
        )
        return np.asarray(found, dtype=np.float64)

    given = noisy.astype(np.float64)
    probe = np.random.default_rng(0).choice([-1.0, 1.0], given.shape)
    step = 0.1 * sigma

    def risk(weight: float) -> tuple[float, Pixels]:
        found = denoised(given, weight)
        divergence = float((probe * (denoised(given + step * probe, weight) - found)).mean()) / step
        residual = float(np.square(found - given).mean())
        return residual + 2 * sigma**2 * divergence, found.astype(np.float32)

    return min((risk(weight) for weight in TV_WEIGHTS), key=lambda pair: pair[0])[1]


def _completed(case: Case) -> Pixels:
    """Return the image of least variation among those that agree with what was measured."""
    operator, observation, shape = case.problem()
    image = least_variation(operator, observation, shape)
    return np.moveaxis(image[0].numpy(), 0, 2)


def _bicubic(case: Case) -> Pixels:
    from PIL import Image

    height, width = case.truth.shape[:2]
    small = Image.fromarray(in_8_bits(case.observed))
    large = small.resize((width, height), Image.Resampling.BICUBIC)
    return from_8_bits(np.asarray(large))


def _bm3d(case: Case) -> Pixels:
    show_terms()
    import bm3d

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        colour = case.observed.shape[2] == 3
        run = bm3d.bm3d_rgb if colour else bm3d.bm3d
        image = np.asarray(run(case.observed.astype(np.float64), _sigma(case)), dtype=np.float32)
    return image.reshape(case.observed.shape)


def show_terms() -> None:
    """Print the terms of the package bm3d on stderr, the first time that this user runs it.

    Raises:
        UnavailableError: It is not installed.
    """
    if find_spec("bm3d") is None:
        raise UnavailableError(
            "bm3d is not installed; it is for non-commercial use only and FlashDIP does not bring "
            "it: pip install 'flashdip[baselines-nc]', or leave --bm3d out"
        )
    package = distribution("bm3d")
    shown = user_cache() / f"bm3d-terms-{package.version}"
    if shown.exists():
        return
    terms = [file for file in package.files or [] if file.name.upper().startswith("LICENSE")]
    text = "\n".join(file.read_text() for file in terms) or str(package.metadata)
    print(
        f"bm3d {package.version} is not part of FlashDIP and comes under terms of its own, shown "
        f"this once:\n\n{text}",
        file=sys.stderr,
    )
    shown.touch()
