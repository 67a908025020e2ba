"""Tiles that were measured: kept for one GPU, driver, Triton and code, and for no other."""

import json
from pathlib import Path

import pytest

from flashdip.engine.backends import tuned
from flashdip.kernels.fused.launch import Tile

OF = {"gpu": "a GPU", "driver": "1", "triton": "3", "kernels": "abc"}
TILES = {"product 8 8 16 16 9 1 float16 F1": Tile(4, 16, 64, 32, 2, 4, 3)}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_what_was_kept_is_found_again() -> None:
    assert tuned.load(OF) == {}
    path = tuned.save(OF, TILES)
    assert tuned.load(OF) == TILES
    assert json.loads(path.read_text())["of"] == OF


@pytest.mark.parametrize("field", OF)
def test_nothing_holds_for_anything_else(field: str) -> None:
    tuned.save(OF, TILES)
    assert tuned.load(OF | {field: "another"}) == {}


def test_a_torn_file_counts_as_none() -> None:
    path = tuned.save(OF, TILES)
    path.write_text(path.read_text()[:40])
    assert tuned.load(OF) == {}
    path.write_text('{"tiles": [1]}')
    assert tuned.load(OF) == {}


def test_a_cache_that_cannot_be_used_counts_as_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert tuned.load(OF) == {}
