"""Look for what may be missing or broken, and go on."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def attempt(probe: Callable[[], T], otherwise: T) -> T:
    """Return what a probe finds; `otherwise` where it raises.

    Drivers and half-installed packages raise anything; a diagnosis must outlive all of it.
    """
    try:
        return probe()
    except Exception:
        return otherwise
