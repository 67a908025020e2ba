"""How pytest-benchmark gets its figures: `measure` takes them, and they are booked here.

The plugin reads its clock before and after a call. `LEDGER` is that clock; it stands still but for
the samples that a call books, so that what the plugin summarises, saves and compares are the very
samples that `flashdip bench` would show.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from flashdip.engine.backends import resolve_device


class Ledger:
    """A clock that shows what was booked, in seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        """Return the sum of what was booked."""
        return self.seconds


LEDGER = Ledger()


def book(benchmark: Any, group: str, row: Mapping[str, Any]) -> None:
    """Let the plugin's fixture have a row: its samples, and all else as `extra_info`.

    Args:
        benchmark: The fixture, with `LEDGER` as its timer.
        group: Of rows that are shown together.
        row: See `suite.row`.
    """
    benchmark.group = group
    benchmark.extra_info.update(row)
    samples = iter(row["seconds"]["samples"])

    def spend() -> None:
        LEDGER.seconds += next(samples)

    benchmark.pedantic(spend, rounds=row["seconds"]["n"], iterations=1)


def device_of(config: pytest.Config) -> torch.device:
    """Return the device that is measured."""
    return resolve_device(str(config.getoption("--bench-device")))


def numbers(config: pytest.Config, option: str) -> list[int]:
    """Return the whole numbers of an option."""
    return [int(part) for part in str(config.getoption(option)).split(",")]
