"""The commands of `flashdip explore`: each prints numbers, and writes them and a figure."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from flashdip.engine.events import Callback, Event

app = typer.Typer(
    no_args_is_help=True,
    help="Repeat the paper's own experiments, with figures and numbers.\n\n"
    "Example: flashdip explore impedance --size 64 --iterations 500",
)
# Read by whoever lists the commands.
app.__doc__ = "Repeat the paper's own experiments."

Picture = Annotated[
    Path | None,
    typer.Option(
        "--image", metavar="FILE", help="Picture; a photograph that comes along if not given."
    ),
]
Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for figure and numbers.")
]
Size = Annotated[
    int, typer.Option(min=32, max=2048, help="Longer side that the picture is shrunk to.")
]
Seed = Annotated[int, typer.Option(help="Of noise, masks and fits.")]
Preset = Annotated[str, typer.Option(help="See 'flashdip presets'.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, ... or auto.")]
Force = Annotated[bool, typer.Option("--force", help="Overwrite an earlier figure and numbers.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the table.")]
_HERE = Path("explore")


@app.command()
def impedance(
    image: Picture = None,
    output: Output = _HERE,
    size: Size = 128,
    iterations: Annotated[int, typer.Option(min=10, help="Of each of the four fits.")] = 1000,
    preset: Annotated[str, typer.Option(help="Whose network is fitted; for denoise.")] = "quick",
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Fit a picture, noise added, its pixels shuffled, and noise: the network resists noise."""
    _ready(output, "impedance", force)
    from flashdip.bench.explore import figures, subject
    from flashdip.bench.explore.impedance import SHARE, impedance
    from flashdip.engine.presets import preset as config

    picture = subject.tensor(subject.subject(image, size))
    network = config("denoise", preset).network
    with _shown(quiet) as tell:
        found = impedance(
            picture, network, iterations=iterations, seed=seed, device=device, callback=tell
        )
    _table(
        ("fitted", "last error", "of the variance", f"iterations to {SHARE:.0%} of it"),
        {
            name: (f"{one['losses'][-1]:.5f}", f"{one['share']:.1%}", _whole(one["fitted"]))
            for name, one in found.items()
        },
    )
    _write(output, "impedance", found, figures.impedance(found), force)


@app.command()
def priors(
    image: Picture = None,
    output: Output = _HERE,
    size: Size = 128,
    draws: Annotated[int, typer.Option(min=1, help="Images that each number is over.")] = 8,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Draw with random weights: depths, skips, upsampling, U-Net, ResNet, deep decoder."""
    _ready(output, "priors", force)
    import numpy as np

    from flashdip.bench.explore import figures, subject
    from flashdip.bench.explore.priors import priors, spectrum

    found = priors(size // subject.STEP * subject.STEP, draws=draws, seed=seed)
    pictures = {"a photograph": np.moveaxis(subject.subject(image, size) / 255, 2, 0)}
    noise = np.random.default_rng(seed).random(pictures["a photograph"].shape)
    known = {name: spectrum(each) for name, each in (pictures | {"white noise": noise}).items()}
    numbers = {name: (one["slope"], one["wavelength"]) for name, one in found.items()}
    numbers |= {name: (one.slope, one.wavelength) for name, one in known.items()}
    _table(
        ("drawn by", "slope of the spectrum", "wavelength, pixels"),
        {name: (f"{slope:.2f}", f"{length:.1f}") for name, (slope, length) in numbers.items()},
    )
    record = {
        name: {"slope": slope, "wavelength": length} for name, (slope, length) in numbers.items()
    }
    _write(output, "priors", record, figures.priors(found), force)


@app.command()
def overfit(
    image: Picture = None,
    output: Output = _HERE,
    size: Size = 128,
    sigma: Annotated[float, typer.Option(min=1, max=255, help="Noise, in 1/255.")] = 25.0,
    iterations: Annotated[int, typer.Option(min=10, help="Of the fit.")] = 2000,
    preset: Preset = "quick",
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Fit a noisy picture too long, and see where each stopping rule would stop."""
    _ready(output, "overfit", force)
    from dataclasses import replace
    from functools import partial

    from flashdip.bench.explore import figures, subject
    from flashdip.bench.explore.overfit import overfit
    from flashdip.engine.demo import add_noise
    from flashdip.engine.presets import preset as config
    from flashdip.engine.problems import Problem

    clean = subject.subject(image, size)
    noisy = add_noise(clean, sigma, seed)
    chosen = replace(config("denoise", preset), iterations=iterations, seed=seed)
    with _shown(quiet) as tell:
        observed = subject.tensor(noisy)
        found = overfit(
            Problem(observed, (3, *clean.shape[:2]), sigma=sigma / 255),
            subject.tensor(clean),
            chosen,
            device=device,
            callback=partial(tell, "overfit"),
        )
    rows = {name: (rule, rule["stopped"]) for name, rule in found["rules"].items()}
    rows = {"best (needs the truth)": (found["best"], None)} | rows | {"end": (found["end"], None)}
    _table(
        ("rule", "PSNR, dB", "image of iteration", "stopped at"),
        {
            name: (
                "" if one["decibels"] is None else f"{one['decibels']:.2f}",
                _whole(one["iteration"]),
                _whole(stopped),
            )
            for name, (one, stopped) in rows.items()
        },
    )
    _write(output, "overfit", found, figures.overfit(found), force)


@app.command()
def tv(
    image: Picture = None,
    output: Output = _HERE,
    size: Size = 128,
    preset: Preset = "balanced",
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Set total variation on pixels, NLM and bicubic against the network, at each task."""
    _ready(output, "tv", force)
    from flashdip.bench.explore import figures, subject
    from flashdip.bench.explore.tv import tv
    from flashdip.bench.parity.table import NAMES
    from flashdip.engine.task_options import FitOptions

    options = FitOptions(preset=preset, seed=seed, device=device)
    with _shown(quiet) as tell:
        found = tv(subject.subject(image, size), options, seed=seed, callback=tell)
    methods = list(dict.fromkeys(method for one in found.values() for method in one["decibels"]))
    _table(
        ("PSNR, dB", *(NAMES.get(method, method) for method in methods)),
        {
            name: tuple(
                f"{one['decibels'][method]:.2f}" if method in one["decibels"] else ""
                for method in methods
            )
            for name, one in found.items()
        },
    )
    record = {name: one["decibels"] for name, one in found.items()}
    _write(output, "tv", record, figures.tv(found), force)


def _ready(output: Path, name: str, force: bool) -> None:
    """See that everything can be written and drawn, before the fits; make the folder.

    Raises:
        OutputError, UnavailableError: It is not so.
    """
    from flashdip.bench.explore.figures import require
    from flashdip.engine.files import check_writable

    require()
    if not output.exists():
        check_writable(output, force=False)
        output.mkdir()
    for suffix in ("json", "png"):
        check_writable(output / f"{name}.{suffix}", force=force)


@contextmanager
def _shown(quiet: bool) -> Iterator[Callable[[str, "Event"], None]]:
    """Yield a callback that shows the fits of several things, one after another."""
    from contextlib import ExitStack

    from flashdip.engine.progress import show_progress

    with ExitStack() as stack:
        current: dict[str, Callback] = {}

        def tell(name: str, event: "Event") -> None:
            if name not in current:
                current.clear()
                stack.pop_all().close()
                current[name] = stack.enter_context(show_progress(name, quiet=quiet))
            current[name](event)

        yield tell


def _table(head: tuple[str, ...], rows: Mapping[str, tuple[str, ...]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE)
    for index, title in enumerate(head):
        table.add_column(title, justify="right" if index else "left")
    for name, cells in rows.items():
        table.add_row(name, *cells)
    Console(highlight=False).print(table)


def _write(output: Path, name: str, record: Mapping[str, Any], figure: Any, force: bool) -> None:
    from flashdip.bench.explore import figures
    from flashdip.engine.files import atomic

    with atomic(output / f"{name}.json", force=force) as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    figures.write(figure, output / f"{name}.png", force=force)
    typer.echo(f"Look at {output / f'{name}.png'}; the numbers are in {name}.json beside it.")


def _whole(value: int | None) -> str:
    return "never" if value is None else str(value)
