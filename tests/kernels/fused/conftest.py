"""The kernels are tested in Triton's interpreter: chosen here, before Triton is loaded."""

import os
from collections.abc import Iterator

import pytest

os.environ["TRITON_INTERPRET"] = "1"


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
