"""Whole restorations of a noisy photograph until they are good enough: published, and presets."""

from typing import Any

import pytest

from flashdip.bench import scenarios
from flashdip.bench.booking import device_of
from flashdip.bench.cases import Bench

TARGET = 26.0  # dB of the averaged output; the noisy photograph has 20.6
SIZE = 64  # pixels a side
PRESETS = ("quick", "balanced")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a bench of the published loop and of each preset."""
    device = device_of(metafunc.config)
    group = f"restore {SIZE} to {TARGET:g} dB"
    listed = scenarios.restorations(SIZE, TARGET, device, "auto", PRESETS)
    metafunc.parametrize("bench", [(group, b) for b in listed], ids=[b.name for b in listed])


def bench_restore(bench: tuple[str, Bench], turns: Any, show: Any) -> None:
    """Seconds of a restoration."""
    group, own = bench
    show(group, own, lambda: turns(group, plan={"rounds": 5, "warm": False, "setup": 600.0}))
