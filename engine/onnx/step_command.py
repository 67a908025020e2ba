"""The command `export-step`."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from flashdip.engine.command_options import setting
from flashdip.engine.errors import ConfigError

_SIZE = re.compile(r"(\d+)x(\d+)(?:x(\d+))?")


def export_step(
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE|WIDTHxHEIGHT[xCHANNELS]",
            help="The picture to fit, or the size of pictures that are to come, such as 256x256.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE.onnx", help="Graph to write.")
    ],
    task: Annotated[str, typer.Option(help="Whose presets: see 'flashdip presets'.")] = "denoise",
    preset: Annotated[str, typer.Option(help="See 'flashdip presets'.")] = "default",
    mask: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="White = known, black = missing; of the picture's size."),
    ] = None,
    factor: Annotated[
        int, typer.Option(min=1, help="Enlarge by so much; IMAGE is the small picture.")
    ] = 1,
    kernel: Annotated[
        str, typer.Option(help="How it was made small: lanczos2, lanczos3, gauss12, ... or box.")
    ] = "lanczos2",
    seed: Annotated[int | None, typer.Option(help="Of weights, input and perturbation.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any field of the preset."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what exists.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
) -> None:
    """Write one iteration of a fit as an ONNX graph, for programs without PyTorch.

    The state that the first iteration takes goes beside it, into FILE.safetensors; with a size in
    place of a picture it has no "observation". docs/step.md tells how to run both.

    Example: flashdip export-step noisy.png -o step.onnx --preset quick
    """
    from flashdip.engine.files import check_writable

    state = output.with_suffix(".safetensors")
    if output == state:
        raise ConfigError(f"{output}: expected another suffix than that of the state beside it")
    for path in (output, state):
        check_writable(path, force=force)
    # From here on torch is needed, which takes a second or two to import.
    from flashdip.engine.onnx.step_file import write
    from flashdip.engine.task_options import config_of

    config = config_of(
        task, {"preset": preset, "seed": seed, "settings": dict(map(setting, settings or []))}
    )
    problem, given = _problem(image, mask, factor, kernel)
    network = dataclasses.replace(config.network, outputs=problem.shape[0])
    config = dataclasses.replace(config, network=network)
    model = write(problem, config, output, force=force, observed=given)
    if not quiet:
        inner = "x".join(map(str, reversed(network.network_size(*problem.shape[1:]))))
        typer.echo(
            f"{output} written, {len(model.graph.node)} nodes for a network of {inner} pixels; its "
            f"state in {state}: run it up to {config.iterations} times (docs/step.md)",
            err=True,
        )


def _problem(image: str, mask: Path | None, factor: int, kernel: Any) -> tuple[Any, bool]:
    """Return the problem, and whether there is an observation.

    Raises:
        InputError: Picture, mask and factor do not go together.
    """
    import torch

    from flashdip.engine import masks
    from flashdip.engine.operators import Downsample, Identity, Mask
    from flashdip.engine.problems import Problem
    from flashdip.engine.task_options import picture_of

    size = _SIZE.fullmatch(image)
    if size is None:
        picture = picture_of(image, "image", {})
        masks.require_finite(picture)
        observation = picture.tensor()
    else:
        width, height, channels = (int(part or 3) for part in size.groups())
        observation = torch.zeros(1, channels, height, width)
    _, channels, height, width = observation.shape
    shape = (channels, height * factor, width * factor)
    operator: Identity | Mask | Downsample = Identity()
    if mask is not None and (factor > 1 or size is not None):
        raise ConfigError("mask: expected a picture of its own size and no factor beside it")
    if mask is not None:
        known = masks.from_mask(picture_of(mask, "mask", {}), picture)
        operator = Mask(torch.from_numpy(known).float()[None, None])
        observation = operator(observation)
    elif factor > 1:
        operator = Downsample(factor, kernel=kernel)
    return Problem(observation, shape, operator), size is None
