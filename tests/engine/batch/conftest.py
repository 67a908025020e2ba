"""Workers are fresh processes, which take over the path that modules are found on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="package", autouse=True)
def workers_find_the_tests() -> Iterator[None]:
    """Let a worker that is sent an object of a test module find it by name.

    Pytest itself imports test modules by their files.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield
