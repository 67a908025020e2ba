"""Device memory of a plan: one block, in which tensors that are never needed together overlap.

Launches run one after another, so a tensor that every step writes anew has to be there only from
the first launch that has it among its arguments to the last. A step is therefore planned twice:
without memory, every tensor by itself, which tells how long each is needed; then in a block where
the largest have found their place first ("greedy by size": Pisarchyk and Lee, "Efficient memory
management for deep neural net inference", 2020).
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashdip.kernels.fused.launch import Launch

_ALIGNED = 256  # bytes, as PyTorch's own allocator
_BEYOND = 1 << 40  # bytes of a block that takes no memory: whatever lies where is within it


@dataclass(frozen=True)
class Place:
    """Where a tensor lies, and when it is needed.

    Attributes:
        offset: Bytes from the beginning of the block.
        size: Bytes.
        needed: By which launches, from the first to the last; None: it stays.
    """

    offset: int
    size: int
    needed: range | None

    @property
    def end(self) -> int:
        """Where the next one may begin."""
        return self.offset + self.size

    def meets(self, needed: range) -> bool:
        """Return whether it is needed together with another one."""
        own = self.needed
        return own is None or (own.start < needed.stop and needed.start < own.stop)


class Memory:
    """Hands out the tensors of a plan; see `flashdip.kernels.fused.launch.Allocator`.

    Args:
        device: Where they lie.
        places: Where in a block, in the order in which they are asked for; None: each by itself.

    Attributes:
        block: All of it, [bytes] uint8; without places, on the meta device.
    """

    def __init__(self, device: torch.device, places: Sequence[Place] | None = None) -> None:
        self.device, self._places = device, places
        if places is None:
            self.block = torch.empty(_BEYOND, dtype=torch.uint8, device="meta")
        else:
            self.block = torch.zeros(total(places), dtype=torch.uint8, device=device)
        self._asked: list[tuple[Tensor, bool]] = []

    def keep(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a zeroed tensor that stays."""
        return self._take(shape, dtype, stays=True)

    def share(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor that is only there for the launches that have it among their arguments.

        What it holds before the first of them in every step is not specified.
        """
        return self._take(shape, dtype, stays=False)

    def _take(self, shape: tuple[int, ...], dtype: torch.dtype, *, stays: bool) -> Tensor:
        if self._places is None:
            tensor = torch.zeros(shape, dtype=dtype, device=self.device)
        else:
            place = self._places[len(self._asked)]
            values = self.block[place.offset : place.end].view(dtype)
            tensor = values[: torch.Size(shape).numel()].view(shape)
        self._asked.append((tensor, stays))
        return tensor

    def places(self, launches: Sequence[Launch]) -> list[Place]:
        """Find a place for each tensor that was handed out by itself.

        Args:
            launches: All that there are, in the order in which they run.
        """
        numbers = {_storage(tensor): i for i, (tensor, _) in enumerate(self._asked)}
        needed: dict[int, range] = {}
        for time, launch in enumerate(launches):
            for tensor in launch.tensors:
                i = numbers.get(_storage(tensor))
                if i is not None:
                    needed[i] = range(needed[i].start if i in needed else time, time + 1)
        found, end, sizes = dict[int, Place](), 0, [_size(tensor) for tensor, _ in self._asked]
        for i, (_, stays) in enumerate(self._asked):
            if stays:
                found[i] = Place(end, sizes[i], None)
                end += sizes[i]
        shared: list[Place] = []  # in the order of their offsets
        for i in sorted(set(range(len(sizes))) - set(found), key=lambda i: -sizes[i]):
            found[i] = _fit(shared, end, sizes[i], needed.get(i, range(0)))
            bisect.insort(shared, found[i], key=lambda place: place.offset)
        return [found[i] for i in range(len(sizes))]


def total(places: Sequence[Place]) -> int:
    """Return the bytes of a block."""
    return max((place.end for place in places), default=0)


def _fit(placed: Sequence[Place], start: int, size: int, needed: range) -> Place:
    """Return the first place from `start` on where nothing lies that is needed at the same time."""
    for place in placed:
        if place.meets(needed):
            if place.offset - start >= size:
                break
            start = max(start, place.end)
    return Place(start, size, needed)


def _size(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED


def _storage(tensor: Tensor) -> int:
    """Return what all views of a tensor have in common."""
    return int(tensor.untyped_storage()._cdata)
