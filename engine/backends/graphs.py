"""Work on a device that is done over and over, captured in CUDA graphs of several repetitions.

What is captured reads and writes the same memory each time and finds out on the device how far it
got, so that ten repetitions in one graph are ten graphs of one. There has been no GPU to run this
on: without one, repetitions are made one by one, and only their composition is tested.
"""

import contextlib
import gc
from collections.abc import Callable, Iterable

import torch

SIZES = (10, 4, 1)  # repetitions in a graph


def compose(count: int, sizes: Iterable[int] = SIZES) -> list[int]:
    """Return which sizes make up a count: as few as there can be, 1 being among them."""
    found = []
    for size in sorted(sizes, reverse=True):
        found += [size] * (count // size)
        count %= size
    return found


def needed(gaps: Iterable[int]) -> list[int]:
    """Return the sizes that these counts are made up of, and 1."""
    return sorted({1, *(size for gap in gaps for size in compose(gap))}, reverse=True)


class Repeated:
    """Runs work on a device any number of times over.

    Args:
        work: What is to be done; on a GPU it is run once by this, to compile and load it, and may
            then neither allocate nor wait for the device.
        device: Where.
        sizes: Repetitions to capture, 1 among them.
    """

    def __init__(
        self, work: Callable[[], None], device: torch.device, sizes: Iterable[int] = (1,)
    ) -> None:
        self.sizes = tuple(sizes)
        self._replay = dict(zip(self.sizes, _captured(work, device, self.sizes), strict=True))

    def __call__(self, count: int = 1) -> None:
        """Do it so many times, without waiting for the device."""
        for size in compose(count, self.sizes):
            self._replay[size]()


def _captured(
    work: Callable[[], None], device: torch.device, sizes: Iterable[int]
) -> list[Callable[[], None]]:
    """Return what repeats the work by each of the sizes."""

    def repeated(size: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(size):
                work()

        return run

    if device.type != "cuda":
        return [repeated(size) for size in sizes]
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # compiles and loads
        stream.synchronize()
        graphs = []
        for size in sizes:
            graphs.append(torch.cuda.CUDAGraph())
            with _without_collection(), torch.cuda.graph(graphs[-1], stream=stream):
                repeated(size)()
    return [graph.replay for graph in graphs]


@contextlib.contextmanager
def _without_collection():  # type: ignore[no-untyped-def]
    """Keep the garbage collector away: unloading a module would break a capture."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
