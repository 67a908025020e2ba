"""Tiles that were measured on the GPU at hand, kept in the user's cache.

They hold for a GPU, its driver, a version of Triton and the code of the kernels; under any other,
there are none.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flashdip.engine.errors import OutputError
from flashdip.engine.files import atomic, user_cache

if TYPE_CHECKING:
    from flashdip.kernels.fused.launch import Tile


def identity(device: torch.device) -> dict[str, str]:
    """Return what tiles measured on a GPU hold for."""
    from flashdip.kernels import fused

    folder = Path(str(fused.__file__)).parent
    source = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        source.update(path.read_bytes())
    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "triton": metadata.version("triton"),
        "kernels": source.hexdigest()[:16],
    }


def load(of: Mapping[str, str]) -> "dict[str, Tile]":
    """Return the tiles that hold for `identity`, by `Tiles.key`; none if nothing was kept."""
    from flashdip.kernels.fused.launch import Tile

    try:
        kept = json.loads(path(of).read_text())
        return {
            str(key): Tile._make(None if field is None else int(field) for field in tile)
            for key, tile in kept["tiles"].items()
        }
    except (OutputError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # not there, or not whole


def save(of: Mapping[str, str], tiles: "Mapping[str, Tile]") -> Path:
    """Keep tiles for `identity`; return the file.

    Raises:
        OutputError: It cannot be written.
    """
    kept = path(of)
    with atomic(kept, force=True) as file:
        file.write_text(json.dumps({"of": dict(of), "tiles": dict(tiles)}, indent=1))
    return kept


def path(of: Mapping[str, str]) -> Path:
    """Return the file in which tiles for `identity` are kept.

    Raises:
        OutputError: The user's cache cannot be used.
    """
    name = hashlib.sha256(json.dumps(dict(of), sort_keys=True).encode()).hexdigest()[:16]
    folder = user_cache() / "tiles"
    folder.mkdir(exist_ok=True)
    return folder / f"{name}.json"


def _driver() -> str:
    with contextlib.suppress(Exception):  # without NVML it is unknown, and the tiles hold for that
        import pynvml

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    return "unknown"
