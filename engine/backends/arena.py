"""Where the tensors of a recorded iteration lie, and what may lie where another lay before.

Each storage gets the lowest place in one arena that is free from its first to its last use, the
largest first (greedy by size: Pisarchyk and Lee, "Efficient memory management for deep neural net
inference", 2020).
"""

from bisect import insort
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes, as torch's own allocations have it


@dataclass(eq=False)
class Storage:
    """Memory that recorded tensors share.

    Attributes:
        size: In bytes.
        first: The operation that made it, by its place in the list; -1: it is given.
        last: The last one that uses it.
        planned: Whether it lies in the arena; else what makes it allocates it.
        offset: In the arena, in bytes.
        memory: Of what comes from elsewhere, and is the same each time.
    """

    size: int
    first: int
    last: int
    planned: bool = True
    offset: int = 0
    memory: torch.UntypedStorage | None = None

    @property
    def moves(self) -> bool:
        """Whether its memory is another each time."""
        return not self.planned and self.memory is None


class Place(NamedTuple):
    """Where a recorded tensor lies: what `Tensor.as_strided` takes, in a storage."""

    storage: Storage
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def lies(tensor: Tensor, place: Place) -> bool:
    """Return whether a tensor lies in its storage as in the place's."""
    same = tensor.shape == place.shape and tensor.stride() == place.stride
    return same and tensor.storage_offset() == place.offset


def laid(tensor: Tensor, place: Place) -> Tensor:
    """Return a tensor that lies as it did when it was recorded."""
    if lies(tensor, place):
        return tensor
    copy = torch.empty(0, dtype=place.dtype)
    copy.set_(torch.UntypedStorage(place.storage.size), place.offset, place.shape, place.stride)
    return copy.copy_(tensor)


def arrange(storages: list[Storage]) -> int:
    """Give each storage an offset that no other has while it is used; return the bytes in all."""
    placed: list[tuple[int, int, Storage]] = []  # offset, end, in that order
    total = 0
    for storage in sorted(storages, key=lambda each: each.size, reverse=True):
        size, at = -(-storage.size // _ALIGNMENT) * _ALIGNMENT, 0
        for offset, end, other in placed:
            if other.first <= storage.last and storage.first <= other.last:
                if offset - at >= size:
                    break
                at = max(at, end)
        storage.offset = at
        insort(placed, (at, at + size, storage), key=lambda each: each[0])
        total = max(total, at + size)
    return total
