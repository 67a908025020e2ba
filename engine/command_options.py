"""The options that every restoring command has, declared once and handed over as one value."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from flashdip.engine.errors import ConfigError

_FIT = "Fit"
_OUTPUT = "Output"
_MACHINE = "Machine"

Input = Annotated[Path, typer.Argument(metavar="INPUT", help="PNG, JPEG, WebP or TIFF.")]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line says about the fit, the outputs and the machine."""

    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Picture to write: .png, .jpg, .webp or .tif; dressed as the input was.",
        ),
    ]
    preset: Annotated[str, typer.Option(rich_help_panel=_FIT, help="See 'flashdip presets'.")] = (
        "default"
    )
    sigma: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_FIT,
            help="Noise level in 1/255 of the full range, at any depth; estimated if needed.",
        ),
    ] = None
    iterations: Annotated[
        int | None, typer.Option(rich_help_panel=_FIT, help="The most iterations.")
    ] = None
    stop: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_FIT,
            metavar="RULE,...",
            help="fixed, es-wmv, es-emv, discrepancy, budget: the first that holds ends the fit.",
        ),
    ] = None
    budget: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=_FIT,
            metavar="SECONDS",
            help="Stop after so long (adds budget to --stop).",
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(rich_help_panel=_FIT, help="Same seed, same machine: the same bits."),
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            rich_help_panel=_FIT,
            metavar="FIELD=VALUE",
            help="Any field of the preset, such as average=none; may be repeated.",
        ),
    ] = None
    truth: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_FIT,
            metavar="FILE",
            help="Undamaged picture, to report PSNR against; never changes the result.",
        ),
    ] = None
    init: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_FIT,
            metavar="FIT_DIR",
            help="Begin with the weights of an earlier fit, from its --save-dir.",
        ),
    ] = None
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_FIT,
            metavar="FILE",
            help="Save the state of the fit here; continue from it if it is there.",
        ),
    ] = None
    backend: Annotated[
        str, typer.Option(rich_help_panel=_MACHINE, help="See 'flashdip doctor'.")
    ] = "auto"
    device: Annotated[
        str, typer.Option(rich_help_panel=_MACHINE, help="cpu, cuda, cuda:1, mps, ... or auto.")
    ] = "auto"
    provider: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_MACHINE,
            metavar="NAME,...",
            help="Of ONNX Runtime, with --backend onnx: cpu, cuda, tensorrt, ... in this order.",
        ),
    ] = None
    precision: Annotated[
        str | None, typer.Option(rich_help_panel=_MACHINE, help="bf16, fp32, fp64 or auto.")
    ] = None
    max_pixels: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_MACHINE,
            metavar="COUNT",
            help="Refuse larger pictures before decoding them; 100 million if not given.",
        ),
    ] = None
    save_dir: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_OUTPUT,
            metavar="DIR",
            help="Also write the picture, result.json and the fitted weights here.",
        ),
    ] = None
    report: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_OUTPUT,
            metavar="FILE.html",
            help="Also write a page: before and after, residual, curves, config, times.",
        ),
    ] = None
    force: Annotated[
        bool, typer.Option("--force", rich_help_panel=_OUTPUT, help="Overwrite what exists.")
    ] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", rich_help_panel=_OUTPUT, help="Print only errors.")
    ] = False
    as_json: Annotated[
        bool, typer.Option("--json", rich_help_panel=_OUTPUT, help="Print result.json on stdout.")
    ] = False

    def fit_options(self) -> dict[str, Any]:
        """Return what the functions of `flashdip.engine.tasks` take under the same names.

        Raises:
            ConfigError: A --set is not FIELD=VALUE.
        """
        names = (
            *("preset", "sigma", "iterations", "stop", "budget", "seed", "truth", "init"),
            *("checkpoint", "backend", "device", "provider", "precision"),
        )
        options = {name: getattr(self, name) for name in names}
        if self.max_pixels is not None:
            options["max_pixels"] = self.max_pixels
        return options | {"settings": dict(map(setting, self.settings or []))}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command that takes `options: RunOptions` as its last argument be parsed by typer.

    Typer reads a command's parameters from its signature; this replaces `options` there by the
    fields of `RunOptions`, and collects their values again when the command runs.
    """
    parameters = dict(inspect.signature(command).parameters)
    del parameters["options"]
    shared = inspect.signature(RunOptions).parameters

    @functools.wraps(command)
    def run(**values: Any) -> None:
        options = RunOptions(**{name: values.pop(name) for name in shared})
        command(**values, options=options)

    merged = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in (*parameters.values(), *shared.values())
    ]
    # Typer looks at both, and functools.wraps left the original's in place.
    run.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in merged}
    return run


def setting(text: str) -> tuple[str, str]:
    """Return field and value of what was given to --set.

    Raises:
        ConfigError: It is not FIELD=VALUE.
    """
    name, equals, value = text.partition("=")
    if not (equals and name.strip()):
        raise ConfigError(f"--set: expected FIELD=VALUE such as average=none, got {text!r}")
    return name.strip(), value
