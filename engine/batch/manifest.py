"""Manifests: a CSV with a head line, or a line of JSON for each picture.

Columns: image (the only one that must be there), output, mask, truth, and preset, sigma, seed,
iterations in place of the command's. Empty means not given. Paths are relative to the manifest;
outputs are relative to the folder of outputs, and are named like the image unless given.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from flashdip.engine.batch import storage
from flashdip.engine.batch.inputs import Found
from flashdip.engine.batch.storage import checked, remote, safe_name
from flashdip.engine.errors import InputError
from flashdip.engine.files import one_line

_MOST_PIXELS = 100_000_000  # so large may the text be, in the terms of `storage.read`


def read(address: str) -> list[Found]:
    """Return the pictures of a manifest.

    Args:
        address: Ends in .csv or .jsonl.

    Raises:
        InputError: It cannot be read; or a line is wrong, which is named.
    """
    name = one_line(address)
    try:
        text = storage.read(address, _MOST_PIXELS).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{name}: expected text in UTF-8, got other bytes: save it so") from None
    lines = _csv if address.lower().endswith(".csv") else _jsonl
    base = address.rpartition("/")[0]
    found = []
    for number, row in lines(text, name):
        try:
            found.append(_found(row, base))
        except InputError as error:
            raise InputError(f"{name}, line {number}: {error}") from None
    if not found:
        raise InputError(f"{name}: expected at least one picture, got none")
    return found


def _csv(text: str, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise InputError(
                    f"{name}, line {reader.line_num}: expected as many cells as the head line has, "
                    f"{len(reader.fieldnames or ())}, got another number"
                )
            yield reader.line_num, {key.strip(): value.strip() for key, value in row.items()}
    except csv.Error as error:
        raise InputError(f"{name}, line {reader.line_num}: {one_line(error)}") from None


def _jsonl(text: str, name: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{name}, line {number}: {one_line(error)}") from None
        if not isinstance(row, dict):
            raise InputError(f"{name}, line {number}: expected an object, got {one_line(line, 40)}")
        yield number, row


def _found(row: Mapping[str, Any], base: str) -> Found:
    for column in row:
        if column not in _COLUMNS:
            raise InputError(
                f"{one_line(column)!r}: no such column; expected some of {', '.join(_COLUMNS)}"
            )
    values = {
        column: _COLUMNS[column](column, value)
        for column, value in row.items()
        if value not in ("", None)
    }
    if "image" not in values:
        raise InputError("image: expected the path of a picture, got none")
    for column in ("image", "mask", "truth"):
        if column in values and not remote(values[column]):
            path = values[column]
            joined = path if path.startswith(("/", "~", "file://")) else f"{base}/{path}"
            # What a manifest on a bucket names is there too.
            values[column] = joined if remote(joined) else checked(joined)
        elif column in values:
            values[column] = checked(values[column])
    image = values.pop("image")
    output = values.pop("output", PurePosixPath(image).name)
    return Found(image, safe_name(output), values)


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InputError(f"{column}: expected text, got {one_line(repr(value), 40)}")
    return value


def _number(column: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{column}: expected a number, got {one_line(repr(value), 40)}")
    return number


def _whole(column: str, value: Any) -> int:
    number = _number(column, value)
    if number != int(number):
        raise InputError(f"{column}: expected a whole number, got {one_line(repr(value), 40)}")
    return int(number)


_COLUMNS: dict[str, Callable[[str, Any], Any]] = {
    "image": _text,
    "output": _text,
    "mask": _text,
    "truth": _text,
    "preset": _text,
    "sigma": _number,
    "seed": _whole,
    "iterations": _whole,
}
