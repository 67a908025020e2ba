"""The format of a benchmark's result: what its fields are, a validator, reading and writing.

`FIELDS` is all there is to know: the validator follows it, and docs/benchmarks.md shows it as
`describe` writes it. All quantities are in SI units: seconds, bytes, operations a second, watts.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flashdip.engine.errors import InputError
from flashdip.engine.files import atomic, one_line

FORMAT = "flashdip-bench"
VERSION = 1
KINDS = ("step", "restore", "kernels", "gpu", "cpu")
LARGEST = 16 << 20  # bytes of a file that is read


@dataclass(frozen=True)
class Field:
    """What a value has to be.

    Attributes:
        kind: "text", "count" (a whole number from 0), "number" (finite, from 0), "flag", "plain"
            (an object of texts, numbers, flags and lists of them), "texts", "numbers", "object"
            (with fields of its own, listed behind its name and a dot) or "objects" (a list of
            such).
        about: What it says.
        optional: Whether it may be null. It has to be there all the same.
        any_key: Whether an object's keys are free, and the one field listed for it is of each.
    """

    kind: str
    about: str
    optional: bool = False
    any_key: bool = False


FIELDS: dict[str, Field] = {
    "format": Field("text", f'"{FORMAT}"'),
    "version": Field("count", f"of this format: {VERSION}"),
    "kind": Field("text", f"what was measured: {', '.join(KINDS)}"),
    "created": Field("text", "when, ISO 8601 in UTC"),
    "machine": Field("object", "what it was measured on"),
    "machine.hardware": Field("object", "figures can be compared where all of this is the same"),
    "machine.hardware.system": Field("text", "operating system and instruction set"),
    "machine.hardware.cpu": Field("text", "model"),
    "machine.hardware.cores": Field("count", "usable ones", optional=True),
    "machine.hardware.memory_gib": Field("count", "of the machine", optional=True),
    "machine.hardware.device": Field("text", "what was measured: a GPU, or the CPU"),
    "machine.hardware.device_memory_gib": Field("count", "of the device", optional=True),
    "machine.software": Field("plain", "versions, driver, threads, commit, hash of the code"),
    "machine.before": Field("plain", "load, clocks, temperature, power, throttling: before"),
    "machine.after": Field("plain", "the same after the measurement"),
    "ceilings": Field("object", "what the machine reached at the start", optional=True),
    "ceilings.copy": Field("number", "bytes a second of a long copy, read and written"),
    "ceilings.product": Field("plain", "operations a second of a matrix product, by precision"),
    "results": Field("objects", "one for each row"),
    "results.name": Field("text", "of the row, unique; rows of one name are compared"),
    "results.parameters": Field("plain", "backend, precision, size, fits and the like"),
    "results.seconds": Field("object", "of one iteration of one fit, or of what the name says"),
    "results.seconds.median": Field("number", "over rounds"),
    "results.seconds.p10": Field("number", "10th percentile"),
    "results.seconds.p90": Field("number", "90th percentile"),
    "results.seconds.n": Field("count", "rounds"),
    "results.seconds.samples": Field("numbers", "one a round; rows share their rounds"),
    "results.baseline": Field("text", "the row that the ratio is taken to", optional=True),
    "results.ratio": Field(
        "number", "times as fast as the baseline, median over rounds", optional=True
    ),
    "results.setup": Field(
        "number", "seconds to plan, take memory, compile and capture", optional=True
    ),
    "results.first_step": Field("number", "seconds of the first step", optional=True),
    "results.memory": Field(
        "count", "peak bytes: of the device, or of the process on a CPU", optional=True
    ),
    "results.work": Field("object", "what has to be done at least", optional=True),
    "results.work.flops": Field("count", "operations, twice the multiply-adds"),
    "results.work.bytes": Field("count", "that no fusion avoids"),
    "results.roof_share": Field(
        "number", "least time by work and ceilings, over the median", optional=True
    ),
    "results.joules": Field("number", "of the device, in the same unit of work", optional=True),
    "results.watts": Field("number", "of the device, meanwhile", optional=True),
    "results.gate": Field("object", "errors before any figure was taken", True, any_key=True),
    "results.gate.*": Field("object", "of one quantity, against float64"),
    "results.gate.*.error": Field("number", "what was found"),
    "results.gate.*.allowed": Field("number", "what is allowed"),
    "results.facts": Field("plain", "what else there is: PSNR, iterations"),
    "left_out": Field("plain", "rows that could not be measured, by name, and why"),
    "score": Field("object", "of `flashdip bench gpu`; null elsewhere", optional=True),
    "score.restorations_per_hour": Field("number", "at the best number of fits"),
    "score.size": Field("count", "pixels a side"),
    "score.preset": Field("text", "of the restorations"),
    "score.iterations": Field("count", "of a restoration, at the most"),
    "score.backend": Field("text", "that ran"),
    "score.precision": Field("text", "of stored activations"),
    "score.fits": Field("count", "side by side, where the score was best"),
    "score.iterations_per_second": Field("plain", "of one fit, by size"),
    "score.watts": Field("number", "while at it", optional=True),
    "score.sustained": Field("object", "the same step for a while"),
    "score.sustained.seconds": Field("number", "how long"),
    "score.sustained.samples": Field("numbers", "iterations a second, over equal parts of it"),
    "score.sustained.kept": Field("number", "the last part's rate over the first one's"),
}  # fmt: skip


def document(
    kind: str,
    machine: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    ceilings: Mapping[str, Any] | None,
    found: Mapping[str, Any],
    score: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Put a result together, and check that it is as it should be.

    Args:
        kind: One of `KINDS`.
        machine: See `machine.survey`.
        before: See `machine.state`.
        after: The same, after the measurement.
        ceilings: See `Ceilings.record`.
        found: See `suite.results`.
        score: Of the kind "gpu".
    """
    made = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {**machine, "before": before, "after": after},
        "ceilings": ceilings,
        **found,
        "score": score,
    }
    plain: dict[str, Any] = json.loads(json.dumps(made))  # tuples become lists, as on disk
    wrong = problems(plain)
    assert not wrong, wrong
    return plain


def problems(found: object) -> list[str]:
    """Return what is wrong with a result, one line each; empty if nothing is."""
    if not isinstance(found, dict):
        return ["expected an object"]
    if found.get("format") != FORMAT:
        return [f"format: expected {FORMAT!r}, got {_short(found.get('format'))}"]
    if found.get("version") != VERSION:
        return [f"version: expected {VERSION}, got {_short(found.get('version'))}"]
    wrong = list(_object(found, "", ""))
    if wrong:
        return wrong
    if found["kind"] not in KINDS:
        wrong.append(f"kind: expected one of {', '.join(KINDS)}, got {_short(found['kind'])}")
    try:
        datetime.fromisoformat(found["created"])
    except ValueError:
        wrong.append(f"created: expected a time in ISO 8601, got {_short(found['created'])}")
    if (found["score"] is not None) != (found["kind"] == "gpu"):
        wrong.append("score: expected one where the kind is gpu, and null elsewhere")
    names = [row["name"] for row in found["results"]]
    for index, row in enumerate(found["results"]):
        place, seconds = f"results[{index}]", row["seconds"]
        if names.count(row["name"]) > 1:
            wrong.append(f"{place}.name: expected another than other rows have, got {row['name']}")
        if not 0 < seconds["p10"] <= seconds["median"] <= seconds["p90"]:
            wrong.append(f"{place}.seconds: expected 0 < p10 <= median <= p90")
        if seconds["n"] != len(seconds["samples"]) or not seconds["n"]:
            wrong.append(f"{place}.seconds.samples: expected {seconds['n']}, at least one")
        if (row["baseline"] is None) != (row["ratio"] is None):
            wrong.append(f"{place}.ratio: expected with a baseline, and only then")
        if row["baseline"] is not None and row["baseline"] not in names:
            wrong.append(f"{place}.baseline: expected a row, got {row['baseline']}")
        for name, each in (row["gate"] or {}).items():
            if not each["error"] <= each["allowed"]:
                wrong.append(f"{place}.gate.{name}: expected at most what is allowed")
    return wrong


def _object(value: Mapping[str, Any], path: str, shown: str) -> Iterator[str]:
    """Check an object whose fields are listed under `path`; `shown` is where it is."""
    prefix = f"{path}." if path else ""
    names = [name[len(prefix) :] for name in FIELDS if name.startswith(prefix)]
    known = [name for name in names if "." not in name]
    if known == ["*"]:
        known = list(value)
    for name in sorted(value.keys() - set(known)):
        yield f"{shown}{name}: there is no such field"
    for name in known:
        field = FIELDS[f"{prefix}{name}"] if f"{prefix}{name}" in FIELDS else FIELDS[f"{prefix}*"]
        key = f"{prefix}{name}" if f"{prefix}{name}" in FIELDS else f"{prefix}*"
        if name not in value:
            yield f"{shown}{name}: it is missing"
        elif value[name] is None:
            if not field.optional:
                yield f"{shown}{name}: expected {field.kind}, got null"
        else:
            yield from _value(value[name], field, key, f"{shown}{name}")


def _value(value: Any, field: Field, path: str, shown: str) -> Iterator[str]:
    match field.kind:
        case "object":
            if isinstance(value, dict):
                yield from _object(value, path, f"{shown}.")
                return
        case "objects":
            if isinstance(value, list) and all(isinstance(each, dict) for each in value):
                for index, each in enumerate(value):
                    yield from _object(each, path, f"{shown}[{index}].")
                return
        case "plain":
            if isinstance(value, dict) and all(map(_plain, value.values())):
                return
        case "numbers":
            if isinstance(value, list) and all(map(_number, value)):
                return
        case "count":
            if _number(value) and isinstance(value, int):
                return
        case "number":
            if _number(value):
                return
        case "text":
            if isinstance(value, str) and value and value.isprintable():
                return
    yield f"{shown}: expected {field.kind}, got {_short(value)}"


def _number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and value >= 0


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_plain, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, str | int)


def _short(value: Any) -> str:
    return one_line(repr(value), limit=60)


def write(path: str | Path, result: Mapping[str, Any], *, force: bool = False) -> None:
    """Write a result as JSON.

    Raises:
        OutputError: The file exists and `force` is not set, or it cannot be written.
    """
    with atomic(path, force=force) as temporary:
        temporary.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def read(path: str | Path) -> dict[str, Any]:
    """Read a result, and check it.

    Raises:
        InputError: It cannot be read, or is none.
    """
    name = one_line(path)
    try:
        with open(path, "rb") as file:
            text = file.read(LARGEST + 1)
        if len(text) > LARGEST:
            raise InputError(f"{name}: expected a result of at most {LARGEST >> 20} MiB")
        found = json.loads(text)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{name}: expected JSON as 'flashdip bench' writes it") from None
    wrong = problems(found)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InputError(f"{name}: no result of 'flashdip bench': {wrong[0]}{more}")
    result: dict[str, Any] = found
    return result


def describe() -> str:
    """Return `FIELDS` as a table in Markdown."""
    lines = ["| field | kind | what it says |", "|---|---|---|"]
    for name, field in FIELDS.items():
        kind = f"{field.kind} or null" if field.optional else field.kind
        lines.append(f"| `{name}` | {kind} | {field.about} |")
    return "\n".join(lines) + "\n"
