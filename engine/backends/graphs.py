"""Work on a device done over and over: CUDA graphs of several repetitions, and news from them.

What is captured reads and writes the same memory each time and finds out on the device how far it
got, so that ten repetitions in one graph are ten graphs of one. There has been no GPU to run this
on: without one, repetitions are made one by one, and only their composition is tested.
"""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

SIZES = (10, 4, 1)  # repetitions in a graph
_WARM_UP = 3  # times

T = TypeVar("T")


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


@dataclass(frozen=True)
class Captured(Generic[T]):
    """Work in a graph.

    Attributes:
        result: What it returned: replays write it anew, in the same memory.
        replay: Does it, without waiting for the device.
    """

    result: T
    replay: Callable[[], None]


def capture(work: Callable[[], T], device: torch.device) -> Captured[T]:
    """Capture work that allocates what it returns and uses.

    Args:
        work: Run a few times before, on another stream, so that libraries choose their kernels;
            what it writes beside its result must not depend on how often it is run.
        device: One that has CUDA graphs.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with _without_collection(), torch.cuda.graph(graph):
            result = work()
    return Captured(result, graph.replay)


class Mail:
    """Small tensors on their way from a device to the host, which need not wait for them.

    Copies go to pinned memory, two of them in turns: what was sent before the last one has mostly
    arrived when it is asked for.

    Args:
        tensor: What is sent, as it is when the device gets there.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._cuda = tensor.device.type == "cuda"
        self._boxes = torch.empty(
            2, *tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self._cuda
        )
        self._events = [torch.cuda.Event() for _ in range(2)] if self._cuda else []
        self._sent = self._received = 0
        self._stamps = [0, 0]

    def send(self, stamp: int) -> None:
        """Send the tensor, with a number, without waiting for the device.

        The letters before the last one must have been received.
        """
        assert self._sent - self._received < 2
        box = self._sent % 2
        self._boxes[box].copy_(self._tensor, non_blocking=True)
        if self._cuda:
            self._events[box].record()
        self._stamps[box] = stamp
        self._sent += 1

    def receive(self, left: int) -> Iterator[tuple[int, list[list[float]]]]:
        """Yield numbers and tensors in the order in which they were sent, all but so many."""
        while self._sent - self._received > left:
            box = self._received % 2
            if self._cuda:
                self._events[box].synchronize()
            self._received += 1
            yield self._stamps[box], self._boxes[box].tolist()


@contextlib.contextmanager
def _without_collection():  # type: ignore[no-untyped-def]
    """Keep the garbage collector away: unloading a module would break a capture."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
