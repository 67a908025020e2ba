"""Results for people: tables in the terminal, as Markdown where they are piped."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from flashdip.bench.compare import Change

WIDTH = 250  # wider than any table: as Markdown, a row has to be one line


def console() -> Console:
    """Return where results are printed: names in them are text, not markup."""
    return Console(width=WIDTH, markup=False, highlight=False)


def show(result: Mapping[str, Any], to: Console) -> None:
    """Print a result: what it was measured on, its rows, what was left out, its score."""
    hardware, software = result["machine"]["hardware"], result["machine"]["software"]
    to.print(
        f"{hardware['device']}, {hardware['cores']} cores, {hardware['system']}; torch "
        f"{software['torch']}, {software['threads']} threads; commit {software['commit']}",
        soft_wrap=True,
    )
    if result["ceilings"] is not None:
        products = (f"{n} {number(v / 1e12, 3)}" for n, v in result["ceilings"]["product"].items())
        to.print(
            f"ceilings, measured: copy {number(result['ceilings']['copy'] / 1e9, 3)} GB/s; matrix "
            f"product {', '.join(products)} TFLOP/s",
            soft_wrap=True,
        )
    for when in ("before", "after"):
        to.print(f"{when}: {state(result['machine'][when])}", soft_wrap=True)
    if result["kind"] == "cpu":
        for title, table in yardstick(result):
            to.print(title, soft_wrap=True)
            to.print(table)
        for line in caveats(result):
            to.print(line, soft_wrap=True)
    elif result["results"]:
        to.print(rows(result))
    for name, reason in result["left_out"].items():
        to.print(f"left out: {name}: {reason}", soft_wrap=True)
    if result["score"] is not None:
        to.print(score(result["score"]), soft_wrap=True)


def state(of: Mapping[str, Any]) -> str:
    """Return what a machine was doing, in one line."""
    units = {"clock_mhz": "MHz", "memory_clock_mhz": "MHz memory", "temperature_c": "C"}
    parts = [] if of["load"] is None else [f"load {of['load']}"]
    parts += [f"{of[name]} {unit}" for name, unit in units.items() if of[name] is not None]
    if of["power_w"] is not None:
        parts.append(f"{of['power_w']:.0f} W")
    if of["throttled"]:
        parts.append(f"held down by {', '.join(of['throttled'])}")
    return ", ".join(parts) or "nothing known"


def rows(result: Mapping[str, Any]) -> Table:
    """Return the rows as a table; columns without an entry are left out."""
    unit, scale = ("s", 1.0) if result["kind"] == "restore" else ("ms", 1e3)
    columns: dict[str, Any] = {
        unit: lambda row: number(scale * row["seconds"]["median"]),
        "p10": lambda row: number(scale * row["seconds"]["p10"]),
        "p90": lambda row: number(scale * row["seconds"]["p90"]),
        "n": lambda row: str(row["seconds"]["n"]),
        "times as fast": lambda row: _maybe(row["ratio"], ".2f"),
        "of the roof": lambda row: _maybe(row["roof_share"], ".1%"),
        "set-up s": lambda row: _maybe(row["setup"], ".1f"),
        "first s": lambda row: _maybe(row["first_step"], ".2f"),
        "peak MiB": lambda row: "" if row["memory"] is None else f"{row['memory'] / 2**20:.0f}",
        "J": lambda row: _maybe(row["joules"], ".3g"),
        "iterations": lambda row: ", ".join(map(str, row["facts"].get("iterations", [])[-4:])),
    }
    table = Table(box=MARKDOWN)
    table.add_column("")
    cells = {title: [cell(row) for row in result["results"]] for title, cell in columns.items()}
    shown = {title: column for title, column in cells.items() if any(column)}
    for title in shown:
        table.add_column(title, justify="right")
    for index, row in enumerate(result["results"]):
        table.add_row(row["name"], *(column[index] for column in shown.values()))
    return table


def yardstick(result: Mapping[str, Any]) -> list[tuple[str, Table]]:
    """Return the tables of `flashdip bench cpu` that have rows, each with a line about it."""
    by_name = {row["name"]: row for row in result["results"]}
    first, second = Table(box=MARKDOWN), Table(box=MARKDOWN)
    first.add_column("network: row", no_wrap=True)
    for title in ("ratio", "to kept", "memory", "it/s", "s", "p10", "p90", "n", "roof", "MiB"):
        first.add_column(title, justify="right")
    second.add_column("picture: row", no_wrap=True)
    for goal in ("target", "peak"):
        for title in (f"ratio to {goal}", "s", "iterations"):
            second.add_column(title, justify="right")
    for title in ("s/it", "target dB", "own peak dB", "at"):
        second.add_column(title, justify="right")
    for name, row in by_name.items():
        group = name.partition(": ")[0]
        base, kept = (by_name.get(f"{group}: published{more}") for more in ("", ", pages kept"))
        if "seconds_to_target" in row["facts"]:
            for cells in _to_quality(row, base):
                second.add_row(*cells)
            continue
        seconds = row["seconds"]
        memory = None if base is None else row["memory"] / base["memory"]
        first.add_row(
            name,
            _maybe(_times(row, base), ".2f"),
            _maybe(_times(row, kept), ".2f"),
            _maybe(memory, ".2f"),
            f"{1 / seconds['median']:.3g}",
            *(f"{seconds[part]:.3g}" for part in ("median", "p10", "p90")),
            str(seconds["n"]),
            _maybe(row["roof_share"], ".0%"),
            f"{row['memory'] / 2**20:.0f}",
        )
    titles = (
        "Iterations a second. ratio: times as fast as the published loop with PyTorch's allocator "
        "as it comes; to kept: with pages kept; memory: peak of the process as a share of the "
        "former's; roof: share of what this machine could do",
        "Seconds to the published network's peak PSNR less a margin (target), and to that peak: "
        "measured seconds an iteration multiplied with recorded iterations. ratio: times as fast "
        "as the published loop",
    )
    tables = zip(titles, (first, second), strict=True)
    return [(title, table) for title, table in tables if table.row_count]


def _times(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> float | None:
    """Return how many times as fast a row is as another of its rounds."""
    if base is None:
        return None
    own, other = (np.array(each["seconds"]["samples"]) for each in (row, base))
    return float(np.median(other / own))


def _to_quality(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> list[tuple[str, ...]]:
    """Return a line for each recorded fit of a row; ratios to the published loop's."""
    facts, faster = row["facts"], _times(row, base)
    loop = {"picture": [], "seed": []} if base is None else base["facts"]
    fits = list(zip(loop["picture"], loop["seed"], strict=True))
    lines: list[tuple[str, ...]] = []
    for index, key in enumerate(zip(facts["picture"], facts["seed"], strict=True)):
        runs, cells = facts["runs"][index], list[str]()
        for goal in ("target", "peak"):
            reached, times = facts[f"iterations_to_{goal}"][index], None
            least = loop[f"iterations_to_{goal}"][fits.index(key)] if key in fits else None
            if faster is not None and least and reached:
                times = faster * least / (runs * reached)
            cells += [
                _maybe(times, ".2f"),
                _maybe(facts[f"seconds_to_{goal}"][index], ".4g"),
                "never" if reached is None else f"{runs} x {reached}" if runs > 1 else str(reached),
            ]
        lines.append(
            (
                f"{key[0]}: {row['name'].partition(': ')[2]}",
                *cells,
                f"{row['seconds']['median']:.4g}",
                f"{facts['target_db'][index]:.2f}",
                f"{facts['peak_db'][index]:.2f}",
                str(facts["peak_at"][index]),
            )
        )
    return lines


def caveats(result: Mapping[str, Any]) -> list[str]:
    """Return what to bear in mind about a result of `flashdip bench cpu`, a line each."""
    lines: dict[str, None] = {}
    for row in result["results"]:
        asked, done = row["parameters"]["rounds"], row["seconds"]["n"]
        if done < asked:
            group = row["name"].partition(": ")[0]
            lines[f"{group}: {done} rounds of {asked}: time ran short, see --seconds"] = None
        precision = row["parameters"]["precision"]
        for recorded in row["facts"].get("recorded_in", ()):
            if recorded != precision:
                lines[
                    f"{row['name']}: timed in {precision}, its iterations were recorded in "
                    f"{recorded}"
                ] = None
    return list(lines)


def score(of: Mapping[str, Any]) -> str:
    """Return the score of the all-in-one benchmark, and what stands behind it."""
    rates = ", ".join(
        f"{number(rate, 3)} at {size}" for size, rate in of["iterations_per_second"].items()
    )
    watts = "watts unknown" if of["watts"] is None else f"{of['watts']:.0f} W"
    steady = of["sustained"]
    return (
        f"score: {number(of['restorations_per_hour'])} restorations an hour, {of['size']}x"
        f"{of['size']}, {of['preset']} ({of['iterations']} iterations), {of['backend']} in "
        f"{of['precision']}, F = {of['fits']}; it/s of one fit: {rates}; {watts}; after "
        f"{steady['seconds']:.0f} s without a pause {steady['kept']:.0%} of the first rate"
    )


def changes(of: Iterable[Change]) -> Table:
    """Return the comparison of two results as a table."""
    table = Table(box=MARKDOWN)
    table.add_column("")
    for title in ("before ms", "after ms", "times as long", "counts from", "measured in"):
        table.add_column(title, justify="right")
    table.add_column("verdict")
    for each in of:
        table.add_row(
            each.name,
            number(1e3 * each.before),
            number(1e3 * each.after),
            f"{each.times:.3f}",
            f"{each.limit:.3f}",
            "its baseline" if each.relative else "seconds",
            each.verdict.upper() if each.verdict == "slower" else each.verdict,
        )
    return table


def number(value: float, digits: int = 4) -> str:
    """Return a number with so many significant digits, never with an exponent."""
    return np.format_float_positional(
        value, precision=digits, unique=False, fractional=False, trim="-"
    )


def _maybe(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
