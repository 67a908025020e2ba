"""A fit as two files that need no FlashDIP: the step's graph, and the state it begins with.

The state is a safetensors file: the length of a header in 8 bytes, the header in JSON, the numbers.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from flashdip.engine.backends.slots import initial_input
from flashdip.engine.config import FitConfig
from flashdip.engine.files import atomic
from flashdip.engine.networks.skip import Skip
from flashdip.engine.onnx.graph import Array
from flashdip.engine.onnx.step import TRAINED, write_step
from flashdip.engine.operators import Mask
from flashdip.engine.problems import Problem
from flashdip.kernels import noise

if TYPE_CHECKING:
    from onnx import ModelProto


def initial_state(problem: Problem, config: FitConfig) -> dict[str, Array]:
    """Return all that the first iteration takes, by the names of `write_step`.

    Args:
        problem: A single fit.
        config: How it is fitted; the network's outputs are the image's channels.
    """
    network, image = Skip(config.network), torch.zeros(1, *problem.shape)
    parameters = network.initialise(config.seed)
    state = dict.fromkeys(TRAINED, torch.zeros_like(parameters)) | {"parameters": parameters}
    state["z"] = initial_input(config, problem.shape[1:], config.seed)[None]
    state["observation"] = problem.observation
    if isinstance(problem.operator, Mask):
        state["mask"] = problem.operator(image + 1)
    if config.average is not None:
        state["average"] = image
    numbers = {"rate": np.array(config.learning_rate, np.float32), "step": np.array(0)}
    if config.perturbation:
        numbers["key"] = np.array(noise.key(config.seed))
    return {name: tensor.numpy() for name, tensor in state.items()} | numbers


def write(
    problem: Problem, config: FitConfig, path: Path, *, force: bool, observed: bool = True
) -> "ModelProto":
    """Write the step of a fit, and beside it, as .safetensors, the state to begin with.

    Args:
        problem: A single fit.
        config: As for `initial_state`.
        path: Of the graph.
        force: Whether files may be overwritten.
        observed: Whether the state holds the observation; else it is to be handed in.

    Raises:
        UnavailableError: The operator is a user's own.
        OutputError: A file exists and `force` is not set, or cannot be written.
    """
    from safetensors.numpy import save

    model = write_step(config, problem.shape, problem.operator)
    state = initial_state(problem, config)
    if not observed:
        del state["observation"]
    content = save({name: np.asarray(array, order="C") for name, array in state.items()})
    for target, whole in (
        (path.with_suffix(".safetensors"), content),
        (path, model.SerializeToString()),
    ):
        with atomic(target, force=force) as temporary:
            temporary.write_bytes(whole)
    return model
