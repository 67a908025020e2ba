"""The presets: configs as values, keyed by task and name.

The published ones follow the notebooks of DmitryUlyanov/deep-image-prior: network, iterations, rate
and perturbation; the norms' scales start uniform in [0, 1], as the PyTorch of the notebooks drew
them. The notebooks return the last output; here outputs are averaged, and where there is noise the
fit stops early. `--set average=none --stop fixed` gives the published behaviour.
"""

from dataclasses import dataclass, replace
from typing import Any

from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError
from flashdip.engine.networks.skip import SkipConfig

TASKS = ("denoise", "superres", "inpaint", "dejpeg", "restore")
DEFAULT = "balanced"


@dataclass(frozen=True)
class Preset:
    """A config and one line about it."""

    config: FitConfig
    summary: str


_HALVES = (16, 32, 64, 128, 128)
_QUARTER = (32, 64, 128, 128, 128)
# Enlarging by the nearest pixel halves the iterations and costs half a dB of what bilinear
# enlargement reaches.
_NARROW = SkipConfig(down=_HALVES)
_MEDIUM = SkipConfig(down=_QUARTER)
_LIBRARY = SkipConfig(
    inputs=1,
    down=(16, 32, 64, 128, 128, 128),
    skip=0,
    kernel_down=5,
    upsample="nearest",
    conv1x1_up=False,
)
_SNAIL = SkipConfig(inputs=3, down=(8, 16, 32, 64, 128), skip=(0, 0, 0, 4, 4))

_NOISY = FitConfig(stop=("es-wmv",))
_CLEAN = FitConfig(perturbation=0.03)

# A short memory of the second moment halves the iterations, and the image is lost as fast as it
# was gained. With bilinear enlargement the variance of the outputs finds the best moment: on four
# photographs of 192x192, at noise of 15 to 50 and of photons, it lost 0.12 dB at most of what the
# fit reached; at 64x64 it lost more than 1 dB. With the nearest pixel it comes late on textures and
# small pictures, where the residual falls below the noise first; at noise of 50 that is too early.
_BRISK = FitConfig(betas=(0.8, 0.9), stop=("es-wmv",), patience=200)
_QUICK = replace(_BRISK, stop=("es-wmv", "discrepancy"), discrepancy=0.98)
_SMOOTH = replace(_BRISK, patience=100)
_CLEAN_BRISK = FitConfig(betas=(0.8, 0.9), perturbation=0.01, schedule="cosine")
_CLEAN_LONG = FitConfig(betas=(0.9, 0.99), perturbation=0.03, schedule="cosine")


def _of(base: FitConfig, summary: str, **changes: Any) -> Preset:
    return Preset(replace(base, **changes), summary)


def _published(base: FitConfig, summary: str, **changes: Any) -> Preset:
    network = changes.pop("network", base.network)
    return _of(base, summary, network=replace(network, scale="uniform"), **changes)


def _own(task: str) -> dict[tuple[str, str], Preset]:
    """Return the quick, balanced and best preset of a task.

    Those for denoising follow what `flashdip.bench.recipes` found; best has not been compared with
    others yet.
    """
    eighth, quarter = (f"{part} of the paper's width at full size" for part in ("1/8", "1/4"))
    narrow, medium, wide = (
        replace(network, upsample="nearest") for network in (_NARROW, _MEDIUM, SkipConfig())
    )
    wide_summary = "the paper's width, with nearest upsampling"
    if task == "denoise":
        quick = _of(_QUICK, eighth, network=narrow, iterations=500)
        balanced = _of(_SMOOTH, f"{eighth}, bilinear", network=_NARROW, iterations=1600)
        more = f"{quarter}, bilinear, the mean of 4 runs"
        best = _of(_SMOOTH, more, network=_MEDIUM, iterations=1500, runs=4)
    elif task == "dejpeg":
        quick = _of(_BRISK, eighth, network=narrow, iterations=500)
        balanced = _of(_BRISK, quarter, network=medium, iterations=900)
        best = _of(_BRISK, wide_summary, network=wide, iterations=2000)
    else:
        quick = _of(_CLEAN_LONG, eighth, network=narrow, iterations=800)
        if task != "superres":
            quick = _of(_CLEAN_BRISK, f"{eighth}, bilinear", network=_NARROW, iterations=800)
        balanced = _of(_CLEAN_LONG, quarter, network=medium, iterations=2000)
        best = _of(_CLEAN_LONG, wide_summary, network=wide, iterations=5000)
    return {(task, "quick"): quick, (task, "balanced"): balanced, (task, "best"): best}


PRESETS: dict[tuple[str, str], Preset] = {
    **_own("denoise"),
    ("denoise", "published-denoise"): _published(
        _NOISY, "the paper's denoising, for sigma near 25"
    ),
    ("denoise", "published-denoise50"): _published(
        _NOISY, "the paper's denoising, for sigma near 50", perturbation=1 / 20
    ),
    **_own("superres"),
    ("superres", "published-sr4"): _published(_CLEAN, "the paper's x4", iterations=2000),
    ("superres", "published-sr8"): _published(
        _CLEAN, "the paper's x8", iterations=4000, perturbation=0.05
    ),
    **_own("inpaint"),
    ("inpaint", "published-inpaint-hole"): _published(
        _CLEAN,
        "the paper's large hole (vase)",
        network=SkipConfig(inputs=2, skip=0, upsample="nearest"),
        input="meshgrid",
        iterations=5001,
    ),
    ("inpaint", "published-inpaint-text"): _published(
        _CLEAN,
        "the paper's text removal (kate)",
        network=SkipConfig(skip=128, upsample="nearest"),
        iterations=6001,
    ),
    ("inpaint", "published-inpaint-large"): _published(
        _CLEAN,
        "the paper's large region (library)",
        network=_LIBRARY,
        iterations=3001,
        perturbation=0.0,
    ),
    **_own("dejpeg"),
    ("dejpeg", "published-dejpeg"): _published(
        _NOISY, "the paper's JPEG artefact removal (snail)", network=_SNAIL, iterations=2400
    ),
    **_own("restore"),
    ("restore", "published-restore50"): _published(
        _CLEAN,
        "the paper's half of the pixels missing (barbara)",
        iterations=11000,
        learning_rate=0.001,
    ),
    ("restore", "published-restore2"): _published(
        _CLEAN,
        "the paper's 98 of 100 pixels missing (kate)",
        network=SkipConfig(down=_HALVES, skip=0, downsample="avg"),
        iterations=1000,
        perturbation=0.0,
    ),
}


def names(task: str) -> list[str]:
    """Return the names of a task's presets."""
    return [name for of, name in PRESETS if of == task]


def preset(task: str, name: str = "default") -> FitConfig:
    """Return the config of a preset; "default" is "balanced".

    Raises:
        ConfigError: There is no such task, or it has no such preset.
    """
    if task not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, got {task!r}")
    key = (task, DEFAULT if name == "default" else name)
    if key not in PRESETS:
        raise ConfigError(
            f"preset: expected default, {', '.join(names(task))} for {task}, got {name!r}"
        )
    return PRESETS[key].config
