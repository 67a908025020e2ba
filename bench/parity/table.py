"""What came of a run: the table, as JSON and Markdown, and a contact sheet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.box import MARKDOWN, SIMPLE
from rich.console import Console
from rich.table import Table

from flashdip.bench.parity.run import Outcome
from flashdip.bench.parity.suites import METHODS, SUITES, Pixels, in_8_bits
from flashdip.engine.demo import side_by_side

NAMES = {
    "deep_prior": "paper",
    "bm3d": "BM3D",
    "nlm": "NLM",
    "papyan": "Papyan",
    "tv_prior": "TV prior",
    "tv": "TV",
    "bicubic": "bicubic",
}
LEGEND = (
    "dB as each suite is judged: sr4 on luma without the border, the others on all channels. "
    "quoted: the image that the paper's authors published, judged by us; run: computed here, "
    "without the truth. Seconds and it/s are ours, on this machine."
)
_THUMBNAIL = 192  # widest picture of the contact sheet, in pixels


class Column(NamedTuple):
    """A method: what it is called, and whether its image was published or made here."""

    method: str
    quoted: bool

    def title(self, between: str = " ") -> str:
        """Return what tables call it."""
        name = NAMES.get(self.method, self.method)
        return f"{name}{between}{'quoted' if self.quoted else 'run'}"


def rows(outcomes: Sequence[Outcome], preset: str) -> list[dict[str, Any]]:
    """Return a row for each case as plain values, for JSON."""
    return [
        {
            "suite": outcome.case.suite.name,
            "image": outcome.case.name,
            "size": list(outcome.case.truth.shape),
            "preset": preset,
            "decibels": outcome.record["decibels"],
            "quoted": {
                method: outcome.case.decibels(image)
                for method, image in outcome.case.published.items()
            },
            "run": outcome.rivals,
            "seconds": outcome.record["seconds"],
            "iterations": outcome.record["iterations"],
            "iterations_per_second": outcome.record["iterations_per_second"],
            "best_iteration": outcome.record["best_iteration"],
            "stop_reason": outcome.record["stop_reason"],
            "backend": outcome.record["backend"],
            "device": outcome.record["device"],
            "precision": outcome.record["precision"],
            "versions": outcome.record["versions"],
            "config": outcome.record["config"],
        }
        for outcome in outcomes
    ]


def columns(of: Sequence[dict[str, Any]]) -> list[Column]:
    """Return the methods of some rows: published ones in their usual order, then ours."""
    quoted = {method for row in of for method in row["quoted"]}
    made = {method for row in of for method in row["run"]}
    order = [*METHODS, *sorted(quoted - set(METHODS))]
    found = [Column(method, True) for method in order if method in quoted]
    return found + [Column(method, False) for method in NAMES if method in made]


def show(of: Sequence[dict[str, Any]], console: Console, *, markdown: bool = False) -> None:
    """Print a table for each suite, with the means over its pictures."""
    for suite in SUITES:
        mine = [row for row in of if row["suite"] == suite]
        if not mine:
            continue
        own = columns(mine)
        table = Table(box=MARKDOWN if markdown else SIMPLE, pad_edge=markdown)
        table.add_column(suite, no_wrap=True)
        titles = [column.title(" " if markdown else "\n") for column in own]
        for title in ("ours", *titles, "s", "it/s"):
            table.add_column(title, justify="right", no_wrap=True)
        for row in mine:
            cells = [row["decibels"], *(_value(row, column) for column in own)]
            table.add_row(
                row["image"],
                *map(_decibels, cells),
                f"{row['seconds']:.1f}",
                f"{row['iterations_per_second']:.2f}",
            )
        if len(mine) > 1:
            ours = [row["decibels"] for row in mine]
            means = [_mean(ours), *(_mean([_value(row, column) for row in mine]) for column in own)]
            seconds = [row["seconds"] for row in mine]
            table.add_row("mean", *map(_decibels, means), f"{np.mean(seconds):.1f}", "")
        console.print(table)


def markdown(of: Sequence[dict[str, Any]]) -> str:
    """Return the tables as Markdown, with what they mean."""
    from io import StringIO

    text = StringIO()
    show(of, Console(file=text, width=240, color_system=None), markdown=True)
    first = of[0]
    machine = f"{first['backend']} on {first['device']}, {first['precision']}"
    return f"Preset {first['preset']}; {machine}. {LEGEND}\n{text.getvalue()}"


def contact_sheet(outcomes: Sequence[Outcome]) -> NDArray[np.uint8]:
    """Lay out a row of pictures for each case: truth, input, ours, published ones, rivals."""
    strips = []
    for outcome in outcomes:
        case = outcome.case
        pictures: list[tuple[str, Pixels]] = [("truth", case.truth)]
        pictures.append((case.suite.given, case.observed))
        ours = outcome.record["decibels"]
        pictures.append((f"ours {ours:.2f}", outcome.image))
        for method, image in case.published.items():
            title = Column(method, True).title()
            pictures.append((f"{title} {case.decibels(image):.2f}", image))
        for method, image in outcome.images.items():
            title = Column(method, False).title()
            pictures.append((f"{title} {outcome.rivals[method]['decibels']:.2f}", image))
        height, width = case.truth.shape[:2]
        scale = min(1.0, _THUMBNAIL / max(height, width))
        size = max(1, round(width * scale)), max(1, round(height * scale))
        shown = [_thumbnail(image, size) for _, image in pictures]
        strips.append(side_by_side(shown, [title for title, _ in pictures]))
    widest = max(strip.shape[1] for strip in strips)
    padded = [
        np.pad(strip, ((0, 0), (0, widest - strip.shape[1]), (0, 0)), constant_values=255)
        for strip in strips
    ]
    return np.concatenate(padded)


def _thumbnail(image: Pixels, size: tuple[int, int]) -> NDArray[np.uint8]:
    from PIL import Image

    bits = in_8_bits(image)
    colour = Image.fromarray(bits if bits.shape[2] == 3 else bits[:, :, 0]).convert("RGB")
    enlarged = size[0] > image.shape[1]
    how = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    return np.asarray(colour.resize(size, how))


def _value(row: dict[str, Any], column: Column) -> float | None:
    if column.quoted:
        return row["quoted"].get(column.method)  # type: ignore[no-any-return]
    found = row["run"].get(column.method)
    return None if found is None else found["decibels"]


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, unless one is missing: means over other pictures do not compare."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def write(outcomes: Sequence[Outcome], preset: str, folder: Path) -> list[dict[str, Any]]:
    """Write `parity.json`, `parity.md` and `contact.png`, over those of an earlier run.

    Returns:
        The rows.
    """
    import json

    from flashdip.engine.files import atomic
    from flashdip.engine.images import as_picture, save

    found = rows(outcomes, preset)
    for name, text in (
        ("parity.json", json.dumps(found, indent=1, allow_nan=False) + "\n"),
        ("parity.md", markdown(found)),
    ):
        with atomic(folder / name, force=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
    save(folder / "contact.png", as_picture(contact_sheet(outcomes)), force=True)
    return found
