"""Device memory of a plan: what it keeps, and what launches use after one another."""

import torch
from torch import Tensor

_ALIGNED = 256  # bytes, as PyTorch's own allocator


class Memory:
    """Hands out zeroed tensors on one device and counts their bytes.

    Launches run one after another, so a temporary whose last reader is planned is free for the
    next one: that is decided once, while planning.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._free: list[Tensor] = []
        self._lent: dict[int, Tensor] = {}

    def keep(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a zeroed tensor that stays."""
        need = _size(shape, dtype)
        self.bytes += need
        return _as(torch.zeros(need, dtype=torch.uint8, device=self.device), shape, dtype)

    def borrow(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor of unspecified values, to be given back."""
        need = _size(shape, dtype)
        fitting = [block for block in self._free if len(block) >= need]
        if fitting:
            block = min(fitting, key=len)
            self._free = [other for other in self._free if other is not block]
        else:
            self.bytes += need
            block = torch.zeros(need, dtype=torch.uint8, device=self.device)
        tensor = _as(block, shape, dtype)
        self._lent[id(tensor)] = block
        return tensor

    def give_back(self, *tensors: Tensor | None) -> None:
        """Let the next borrower have the memory of borrowed tensors."""
        for tensor in tensors:
            if tensor is not None:
                self._free.append(self._lent.pop(id(tensor)))


def _size(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNED) * _ALIGNED


def _as(block: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return block.view(dtype)[: torch.Size(shape).numel()].view(shape)
