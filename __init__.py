"""FlashDIP: restore damaged images with a Deep Image Prior, at the speed of the hardware."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashdip.engine.config import FitConfig
    from flashdip.engine.errors import (
        ConfigError,
        DivergedError,
        FlashDIPError,
        ImageError,
        InputError,
        OutputError,
        ShapeError,
        StoppedError,
        UnavailableError,
    )
    from flashdip.engine.fit import fit
    from flashdip.engine.fit_many import fit_many, fits_in_memory
    from flashdip.engine.images import Picture, load, save
    from flashdip.engine.metrics import psnr
    from flashdip.engine.operators import (
        Compose,
        Downsample,
        Identity,
        Linear,
        Mask,
        Operator,
    )
    from flashdip.engine.planning import Plan, plan
    from flashdip.engine.presets import preset
    from flashdip.engine.problems import Problem
    from flashdip.engine.result import Result
    from flashdip.engine.sequence import sequence
    from flashdip.engine.tasks import dejpeg, denoise, inpaint, restore, superres

_HOME = {
    "Compose": "operators",
    "ConfigError": "errors",
    "DivergedError": "errors",
    "Downsample": "operators",
    "FitConfig": "config",
    "FlashDIPError": "errors",
    "Identity": "operators",
    "ImageError": "errors",
    "InputError": "errors",
    "Linear": "operators",
    "Mask": "operators",
    "Operator": "operators",
    "OutputError": "errors",
    "Picture": "images",
    "Plan": "planning",
    "Problem": "problems",
    "Result": "result",
    "ShapeError": "errors",
    "StoppedError": "errors",
    "UnavailableError": "errors",
    "dejpeg": "tasks",
    "denoise": "tasks",
    "fit": "fit",
    "fit_many": "fit_many",
    "fits_in_memory": "fit_many",
    "inpaint": "tasks",
    "load": "images",
    "plan": "planning",
    "preset": "presets",
    "psnr": "metrics",
    "restore": "tasks",
    "save": "images",
    "sequence": "sequence",
    "superres": "tasks",
}

__all__ = [
    "Compose",
    "ConfigError",
    "DivergedError",
    "Downsample",
    "FitConfig",
    "FlashDIPError",
    "Identity",
    "ImageError",
    "InputError",
    "Linear",
    "Mask",
    "Operator",
    "OutputError",
    "Picture",
    "Plan",
    "Problem",
    "Result",
    "ShapeError",
    "StoppedError",
    "UnavailableError",
    "dejpeg",
    "denoise",
    "fit",
    "fit_many",
    "fits_in_memory",
    "inpaint",
    "load",
    "plan",
    "preset",
    "psnr",
    "restore",
    "save",
    "sequence",
    "superres",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `flashdip --help` does not load torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'flashdip' has no attribute {name!r}")
    return getattr(importlib.import_module(f"flashdip.engine.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
