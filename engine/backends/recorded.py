"""Tensor operations that are recorded once and repeated without autograd: a CPU's CUDA graph.

An iteration of a fit is the same thousand operations each time. To find out anew which they are, to
take the same views and to build the same graph of gradients takes a quarter of the time of a narrow
network. So one iteration is watched below autograd (`TorchDispatchMode`), where its forward and its
backward pass are one list of operations, and then repeated (`flashdip.engine.backends.repeated`)
from that list:

- small results are written to an arena, planned from their first to their last use
  (`flashdip.engine.backends.arena`);
- large ones, and those of what cannot write to given memory, convolutions foremost, are allocated
  as before, and freed after their last use;
- views are taken once of memory that stays, and of the other as they are used.

The same kernels see the same values in the same layout, so that the bits are the same.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from flashdip.engine.backends.arena import Place, Storage

_LARGE = 1 << 20  # bytes, from which on memory comes from the heap: two pools waste more than one
_aten = torch.ops.aten


class Operation(NamedTuple):
    """A recorded call, with a `Place` for each tensor.

    Attributes:
        function, arguments, options: Of the call.
        results: That it made, new memory each.
        writes: Whether the operation that writes to given memory did the same.
    """

    function: Any
    arguments: list[Any]
    options: dict[str, Any]
    results: list[Place | None]
    writes: bool = False


@dataclass
class Part:
    """Operations that are repeated together.

    Attributes:
        given: What they are given anew each time.
        end: Of its operations in the list.
        kept: What they give back.
    """

    given: list[Place]
    end: int = 0
    kept: list[Place] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Records the operations on CPU tensors that are made within its parts, as they are made.

    What a part has not made and was not given, such as parameters, is taken to be the same tensors
    each time, and scalars to be the same numbers: they may not depend on the iteration.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.parts: list[Part] = []
        self.storages: list[Storage] = []
        self._known: dict[int, Storage] = {}
        self._guards: list[StorageWeakRef] = []  # while they live no address is used twice

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is ever compiled; to say so would load the compiler

    @contextlib.contextmanager
    def part(self, *given: Tensor) -> Iterator[list[Tensor]]:
        """Record a part; append to the list that is yielded what it is to give back.

        Args:
            *given: Tensors that are others each time.
        """
        for tensor in given:
            self._storage(tensor, -1)
        part = Part([self._place(tensor, len(self.operations)) for tensor in given])
        kept: list[Tensor] = []
        with self:
            yield kept
        part.end = len(self.operations)
        for tensor in kept:
            part.kept.append(self._place(tensor, part.end))
        self.parts.append(part)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation, and record it unless it only takes views."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        made = list(result) if isinstance(result, list | tuple) else [result]
        seen: set[int] = set()
        at = len(self.operations)
        arguments = [self._described(each, at, seen) for each in args]
        options = {name: self._described(each, at, seen) for name, each in kwargs.items()}
        fresh = [
            each
            for each in made
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in seen
        ]
        if fresh:
            for each in fresh:
                self.storages.append(self._storage(each, at))
        elif not function._schema.is_mutable:
            return result
        results = [self._place(e, at) if isinstance(e, Tensor) else None for e in made]
        writes = function in _WRITING and _agrees(function, args, kwargs, made)
        recorded = Operation(function, arguments, options, results if fresh else [], writes)
        self.operations.append(recorded)
        return result

    def _storage(self, tensor: Tensor, at: int) -> Storage:
        """Get to know the storage of a tensor that an operation made, or that is given."""
        storage = tensor.untyped_storage()
        known = Storage(storage.nbytes(), at, at, planned=at >= 0)
        self._known[storage._cdata] = known
        self._guards.append(StorageWeakRef(storage))
        return known

    def _place(self, tensor: Tensor, at: int) -> Place:
        """Return where a tensor lies that an operation uses."""
        memory = tensor.untyped_storage()
        storage = self._known.get(memory._cdata)
        if storage is None:  # not the tensor: it may be a view that was just taken
            storage = Storage(memory.nbytes(), -1, at, planned=False, memory=memory)
            self._known[memory._cdata] = storage
        storage.last = max(storage.last, at)
        offset = int(tensor.storage_offset())
        return Place(storage, tensor.dtype, tuple(tensor.shape), tensor.stride(), offset)

    def _described(self, value: Any, at: int, seen: set[int]) -> Any:
        """Return an argument with places for tensors; add their storages' addresses to `seen`."""
        if isinstance(value, Tensor):
            seen.add(value.untyped_storage()._cdata)
            return self._place(value, at)
        if isinstance(value, list | tuple):
            return [self._described(each, at, seen) for each in value]
        return value


@contextlib.contextmanager
def unrecorded(*given: Tensor) -> Iterator[list[Tensor]]:
    """Stand in for `Recorder.part` where nothing is recorded."""
    yield []


def writing(operation: Operation) -> Operation | None:
    """Return an operation that writes its result to its place; None: there is nothing to do.

    Where there is none it stays as it is, and the memory is its own.
    """
    function, arguments, options, results, writes = operation
    if not results:
        return operation
    name, first = function._schema.name.removeprefix("aten::"), results[0]
    made = [place.storage for place in results if place is not None]
    if max(storage.size for storage in made) < _LARGE:
        if name in _UNINITIALISED:
            return None
        if name in _FILLED:
            return Operation(_aten.fill_.Scalar, [first, _FILLED[name]], {}, [])
        if name in _COPIED:
            return Operation(_aten.copy_.default, [first, arguments[0]], {}, [])
        if writes:
            writing, names = _WRITING[function]
            targets = dict(zip(names, results, strict=True))
            return Operation(writing, arguments, options | targets, [])
    for storage in made:
        storage.planned = False
    return operation


def _agrees(function: Any, args: Any, kwargs: dict[str, Any], made: list[Tensor]) -> bool:
    """Return whether the operation that writes to given memory writes what this one has made.

    torch's norm, of a map that lies neither in planes nor with its channels last, does not.
    """
    if max(each.nbytes for each in made) >= _LARGE:
        return False  # it would not be used
    if not all(each.is_floating_point() for each in made):
        return False  # nothing to mark them with that no result is
    writing, names = _WRITING[function]
    targets = [torch.empty_like(each).fill_(math.nan) for each in made]
    if [each.stride() for each in targets] != [each.stride() for each in made]:
        return False
    writing(*args, **kwargs, **dict(zip(names, targets, strict=True)))
    return all(torch.equal(*pair) for pair in zip(targets, made, strict=True))


_UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_FILLED = {"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0, "ones_like": 1.0, "new_ones": 1.0}
_COPIED = {"clone", "_to_copy"}
# Operations whose kernels write to given memory: what does that, and what it calls the memory.
# Where torch binds it to Python, that is called in half the time of the overload.
_WRITING: dict[Any, tuple[Any, list[str]]] = {
    **{
        getattr(getattr(_aten, name), overload): (getattr(torch, name), ["out"])
        for name, overload in (
            *((name, "Tensor") for name in ("add", "sub", "mul", "div")),
            *((name, "default") for name in ("bmm", "mm", "cat", "stack")),
            *((name, "default") for name in ("rsqrt", "sigmoid", "neg", "square")),
            ("pow", "Tensor_Scalar"),
            ("sum", "dim_IntList"),
        )
    },
    **{
        pad.default: (pad.out, ["out"]) for pad in (_aten.reflection_pad2d, _aten.replication_pad2d)
    },
    **{
        backward.default: (backward.grad_input, ["grad_input"])
        for backward in (
            _aten.reflection_pad2d_backward,
            _aten.replication_pad2d_backward,
            _aten.leaky_relu_backward,
            _aten.sigmoid_backward,
        )
    },
    _aten.native_batch_norm.default: (
        _aten.native_batch_norm.out,
        ["out", "save_mean", "save_invstd"],
    ),
}
