"""Compare results of one machine: what became slower, what faster, and what cannot be told.

The change of a row is that of its ratio to the baseline of its own run, round by round, where both
runs have it: the machine's mood is then taken out. Else it is that of its seconds. Middles are
Hodges and Lehmann's, the median of the means of all pairs: like a median it forgives disturbed
rounds, and it is nearly as steady as a mean. A change counts if it is larger than `LEAST`, about
halfway to the 15 % that must be found, and than `MANY` standard errors, by median absolute
deviations. Where that many errors are more than 15 %, or there are fewer than `FEWEST` samples, it
cannot be told.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashdip.engine.errors import InputError, UnavailableError

LEAST = math.log(1.08)
WANTED = math.log(1.15)
MANY = 3.0
FEWEST = 5  # samples; the spread of fewer is a guess
EFFICIENCY = 3 / math.pi  # of Hodges and Lehmann's middle against the mean, for normal samples
NORMAL_DEVIATION = 1.4826  # standard deviation over the median absolute one, of normal samples


@dataclass(frozen=True)
class Change:
    """What became of one row.

    Attributes:
        name: Of the row.
        before: Median seconds.
        after: Median seconds.
        times: How many times as long it takes: above 1 is slower.
        limit: What `times`, or its inverse, has to exceed to count.
        relative: Whether it is measured in the baseline of its own run.
        verdict: "slower", "faster", "same"; "unclear": 15 % could not be seen; or "measure": it is
            what the other rows are measured in.
    """

    name: str
    before: float
    after: float
    times: float
    limit: float
    relative: bool
    verdict: str


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Compare the rows that two results have in common.

    Args:
        before: See `schema`.
        after: Likewise.
    """
    old, new = ({row["name"]: row for row in each["results"]} for each in (before, after))
    changes = []
    for name in old:
        if name not in new:
            continue
        logs, relative = _logs(old, new, name)
        limit = max(LEAST, MANY * math.hypot(*map(_error, logs)))
        change = _middle(logs[1]) - _middle(logs[0])
        verdict = "same"
        if {old[name]["baseline"], new[name]["baseline"]} == {name}:
            verdict = "measure"
        elif abs(change) > limit:
            verdict = "slower" if change > 0 else "faster"
        elif limit > WANTED:
            verdict = "unclear"
        medians = [float(rows[name]["seconds"]["median"]) for rows in (old, new)]
        times, least = math.exp(change), math.exp(limit)
        changes.append(Change(name, medians[0], medians[1], times, least, relative, verdict))
    return changes


def _logs(
    old: Mapping[str, Any], new: Mapping[str, Any], name: str
) -> tuple[tuple[NDArray[np.float64], NDArray[np.float64]], bool]:
    """Return the logarithms of a row's samples, in the baseline's where both have the same one."""
    baselines = {rows[name]["baseline"] for rows in (old, new)}
    relative = None not in baselines and len(baselines) == 1 and name not in baselines
    logs = []
    for rows in (old, new):
        own = np.log(rows[name]["seconds"]["samples"])
        base = np.log(rows[rows[name]["baseline"]]["seconds"]["samples"]) if relative else 0.0
        logs.append(own - base)
    return (logs[0], logs[1]), relative


def _middle(logs: NDArray[np.float64]) -> float:
    """Return the median of the means of all pairs of samples, each with itself too."""
    first, second = np.triu_indices(len(logs))
    return float(np.median((logs[first] + logs[second]) / 2))


def _error(logs: NDArray[np.float64]) -> float:
    """Return the standard error of the middle of samples."""
    if len(logs) < FEWEST:
        return math.inf
    deviation = np.median(np.abs(logs - np.median(logs)))
    return float(NORMAL_DEVIATION * deviation / math.sqrt(EFFICIENCY * len(logs)))


def require_one_machine(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse to compare what was measured on different machines.

    Args:
        results: By name of the file.

    Raises:
        InputError: Some hardware differs.
    """
    (first, base), *others = ((n, r["machine"]["hardware"]) for n, r in results.items())
    for name, hardware in others:
        for part, value in hardware.items():
            if value != base[part]:
                raise InputError(
                    f"{name}: expected the machine of {first}, got another one ({part}: {value}, "
                    f"not {base[part]}): compare them all the same with --across-machines"
                )


def software(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return what of the software differs, one line each."""
    old, new = (each["machine"]["software"] for each in (before, after))
    return [
        f"{name}: {old.get(name)} -> {new.get(name)}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def unmatched(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return which rows only one of the results has, one line each.

    Args:
        results: By name of the file.
    """
    names = {file: [row["name"] for row in each["results"]] for file, each in results.items()}
    return [
        f"only in {file}: {name}"
        for file, own in names.items()
        for name in own
        if not all(name in others for others in names.values())
    ]


def draw(path: Path, names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> None:
    """Draw the rows of several results as bars, with p10 and p90, into a picture.

    Args:
        path: Of the picture; its suffix says the format: .png, .svg or .pdf.
        names: Of the results.
        results: See `schema`.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UnavailableError(
            "matplotlib is not installed: pip install 'flashdip[plots]'"
        ) from None
    rows = list(dict.fromkeys(row["name"] for each in results for row in each["results"]))
    figure = Figure(figsize=(8, 1 + 0.3 * len(rows) * len(results)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(results)
    for index, (name, each) in enumerate(zip(names, results, strict=True)):
        found = {row["name"]: row["seconds"] for row in each["results"]}
        at = [place + index * height for place, row in enumerate(rows) if row in found]
        seconds = [found[row] for row in rows if row in found]
        median = np.array([1e3 * s["median"] for s in seconds])
        ends = np.array([[1e3 * s["p10"], 1e3 * s["p90"]] for s in seconds]).T.reshape(2, -1)
        reach = np.abs(ends - median)
        axes.barh(at, median, height, xerr=reach, label=name, error_kw={"linewidth": 1})
    axes.set_yticks(np.arange(len(rows)) + 0.4 - height / 2, rows)
    axes.invert_yaxis()
    axes.set_xlabel("ms, median, from p10 to p90")
    axes.set_xscale("log")
    axes.legend()
    figure.savefig(path, dpi=150)
