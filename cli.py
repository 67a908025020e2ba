"""Command line: the names, one line of help each, and the exit codes.

A command lives in the layer that does its work and is imported when it is used; `flashdip --help`
imports none. To add a command or a group of commands, add its line to `COMMANDS`.

Exit codes: 0 done; 1 partly failed; 2 bad input or usage; 130 and 143 stopped by Ctrl-C or SIGTERM.
"""

import sys
from importlib import import_module, metadata
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from flashdip.engine.errors import FlashDIPError
from flashdip.engine.files import one_line

# name: (where its function or typer app is, its section in the help, its line there)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "denoise": ("flashdip.engine.commands:denoise", "Restore", "Remove noise."),
    "superres": ("flashdip.engine.commands:superres", "Restore", "Enlarge by a whole factor."),
    "inpaint": ("flashdip.engine.commands:inpaint", "Restore", "Fill what a mask leaves open."),
    "dejpeg": ("flashdip.engine.commands:dejpeg", "Restore", "Remove compression artefacts."),
    "restore": (
        "flashdip.engine.commands:restore",
        "Restore",
        "Fill missing pixels that the picture itself marks.",
    ),
    "batch": (
        "flashdip.engine.batch.command:batch",
        "Restore many",
        "Restore many pictures; a second run goes on.",
    ),
    "export": (
        "flashdip.engine.onnx.commands:export",
        "Deploy",
        "Write a fitted network as an ONNX model.",
    ),
    "render": (
        "flashdip.engine.onnx.commands:render",
        "Deploy",
        "Draw the picture of an exported model.",
    ),
    "export-step": (
        "flashdip.engine.onnx.step_command:export_step",
        "Deploy",
        "Write one iteration of a fit as an ONNX graph.",
    ),
    "presets": ("flashdip.engine.commands:presets", "Look", "List the presets of each task."),
    "doctor": ("flashdip.engine.doctor:doctor", "Look", "Show what this machine can run, and why."),
    "kernels": (
        "flashdip.engine.kernels_command:kernels",
        "Look",
        "Compile every kernel for GPUs that are not here; model a step.",
    ),
    "tune": (
        "flashdip.bench.tune:tune",
        "Look",
        "Look for the tiles that suit the GPU at hand, and keep them.",
    ),
    "parity": (
        "flashdip.bench.parity.command:parity",
        "Measure",
        "Run the paper's benchmarks on its own inputs.",
    ),
    "explore": (
        "flashdip.bench.explore.commands:app",
        "Measure",
        "Repeat the paper's own experiments.",
    ),
    "bench": (
        "flashdip.bench.commands:app",
        "Measure",
        "Benchmark this machine, and compare results.",
    ),
    "profile": (
        "flashdip.bench.profile_command:profile",
        "Measure",
        "Show where the time of a fit goes.",
    ),
    "demo": ("flashdip.engine.demo:demo", "Look", "Restore a noisy photograph that comes along."),
}

EXAMPLES = """
[bold]Examples[/bold]

  flashdip demo

  flashdip denoise noisy.png -o clean.png --sigma 25

  flashdip superres small.png -o large.png --factor 4

  flashdip inpaint torn.png -o whole.png --mask mask.png

  flashdip restore holes.png -o filled.png --missing zero --preset quick

  flashdip COMMAND --help   shows the options of a command
"""


class _Lazy(TyperCommand):
    """Stand in for a command until it is run or asked for its own help."""

    def __init__(self, name: str, target: str, panel: str, summary: str) -> None:
        super().__init__(name, help=summary, rich_help_panel=panel)
        self._target = target

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Import the command and let it parse its own arguments."""
        module, _, attribute = self._target.partition(":")
        command = getattr(import_module(module), attribute)
        holder = typer.Typer()
        if isinstance(command, typer.Typer):
            holder.add_typer(command, name=self.name)
        else:
            holder.command(self.name)(command)
        loaded = typer.main.get_group(holder).commands[str(self.name)]
        return loaded.make_context(*args, **kwargs)


class _Commands(TyperGroup):
    """The group that holds `COMMANDS`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, (target, panel, summary) in COMMANDS.items():
            self.add_command(_Lazy(name, target, panel, summary))


app = typer.Typer(
    cls=_Commands,
    epilog=EXAMPLES,
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flashdip {metadata.version('flashdip')}")
        raise typer.Exit


@app.callback()
def flashdip(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Restore one damaged image by fitting a network to it: no training data, no weights."""


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        app(prog_name="flashdip")
    except FlashDIPError as error:
        print(f"flashdip: error: {one_line(error, limit=2000)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
