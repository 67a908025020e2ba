"""The options that restoring commands share, declared once and handed over as one value."""

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
class SharedOptions:
    """What the command line says about fits and the machine, be it for one picture or many."""

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
    memory: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=_MACHINE,
            metavar="SIZE",
            help="Memory that may be used, such as 6GB; a picture that needs more is tiled.",
        ),
    ] = None
    tile: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=_MACHINE,
            metavar="PIXELS",
            help="Cut the picture into tiles of this side, whatever the memory.",
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
            *("preset", "sigma", "iterations", "stop", "budget", "seed"),
            *("backend", "device", "provider", "precision", "memory", "tile"),
        )
        options = {name: getattr(self, name) for name in names}
        if self.max_pixels is not None:
            options["max_pixels"] = self.max_pixels
        return options | {"settings": dict(map(setting, self.settings or []))}


@dataclass(frozen=True, kw_only=True)
class RunOptions(SharedOptions):
    """What the command line says about the fit of one picture, the outputs and the machine."""

    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Picture to write: .png, .jpg, .webp or .tif; dressed as the input was.",
        ),
    ]
    truth: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=_FIT,
            metavar="FILE",
            help="Undamaged picture, to report PSNR against; never changes the result.",
        ),
    ] = None
    sequence: Annotated[
        bool,
        typer.Option(
            "--sequence",
            rich_help_panel=_FIT,
            help="INPUT is a folder of frames, a TIFF of several pages or channels, or a video: "
            "each one begins with the weights of the one before.",
        ),
    ] = False
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
            help="Save the state of the fit here, tiles into a folder; continue from it if there.",
        ),
    ] = None
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            rich_help_panel=_MACHINE,
            help="Print the memory, tiles and time it would take, and end.",
        ),
    ] = False
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

    def fit_options(self) -> dict[str, Any]:
        """Return what the functions of `flashdip.engine.tasks` take under the same names."""
        own = ("truth", "init", "checkpoint")
        return super().fit_options() | {name: getattr(self, name) for name in own}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command that takes `options`, a dataclass, as its last argument be parsed by typer.

    Typer reads a command's parameters from its signature; this replaces `options` there by the
    fields of its class, and collects their values again when the command runs.
    """
    parameters = dict(inspect.signature(command).parameters)
    kind = parameters.pop("options").annotation
    shared = inspect.signature(kind).parameters

    @functools.wraps(command)
    def run(**values: Any) -> None:
        options = kind(**{name: values.pop(name) for name in shared})
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
