"""After how many iterations a fit is how good: recorded once, for `flashdip bench cpu`.

    python -m flashdip.bench.quality record --data parity-images --pictures house
    python -m flashdip.bench.quality show

How many iterations a fit needs depends on picture, network and seed, and hardly on the machine; the
seconds of an iteration depend on the machine alone. So the former are kept in quality.json, with
the commit and the config that made them, and the latter are measured and multiplied with them.

Recording takes as long as the fits do: those of the published network, which end `PAST` iterations
after their peak, and all iterations of the presets. Each is written when it is done, and the same
command goes on; a fit whose preset was changed since is made again.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from flashdip.bench.cases import PUBLISHED
from flashdip.bench.curves import (
    BACKEND,
    PAST,
    PHOTOGRAPHS,
    SUITE,
    entry,
    fitted,
    ours,
    peak,
    subject,
)
from flashdip.bench.parity.suites import find
from flashdip.engine.config import FitConfig
from flashdip.engine.errors import ConfigError, FlashDIPError, InputError
from flashdip.engine.files import atomic, check_writable, one_line
from flashdip.engine.presets import names, preset
from flashdip.engine.progress import Interruption, show_progress

FORMAT = "flashdip-quality"
VERSION = 1
FILE = Path(__file__).with_name("quality.json")
SIZE = 256  # pixels a side
MARGIN = 0.2  # dB below the published network's peak
ABOUT = (
    "PSNR in dB, against the truth, of what a fit returns after so many iterations: the averaged "
    "output, with the preset's share of the residual; the noise has a sigma of 25 in 255. "
    f"{PUBLISHED} stands for the published network: it is that preset on the backend {BACKEND} in "
    "float32, never stopped, its norms' scales beginning with ones, which is the mathematics of "
    "bench/published.py."
)


class Reached(NamedTuple):
    """What a fit came to.

    Attributes:
        picture: Its name.
        preset: That was fitted.
        seed: Of the fit.
        runs: Fits that its image is the mean of.
        target_db: The published network's peak on this picture, less `MARGIN`.
        reached_at: Iterations of each run after which the target was first reached; None: never.
        matched_at: The same of the published network's peak itself.
        peak_db: The highest PSNR.
        peak_at: Iterations of each run after which that was.
    """

    picture: str
    preset: str
    seed: int
    runs: int
    target_db: float
    reached_at: int | None
    matched_at: int | None
    peak_db: float
    peak_at: int


def current(fit: Mapping[str, Any]) -> bool:
    """Return whether the preset of a recorded fit is still what it was."""
    name = fit["preset"]
    known = name in names("denoise")
    then = FitConfig().record() | fit["config"]  # a field that came later was at its default
    return known and bool(then == fitted(name, fit["seed"]).record())


def reached(fits: list[dict[str, Any]]) -> list[Reached]:
    """Return what fits came to, those of pictures on which the published network was fitted."""
    peaks = {
        (fit["picture"], fit["seed"]): peak(fit["iterations"], fit["decibels"])[0]
        for fit in fits
        if fit["preset"] == PUBLISHED
    }
    found = []
    for fit in fits:
        key = fit["picture"], fit["seed"]
        if key not in peaks:
            continue
        target = round(peaks[key] - MARGIN, 3)
        points = list(zip(fit["iterations"], fit["decibels"], strict=True))
        first, equal = (
            next((at for at, decibels in points if decibels >= goal), None)
            for goal in (target, peaks[key])
        )
        best = peak(fit["iterations"], fit["decibels"])
        what = fit["picture"], fit["preset"], fit["seed"], fit["runs"]
        found.append(Reached(*what, target, first, equal, *best))
    return found


def read(path: Path) -> dict[str, Any]:
    """Read what was recorded: "size" and "fits".

    Raises:
        InputError: It cannot be read, or is something else.
    """
    name = one_line(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{name}: expected JSON as 'flashdip.bench.quality' writes it") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"{name}: expected the format {FORMAT!r}")
    if found.get("version") != VERSION:
        raise InputError(
            f"{name}: expected version {VERSION}, got {one_line(found.get('version'))}"
        )
    keys = {*Reached._fields[:4], "iterations", "decibels", "config", "commit", "precision"}
    fits = found.get("fits")
    if not isinstance(found.get("size"), int) or not isinstance(fits, list):
        raise InputError(f"{name}: expected a size and a list of fits")
    for fit in fits:
        sound = isinstance(fit, dict) and keys <= fit.keys()
        if not sound or not 0 < len(fit["iterations"]) == len(fit["decibels"]):
            raise InputError(f"{name}: a fit lacks one of {', '.join(sorted(keys))}, or its curve")
    return {"size": found["size"], "fits": fits}


def write(path: Path, size: int, fits: list[dict[str, Any]]) -> None:
    """Write fits, a line each, with what they came to.

    Raises:
        OutputError: The file cannot be written.
    """

    def lines(rows: list[dict[str, Any]]) -> str:
        return "[\n  " + ",\n  ".join(json.dumps(row, allow_nan=False) for row in rows) + "\n ]"

    parts = {
        "format": json.dumps(FORMAT),
        "version": json.dumps(VERSION),
        "about": json.dumps(ABOUT),
        "size": json.dumps(size),
        "margin_db": json.dumps(MARGIN),
        "reached": lines([each._asdict() for each in reached(fits)]),
        "fits": lines(fits),
    }
    text = ",\n".join(f' "{name}": {part}' for name, part in parts.items())
    with atomic(path, force=True) as temporary:
        temporary.write_text(f"{{\n{text}\n}}\n", encoding="utf-8")


app = typer.Typer(
    help="After how many iterations a fit is how good.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
Where = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="What is kept.")]


@app.command()
def record(
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Of pairs, as 'flashdip parity' reads it.")
    ] = None,
    pictures: Annotated[
        str | None,
        typer.Option(metavar="NAME,...", help="All pairs of --data, or some of scikit-image."),
    ] = None,
    presets: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="For denoising; all that are ours.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the fits.")] = 0,
    size: Annotated[int, typer.Option(min=64, help="Pixels a side, a multiple of 32.")] = SIZE,
    past: Annotated[
        int, typer.Option(min=1, help="Iterations past its peak after which a fit ends.")
    ] = PAST,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto.")] = "auto",
    again: Annotated[bool, typer.Option("--again", help="Make fits that are there again.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only the table.")] = False,
    output: Where = FILE,
) -> None:
    """Fit the published network and presets to pictures; keep their curves. A second run goes on.

    Example: python -m flashdip.bench.quality record --data parity-images --pictures house
    """
    if size % 32:
        raise ConfigError(
            f"size: expected a multiple of 32, as the published loop needs it, got {size}"
        )
    wanted = [PUBLISHED, *(presets.split(",") if presets else ours())]
    for name in wanted:
        preset("denoise", name)
    if pictures:
        chosen = pictures.split(",")
    elif data is not None:
        chosen = [case.name for case in find(data, (SUITE,), ())]
    else:
        chosen = list(PHOTOGRAPHS)
    subjects = {name: subject(name, size, data) for name in chosen}
    known: dict[str, Any] = read(output) if output.exists() else {"size": size, "fits": []}
    if known["size"] != size:
        raise ConfigError(
            f"size: expected {known['size']} as in {one_line(output)}, got {size}: give another -o"
        )
    check_writable(output, force=True)
    fits = {(fit["picture"], fit["preset"], fit["seed"]): fit for fit in known["fits"]}
    asked = [(name, each, seed) for name in chosen for each in dict.fromkeys(wanted)]
    missing = [key for key in asked if again or key not in fits or not current(fits[key])]
    with Interruption() as interruption:
        for done, key in enumerate(missing, 1):
            name, each, _ = key
            title = f"{done} of {len(missing)}: {name}, {each}"
            with show_progress(title, quiet=quiet) as tell:
                made = entry(
                    name,
                    *subjects[name],
                    each,
                    seed,
                    device=device,
                    past=past,
                    tell=interruption.watch(tell),
                    interrupted=interruption,
                )
            if interruption():
                left = len(missing) - done + 1
                line = f"quality: stopped; {left} fits are left: the same command goes on"
                typer.echo(line, err=True)
                raise typer.Exit(128 + (interruption.signal or 0))
            fits[key] = made
            write(output, size, list(fits.values()))
    show(output)


@app.command()
def show(output: Where = FILE) -> None:
    """Print what fits came to, and which were made with presets that are others by now."""
    from rich.box import MARKDOWN
    from rich.table import Table

    from flashdip.bench.show import console

    fits = read(output)["fits"]
    table = Table(box=MARKDOWN)
    for title in ("picture", "preset"):
        table.add_column(title)
    for title in ("runs", "target dB", "reached at", "peak matched at", "own peak dB", "at"):
        table.add_column(title, justify="right")
    for each in reached(fits):
        table.add_row(
            each.picture,
            each.preset,
            str(each.runs),
            f"{each.target_db:.2f}",
            *("never" if at is None else str(at) for at in (each.reached_at, each.matched_at)),
            f"{each.peak_db:.2f}",
            str(each.peak_at),
        )
    to = console()
    to.print(table)
    for fit in fits:
        if not current(fit):
            line = f"{fit['picture']}, {fit['preset']}: that preset is another by now: record it"
            to.print(line, soft_wrap=True)


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        app()
    except FlashDIPError as error:
        print(f"quality: error: {one_line(error, limit=2000)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
