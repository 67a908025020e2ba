"""A fit on disk: everything that an interrupted fit needs to end as if it had never stopped."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashdip.engine.config import FitConfig
from flashdip.engine.errors import InputError
from flashdip.engine.files import atomic
from flashdip.engine.problems import Problem

Saved = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]  # groups of tensors, plain values


@dataclass
class Checkpoint:
    """Where a fit is saved, and which fit may go on from it.

    Args:
        path: The file.
        fingerprint: Of the problem and the config; another fit's file is refused.
    """

    path: Path
    fingerprint: str

    def write(self, tensors: dict[str, dict[str, Tensor]], notes: dict[str, Any]) -> None:
        """Replace the file: groups of tensors, and plain values.

        Raises:
            OutputError: The file cannot be written.
        """
        from safetensors.torch import save

        flat = {
            f"{group}/{name}": tensor.detach().cpu().contiguous()
            for group, members in tensors.items()
            for name, tensor in members.items()
        }
        text = json.dumps({"fingerprint": self.fingerprint, "notes": notes})
        with atomic(self.path, force=True) as temporary:
            # Not safetensors' own writer, which hides why a write failed.
            temporary.write_bytes(save(flat, {"flashdip": text}))

    def read(self) -> Saved | None:
        """Return what was written last; None if there is no file yet.

        Raises:
            InputError: The file is no checkpoint, or another fit's.
        """
        from safetensors import SafetensorError, safe_open

        if not self.path.exists():
            return None
        tensors: dict[str, dict[str, Tensor]] = {}
        try:
            with safe_open(self.path, framework="pt") as file:
                saved = json.loads((file.metadata() or {})["flashdip"])
                for key in file.keys():  # noqa: SIM118 - it is no dictionary
                    group, name = key.split("/")
                    tensors.setdefault(group, {})[name] = file.get_tensor(key)
            notes, fingerprint = saved["notes"], saved["fingerprint"]
        except (SafetensorError, OSError, KeyError, ValueError):
            raise InputError(
                f"checkpoint: {self.path} is not a checkpoint; give another path or delete it"
            ) from None
        if fingerprint != self.fingerprint:
            raise InputError(
                f"checkpoint: {self.path} belongs to another picture, other settings or another "
                "backend; give another path or delete it"
            )
        return tensors, notes


def fingerprint(
    problem: Problem,
    config: FitConfig,
    backend: str,
    device: str,
    precision: str,
    start: str | None,
) -> str:
    """Return a hash of what decides a fit's result, the machine and the versions apart.

    Args:
        problem: What is fitted.
        config: How.
        backend: Its name.
        device: Its name.
        precision: Of the activations.
        start: A hash of the weights that the fit begins with; None: random ones.
    """
    plain = [config.record(), list(problem.shape), problem.sigma, backend, device, precision]
    plain.append(start)
    digest = hashlib.sha256(json.dumps(plain).encode())
    # The operator is code; its effect on a fixed image stands for it.
    grid = torch.linspace(0.1, 1, torch.Size(problem.shape).numel()).view(1, *problem.shape)
    with torch.no_grad():
        effect = problem.operator(grid.to(problem.observation).expand(problem.fits, -1, -1, -1))
    for tensor in (problem.observation, effect, problem.measured, problem.known, problem.pasted):
        if tensor is not None:
            digest.update(str(tuple(tensor.shape)).encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
