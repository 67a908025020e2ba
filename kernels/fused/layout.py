"""How the parameters of F fits lie in flat memory, and where their gradients come from.

Each tensor starts at a multiple of BLOCK elements; a convolution's weight [O, I, k, k] is kept as
[k, k, I, O], so that the channels of a matrix product are contiguous. A bias that a norm follows
has no effect and is left out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1024  # parameters that one program of the step updates


class Layout:
    """Flat parameters of the tensors that the kernels use.

    Args:
        shapes: The published shapes of all tensors, in order.
        used: Which of them the kernels use.

    Attributes:
        size: Elements of one fit, P.
        offsets: Where each tensor starts; None for those that are not used.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], used: Sequence[bool]) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        self.offsets: list[int | None] = []
        self.size = 0
        for shape, wanted in zip(self.shapes, used, strict=True):
            self.offsets.append(self.size if wanted else None)
            if wanted:
                self.size += -(-torch.Size(shape).numel() // BLOCK) * BLOCK

    def view(self, flat: Tensor, index: int) -> Tensor:
        """Return a tensor [F, ...] as the kernels see it, out of flat ones [F, P]."""
        offset, shape = self.offsets[index], self.shapes[index]
        assert offset is not None
        part = flat[:, offset : offset + torch.Size(shape).numel()]
        return part.view(len(flat), *_stored(shape))

    def pack(self, published: Sequence[Tensor], flat: Tensor) -> None:
        """Copy tensors [F, ...published shape] into flat ones [F, P]."""
        for index, tensor in enumerate(published):
            if self.offsets[index] is not None:
                swapped = tensor.permute(0, 3, 4, 2, 1) if tensor.ndim == 5 else tensor
                self.view(flat, index).copy_(swapped)

    def unpack(self, flat: Tensor, published: Sequence[Tensor]) -> None:
        """Copy flat ones [F, P] back into tensors [F, ...published shape]."""
        for index, tensor in enumerate(published):
            if self.offsets[index] is not None:
                view = self.view(flat, index)
                tensor.copy_(view.permute(0, 4, 3, 1, 2) if tensor.ndim == 5 else view)


def _stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        outputs, inputs, height, width = shape
        return height, width, inputs, outputs
    return shape
