"""Maps that are made anew in the backward pass instead of being kept for it.

What a convolution takes is often another map with a border, or shifted and scaled: made again in a
pass or two, where the convolution takes the time of ten. So an op set says of such a map what it
was made of (`made`), and within `recalling` autograd keeps that in its place. The bits are the
same. There op sets may overwrite as well what only they need (`flashdip.kernels.activated`).

After Pleiss, Chen, Huang, Li, van der Maaten and Weinberger, "Memory-efficient implementation of
DenseNets" (2017).
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class _Origin(NamedTuple):
    """What makes a map, and of what."""

    function: Callable[..., Tensor]
    arguments: list["Tensor | _View"]

    def make(self) -> Tensor:
        return self.function(*map(_tensor, self.arguments))


class _View(NamedTuple):
    """A view of a map that is to be made anew."""

    origin: _Origin
    shape: torch.Size
    strides: tuple[int, ...]
    offset: int


class _Made(NamedTuple):
    """Where a map lay; while the reference lives no other storage is taken for it."""

    storage: StorageWeakRef
    origin: _Origin


_made: ContextVar[dict[int, _Made] | None] = ContextVar("made", default=None)


@contextlib.contextmanager
def recalling(note: Callable[[Tensor], object] | None = None) -> Iterator[None]:
    """Let autograd keep what maps were made of, for the operations of the block.

    Their backward pass can be made once, and op sets may look at parameters: not to be captured.

    Args:
        note: Is called with each tensor that is kept.
    """

    def pack(tensor: Tensor) -> Tensor | _View:
        kept = _origin(tensor)
        if note is not None:
            for each in _tensors(kept):
                note(each)
        return kept

    token = _made.set({})
    try:
        with saved_tensors_hooks(pack, _tensor):
            yield
    finally:
        _made.reset(token)


def active() -> bool:
    """Return whether the caller is within `recalling`."""
    return _made.get() is not None


def made(result: Tensor, function: Callable[..., Tensor], *arguments: Tensor) -> Tensor:
    """Say that `function` makes a tensor of these arguments, with the same layout; return it.

    The arguments may be made of others in turn. They have to stay as they are until all that the
    result was used for has been differentiated.
    """
    known = _made.get()
    if known is not None:
        storage = result.untyped_storage()
        origin = _Origin(function, [_origin(argument.detach()) for argument in arguments])
        known[storage._cdata] = _Made(StorageWeakRef(storage), origin)
    return result


def _origin(tensor: Tensor) -> Tensor | _View:
    """Return what to keep in a tensor's place: itself, where nothing else is known."""
    known = _made.get() or {}
    found = known.get(tensor.untyped_storage()._cdata)
    if found is None:
        return tensor
    return _View(found.origin, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _tensors(kept: Tensor | _View) -> Iterator[Tensor]:
    if isinstance(kept, Tensor):
        yield kept
    else:
        for argument in kept.origin.arguments:
            yield from _tensors(argument)


def _tensor(kept: Tensor | _View) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.origin.make().as_strided(kept.shape, kept.strides, kept.offset)
