"""The presets: configs as values, keyed by task and name.

The published ones follow the notebooks of DmitryUlyanov/deep-image-prior: network, iterations, rate
and perturbation; the norms' scales start uniform in [0, 1], as the PyTorch of the notebooks drew
them. The notebooks return the last output; here outputs are averaged, and where there is noise the
fit stops early. `--set average=none --stop fixed` gives the published behaviour.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError
from flashdip.engine.networks.skip import SkipConfig
from flashdip.kernels.opset import Up

TASKS = ("denoise", "superres", "inpaint", "dejpeg", "restore")
DEFAULT = "balanced"
_LITTLE, _MUCH = 17.5 / 255, 30 / 255  # noise, between which that of the paper's figures lies
_LONG, _SHORT, _SHORTER = 200, 150, 100  # outputs in the windowed variance


class Measured(NamedTuple):
    """What a preset gave and cost on one picture of 256x256.

    Attributes:
        picture: Of the paper, and its damage.
        before: PSNR of the damaged picture, in dB; of a small one, of its bicubic enlargement.
        after: PSNR of the restored one, as it was written; of a small one's luma.
        seconds: Its iterations, times the seconds of one on two cores of `cpu`.
        cpu: "Zen 5", an AMD EPYC, in bfloat16; or "Skylake", an Intel Xeon without it, in float32.
    """

    picture: str
    before: float
    after: float
    seconds: float
    cpu: str


@dataclass(frozen=True)
class Preset:
    """A config, one line about it, and what it was seen to give and cost, if it was measured."""

    config: FitConfig
    summary: str
    measured: Measured | None = None


_HALVES = (16, 32, 64, 128, 128)
_QUARTER = (32, 64, 128, 128, 128)
# Enlarging by the nearest pixel halves the iterations and costs half a dB of what bilinear
# enlargement reaches; with the outermost level bilinear it costs a fifth of a dB. Scales that start
# uniform save an eighth of the iterations.
_NARROW = SkipConfig(down=_HALVES)
_MEDIUM = SkipConfig(down=_QUARTER)
_OUTSIDE: tuple[Up, ...] = ("bilinear", "nearest")
# With four levels, no skip at full resolution and wider ones below, an iteration takes a fifth less
# and fewer are needed. On house at 256x256 31.98 dB are reached (31.85 before; two seeds each); on
# four pictures of 192x192 0.14 dB less, in a quarter less time.
_BARE = SkipConfig(down=(16, 32, 64, 128), skip=(0, 8), upsample=_OUTSIDE)
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
# photographs of 192x192, at noise of 15 to 50 and of photons, it lost 0.07 dB on average of what
# the fit reached, and 0.26 at most (14 of the 16), over 100 outputs up to noise of 30, where over
# 200 it lost up to 0.51; at 64x64 it lost more than 1 dB. With the nearest pixel it comes late on
# textures and small pictures, by up to 2.4 dB at noise of 15. There the residual, which falls below
# the noise at that moment, is the better rule; where the noise is strong and its level a guess it
# may fall far too early or never. So `quick` asks both, and above noise of 30 the variance alone;
# of 150 outputs, for over 200 it came 40 iterations late. At noise of 25 the residual is to come to
# 0.995 of the noise, which lost 0.08 dB at most over these pictures (at 0.98: 0.47), at 15 to 0.98:
# 0.30 at most (at 0.995: 0.53); over all 16 it lost 0.07 dB on average.
# Of the residual a twenty-fifth is added back, if noise is not above 30: at the best moment of
# `quick` that brings 0.08 to 0.10 dB at noise of 25 and 0.10 to 0.13 at 15 (five pictures, one with
# four seeds), more before it and half of that after; at 50 it brings nothing, or loses 0.09.
_BRISK = FitConfig(betas=(0.8, 0.9), stop=("es-wmv",), patience=200)
_SMOOTH = replace(_BRISK, patience=100, window=_SHORTER, add_back=0.04)
_QUICK = replace(
    _SMOOTH,
    betas=(0.8, 0.95),
    stop=("es-wmv", "discrepancy"),
    window=_LONG,
    discrepancy=0.995,
)
_CLEAN_BRISK = FitConfig(betas=(0.8, 0.9), perturbation=0.02, schedule="cosine")
_CLEAN_LONG = FitConfig(betas=(0.9, 0.99), perturbation=0.03, schedule="cosine")


def _of(base: FitConfig, summary: str, **changes: Any) -> Preset:
    return Preset(replace(base, **changes), summary)


def _published(base: FitConfig, summary: str, **changes: Any) -> Preset:
    network = changes.pop("network", base.network)
    return _of(base, summary, network=replace(network, scale="uniform"), **changes)


def _own(task: str) -> dict[tuple[str, str], Preset]:
    """Return the quick, balanced and best preset of a task.

    They were chosen by few fits: those for denoising begin where `flashdip.bench.recipes` screened
    best at 128x128, and were altered one field at a time on `house`; those for super-resolution on
    `butterfly`, for missing pixels on `house` again. The mean of several runs gained more there
    than a wider network. No other pictures have confirmed them.
    """
    eighth, quarter = "an eighth as wide", "a quarter as wide"  # as the paper's, at full size
    mean = "the mean of {} runs".format
    slim = replace(_NARROW, upsample=_OUTSIDE)
    narrow, medium = (replace(n, upsample="nearest") for n in (_NARROW, _MEDIUM))
    if task == "denoise":
        early, smooth, wider = (replace(n, scale="uniform") for n in (_BARE, _NARROW, _MEDIUM))
        quick = _of(_QUICK, f"{eighth}, four levels", network=early, iterations=580)
        balanced = _of(_SMOOTH, f"{eighth}, bilinear", network=smooth, iterations=1600)
        best = _of(_SMOOTH, f"{quarter}, {mean(4)}", network=wider, iterations=1500, runs=4)
    elif task == "dejpeg":
        wide = replace(SkipConfig(), upsample="nearest")
        quick = _of(_BRISK, eighth, network=narrow, iterations=500)
        balanced = _of(_BRISK, quarter, network=medium, iterations=900)
        best = _of(_BRISK, "the paper's width", network=wide, iterations=2000)
    elif task == "superres":
        early = replace(slim, scale="uniform")
        quick = _of(_CLEAN_BRISK, eighth, network=early, iterations=600, perturbation=0.03)
        balanced = _of(quick.config, f"{eighth}, {mean(3)}", runs=3)
        best = _of(quick.config, f"{eighth}, {mean(8)}", iterations=1200, runs=8)
    else:
        quick = _of(_CLEAN_BRISK, eighth, network=slim, iterations=800)
        balanced = _of(_CLEAN_LONG, quarter, network=medium, iterations=2000)
        best = _of(balanced.config, f"{quarter}, {mean(4)}", runs=4)
    found = {(task, "quick"): quick, (task, "balanced"): balanced, (task, "best"): best}
    return {key: replace(of, measured=_MEASURED.get(key)) for key, of in found.items()}


_MEASURED = {
    (task, name): Measured(picture, before, after, seconds, cpu)
    for tasks, picture, before, seen in (
        (
            ("denoise",),
            "house, sigma 25",
            20.30,
            {
                "quick": (31.86, 97.0, "Skylake"),
                "balanced": (32.21, 74.0, "Zen 5"),  # this and the next before `add_back`
                "best": (32.67, 258.0, "Zen 5"),
            },
        ),
        (
            ("superres",),
            "butterfly, x4",
            22.13,
            {
                "quick": (26.11, 26.0, "Zen 5"),
                "balanced": (26.57, 73.0, "Zen 5"),
                "best": (27.05, 419.0, "Zen 5"),
            },
        ),
        (
            ("inpaint", "restore"),
            "house, half of the pixels missing",
            7.91,
            {
                "quick": (37.70, 32.0, "Zen 5"),
                "balanced": (38.41, 116.0, "Zen 5"),
                "best": (39.55, 463.0, "Zen 5"),
            },
        ),
    )
    for task in tasks
    for name, (after, seconds, cpu) in seen.items()
}

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


def preset(task: str, name: str = "default", sigma: float | None = None) -> FitConfig:
    """Return the config of a preset; "default" is "balanced".

    Those for denoising that are not the paper's adapt to the noise, in three classes, so that
    pictures of like noise can be fitted side by side. Noise below 17.5 of 255: what is left in the
    picture to fit is finer, and the best image comes later, so that a fit may take 1.6 times the
    iterations, and "discrepancy" waits for 0.98 of the noise. Noise above 30: the perturbation is
    1.5 times as strong, as in the paper, so that the image is lost more slowly, nothing of the
    residual is added back, and the rule "discrepancy" is left out, which would end the fit too
    early; "es-wmv" looks at 150 outputs where it is left alone, and at 200 where it always was.
    Between them, and where the noise is not known, they are as `PRESETS` has them.

    Args:
        task: One of `TASKS`.
        name: One of `names`, or "default".
        sigma: Standard deviation of the noise in [0, 1]; None: not known.

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
    config = PRESETS[key].config
    if task != "denoise" or name.startswith("published") or sigma is None:
        return config
    by_residual = "discrepancy" in config.stop
    if sigma < _LITTLE:
        share = 0.98 if by_residual else config.discrepancy
        return replace(config, iterations=round(1.6 * config.iterations), discrepancy=share)
    if sigma > _MUCH:
        return replace(
            config,
            perturbation=1.5 * config.perturbation,
            add_back=0.0,
            stop=tuple(rule for rule in config.stop if rule != "discrepancy"),
            window=_SHORT if by_residual else _LONG,
        )
    return config
