"""The command that looks for tiles: what it says, what it keeps, when it ends."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flashdip.bench import tune
from flashdip.cli import app
from flashdip.engine.errors import ConfigError, UnavailableError
from flashdip.engine.presets import preset
from flashdip.kernels.fused import tuning
from flashdip.kernels.fused.launch import Tile
from flashdip.kernels.fused.tuning import Finding

BETTER = Finding("a", ("one", "two", "three"), Tile(), Tile(warps=4, stages=2), 1.254, 9, 2)
SAME = Finding("b", ("four",), Tile(), Tile(), 1.0, 7, 0)


class Place:
    """Keeps tiles in memory."""

    name, verb, where = "a GPU", "measured", "memory"

    def __init__(self) -> None:
        self.table: Mapping[str, Tile] = {}

    def plan(self, *shape: Any) -> Any:
        return lambda table: None

    def judge(self, first: Any) -> Any:
        return None

    def keep(self, tiles: Mapping[str, Tile]) -> None:
        self.table = {**self.table, **tiles}


def run(monkeypatch: pytest.MonkeyPatch, end: float) -> tuple[Place, list[Finding]]:
    def search(*arguments: Any) -> Iterator[Finding]:
        yield from (BETTER, SAME)

    monkeypatch.setattr(tuning, "search", search)
    place, config = Place(), preset("denoise")
    found = tune.search_until(end, place, config, (64, 64), torch.float16, 1)
    return place, list(found)


def test_what_is_better_is_kept_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    place, found = run(monkeypatch, time.monotonic() + 60)
    assert found == [BETTER, SAME]
    assert place.table == {"a": BETTER.after}


def test_it_ends_in_time_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    place, found = run(monkeypatch, time.monotonic() - 1)
    assert found == [BETTER]
    assert place.table == {"a": BETTER.after}


def test_a_line_says_what_changed() -> None:
    assert tune.line(BETTER) == (
        "one, two, ...: 1.25 times as fast, warps 8 -> 4, stages 3 -> 2 (9 tried, 2 cannot be used)"
    )
    assert tune.line(SAME) == "four: as it was (7 tried, 0 cannot be used)"


@pytest.mark.parametrize(
    ("arguments", "error", "part"),
    [
        (["--size", "8"], ConfigError, "--size"),
        (["--precision", "fp64"], ConfigError, "--precision"),
        (["--modelled", "sm_70"], ConfigError, "sm_90"),
        (["--preset", "none"], ConfigError, "preset"),
    ],
)
def test_bad_input_is_named(arguments: list[str], error: type[Exception], part: str) -> None:
    result = CliRunner().invoke(app, ["tune", *arguments])
    assert isinstance(result.exception, error)
    assert part in str(result.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to measure on")
def test_without_a_gpu_it_says_so() -> None:
    result = CliRunner().invoke(app, ["tune"])
    assert isinstance(result.exception, UnavailableError)
    assert "--modelled" in str(result.exception)
