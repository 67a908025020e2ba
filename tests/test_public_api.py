"""What `flashdip.__all__` names is there, documented, and known to type checkers."""

import ast
import inspect
from pathlib import Path

import pytest

import flashdip

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", flashdip.__all__)
def test_public_names_are_there_and_documented(name: str) -> None:
    thing = getattr(flashdip, name)
    assert thing.__name__ == name
    assert inspect.getdoc(thing)
    assert thing.__module__.startswith("flashdip.engine.")


def test_the_list_is_sorted_and_is_what_dir_shows() -> None:
    assert flashdip.__all__ == sorted(set(flashdip.__all__))
    assert dir(flashdip) == flashdip.__all__


def test_type_checkers_see_each_name_where_it_is_found_at_run_time() -> None:
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    assert seen == {name: f"flashdip.engine.{home}" for name, home in flashdip._HOME.items()}
    assert set(seen) == set(flashdip.__all__)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'denoize'"):
        flashdip.denoize  # noqa: B018
