"""What the tests of the kernels share; it makes Triton's interpreter twice as fast for them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def hastened() -> Iterator[None]:
    """Spare the interpreter what it does again at each call, and 64 bits beside each integer.

    It replaces the language's functions at each call of a device function, where they have been
    replaced for the launch; and it computes with integers a second time, to see whether they
    overflow: offsets into maps as small as the tests' do not.
    """
    from triton.runtime import interpreter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", _once_a_launch(interpreter._patch_lang))
        options = interpreter.interpreter_builder.options
        object.__setattr__(options, "sanitize_overflow", False)  # it is frozen
        yield
        object.__setattr__(options, "sanitize_overflow", True)


def _once_a_launch(replace: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let the language be replaced once for each module's view of it; anew after a launch."""
    done: set[int] = set()  # globals of functions

    def once(function: Any) -> Any:
        key = id(function.__globals__)
        if key in done:
            return None  # a launch is on: no other asks for what puts everything back
        scope = replace(function)
        done.add(key)
        if len(done) == 1:  # the launch's kernel itself
            restore = scope.restore

            def ended() -> None:
                restore()
                done.clear()

            scope.restore = ended
        return scope

    return once


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
