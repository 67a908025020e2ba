"""What the tests of the kernels share."""

from collections.abc import Iterator

import pytest


@pytest.fixture
def reversed_order(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run the programs of each launch from the last to the first."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    place = builder.set_grid_idx

    def mirrored(x: int, y: int, z: int) -> None:
        place(*(size - 1 - at for size, at in zip(builder.grid_dim, (x, y, z), strict=True)))

    monkeypatch.setattr(builder, "set_grid_idx", mirrored)
    yield
