"""Warm starts: a fit that begins with the weights of an earlier one instead of random ones.

What is like the earlier picture (the next frame, the tile beside it) needs fewer iterations then.
The moments of Adam and the step counter begin anew.
"""

import hashlib
import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, InputError, ShapeError
from flashdip.engine.files import one_line
from flashdip.engine.networks.skip import Skip
from flashdip.engine.result import Result

Init: TypeAlias = str | PathLike[str] | Result


@dataclass(frozen=True, eq=False)
class Warm:
    """Where a fit begins.

    Attributes:
        source: The folder, or "a result".
        weights: Parameters by name in their published shapes, and the network's input "z",
            [C, H, W], unless that is the seed's own; all float32 on the CPU.
    """

    source: str
    weights: dict[str, Tensor]

    @property
    def digest(self) -> str:
        """A hash of all the weights and z."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            digest.update(name.encode())
            digest.update(self.weights[name].numpy().tobytes())
        return digest.hexdigest()

    def record(self) -> dict[str, str]:
        """Return what `result.json` tells of it."""
        return {"source": self.source, "sha256": self.digest}


def warm(init: Init, config: FitConfig, size: tuple[int, int]) -> Warm:
    """Read the weights of an earlier fit for one with this config and image size.

    Args:
        init: The earlier fit's result, or the folder that `Result.save` wrote.
        config: Of the fit to come; its network's outputs are the image's channels.
        size: Height and width of the image to come.

    Raises:
        InputError: It is no such folder, or the earlier fit had another network or input size.
    """
    if isinstance(init, Result):
        source, tensors, network = "a result", init.weights, init.record["config"]["network"]
    else:
        source = one_line(init)
        tensors, network = _read(Path(init), source)
    _same_network(source, network, config.record()["network"])
    shapes = {p.name: p.shape for p in Skip(config.network).parameters}
    shapes["z"] = (config.network.inputs, *config.network.network_size(*size))
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None and name == "z":
            continue
        if tensor is None or not torch.isfinite(tensor).all():
            found = "none" if tensor is None else "NaN or infinity"
            raise InputError(
                f"init: expected the finite weights {name} in {source}, got {found}: give the "
                "folder of another fit"
            )
        if tuple(tensor.shape) != shape:
            raise ShapeError(
                f"init: expected {name} of shape {shape} for a picture of {size[1]}x{size[0]}, got "
                f"{tuple(tensor.shape)} from {source}: give a fit of a picture as large as this one"
            )
        weights[name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    return Warm(source, weights)


def _read(folder: Path, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and the network's config out of a folder, or out of the file in it."""
    from safetensors import SafetensorError, safe_open

    path = folder / "fit.safetensors" if folder.is_dir() else folder
    try:
        with safe_open(path, framework="pt") as file:
            network = json.loads((file.metadata() or {})["flashdip"])["network"]
            return {name: file.get_tensor(name) for name in file.keys()}, dict(network)  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"init: expected a folder with the fit.safetensors of an earlier fit (--save-dir), got "
            f"{source}: {one_line(getattr(error, 'strerror', None) or error)}"
        ) from None


def _same_network(source: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    matters = wanted.keys() - {"scale"}  # which says how weights begin that are replaced here
    other = [name for name in wanted if name in matters and found.get(name) != wanted[name]]
    if other:
        differences = ", ".join(
            f"network.{name}={_plain(wanted[name])}, got {_plain(found.get(name))}"
            for name in other
        )
        raise ConfigError(
            f"init: expected the network of this fit, {differences} from {source}: choose the "
            "preset and settings of that fit, or another fit"
        )


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
