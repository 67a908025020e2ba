"""Memory that is kept between iterations instead of being mapped afresh."""

import contextlib
import ctypes
import platform
from collections.abc import Iterator

# Parameters of glibc's mallopt, and what they are unless set.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULTS = {_TRIM_THRESHOLD: 128 << 10, _MMAP_MAX: 65_536}
_KEEP = {_TRIM_THRESHOLD: (1 << 31) - 1, _MMAP_MAX: 0}


def on_glibc() -> bool:
    """Return whether this process's memory comes from glibc's heap."""
    return platform.libc_ver()[0] == "glibc"


def give_back() -> None:
    """Return the pages of freed memory to the system, those between used ones too, on glibc."""
    if on_glibc():
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def kept_pages() -> Iterator[None]:
    """Keep freed memory in the process while the block runs; give it back at the end.

    glibc maps every large allocation afresh and unmaps it when freed, so that a fit on the CPU
    spends half its time in page faults. Within the block large tensors come from the heap, which
    does not shrink. Elsewhere than on glibc this does nothing. It holds for the whole process;
    blocks may not be nested.
    """
    if not on_glibc():
        yield
        return
    libc = ctypes.CDLL(None)
    for name, value in _KEEP.items():
        libc.mallopt(name, value)
    try:
        yield
    finally:
        for name, value in _DEFAULTS.items():
            libc.mallopt(name, value)
        give_back()
