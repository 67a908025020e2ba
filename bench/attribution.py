"""Who spent the time: from the profiler's events to layers and passes.

Forward, an operation belongs to the range that it runs in. Backward it runs within a node of
autograd, and the node carries the number of the forward operation that made it: it belongs where
that one does. Kernels that a CUDA graph replays belong to nobody; but their order is that of the
list of launches.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flashdip.bench.marks import PREFIX, READ, STEP
from flashdip.engine.errors import UnavailableError

OTHER = "between layers"
NODE = "autograd::engine::evaluate_function"
# What makes the host wait for the device, or would: on a CPU these are counted all the same.
_COUNTING = "aten::_fused_adam_"
WAITS = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpy",
    "cudaStreamSynchronize",
    "cuStreamSynchronize",
)


@dataclass(frozen=True)
class Event:
    """What the profiler saw; times in microseconds.

    Attributes:
        name: Of an operation, a range, a node of autograd, a kernel.
        start: Since the profile began.
        end: Likewise.
        parent: Index of the event that it ran within; None: of none.
        sequence: Number of the node of autograd that it made, or is; -1: of none.
        own: Time of itself, without what ran within it, of the device that is profiled.
        kernel: Whether it ran on a device other than the CPU.
    """

    name: str
    start: float
    end: float
    parent: int | None = None
    sequence: int = -1
    own: float = 0.0
    kernel: bool = False


def events(profile: Any, on_gpu: bool) -> list[Event]:
    """Return what a `torch.profiler.profile` saw."""
    seen = profile.events()
    index = {id(event): place for place, event in enumerate(seen)}
    return [
        Event(
            event.name,
            event.time_range.start,
            event.time_range.end,
            None if event.cpu_parent is None else index[id(event.cpu_parent)],
            event.sequence_nr,
            event.self_device_time_total if on_gpu else event.self_cpu_time_total,
            "CPU" not in str(event.device_type),
        )
        for event in seen
    ]


def by_layer(of: Sequence[Event]) -> dict[tuple[str, str], float]:
    """Return the microseconds of each layer and pass, "" where there is no pass.

    Only what ran for an iteration counts; ranges themselves are the host's time and do not.
    """
    made: dict[int, tuple[float, str]] = {}
    place = [_place(of, index) for index in range(len(of))]
    for event, (kind, name) in zip(of, place, strict=True):
        # Operations that made no node carry the number of the next one: the last has made it.
        if kind == "forward" and event.sequence >= 0:
            made[event.sequence] = max(made.get(event.sequence, (-1.0, "")), (event.start, name))
    spent: dict[tuple[str, str], float] = defaultdict(float)
    for event, (kind, name) in zip(of, place, strict=True):
        if event.kernel or event.name.startswith(PREFIX):
            continue
        if kind == "forward":
            key = (name, "" if name in _PASSLESS else "forward")
        elif kind == "node":
            layer = made.get(int(name), (0.0, OTHER))[1]
            key = (layer, "" if layer in _PASSLESS else "backward")
        else:
            continue
        spent[key] += event.own
    return dict(spent)


_PASSLESS = {OTHER, "perturb", "adam", "statistics", "operator"}


def _place(of: Sequence[Event], index: int) -> tuple[str, str]:
    """Return where an event belongs: "forward" and a layer, "node" and a number, "" if nowhere."""
    at: int | None = index
    while at is not None:
        event = of[at]
        if event.name.startswith(NODE):
            return "node", str(event.sequence)
        if event.name == STEP:
            return "forward", OTHER
        if event.name.startswith(PREFIX) and event.name != READ:
            return "forward", event.name.removeprefix(PREFIX)
        if event.name == READ:
            return "", ""
        at = event.parent
    return "", ""


def by_order(
    of: Iterable[Event], names: Sequence[str], launches: Sequence[str]
) -> dict[str, float]:
    """Return the microseconds of each launch, of kernels that run in a fixed order.

    Args:
        of: What was seen.
        names: Of the launches' kernels.
        launches: What the launches are called, in order.

    Raises:
        UnavailableError: The kernels that ran are not those of whole iterations.
    """
    own = set(names)
    kernels = sorted(
        (event for event in of if event.kernel and event.name in own), key=lambda e: e.start
    )
    if not kernels or len(kernels) % len(names):
        raise UnavailableError(
            f"profile: expected whole iterations of {len(names)} kernels, got {len(kernels)}"
        )
    spent: dict[str, float] = defaultdict(float)
    for index, event in enumerate(kernels):
        at = index % len(names)
        if event.name != names[at]:
            raise UnavailableError(
                f"profile: expected kernel {names[at]} for {launches[at]}, got {event.name}"
            )
        spent[launches[at]] += event.end - event.start
    return dict(spent)


def spans(of: Iterable[Event], name: str) -> list[tuple[float, float]]:
    """Return when the ranges of a name began and ended."""
    return [(event.start, event.end) for event in of if event.name == name and not event.kernel]


def idle(of: Iterable[Event]) -> tuple[float, int]:
    """Return the microseconds between kernels in which none ran, and the number of kernels."""
    kernels = sorted((e.start, e.end) for e in of if e.kernel and not e.name.startswith(PREFIX))
    gaps, until = 0.0, kernels[0][0] if kernels else 0.0
    for start, end in kernels:
        gaps += max(0.0, start - until)
        until = max(until, end)
    return gaps, len(kernels)


def waits(of: Sequence[Event], within: Sequence[tuple[float, float]]) -> dict[str, int]:
    """Count by name what made the host wait for the device, within some spans of time.

    The fused Adam of a CPU reads its count of steps, which lies there: that is no wait.
    """
    found: dict[str, int] = defaultdict(int)
    for event in of:
        inside = any(a <= event.start < b for a, b in within)
        if event.name in WAITS and inside and _COUNTING not in _callers(of, event):
            found[event.name] += 1
    return dict(found)


def _callers(of: Sequence[Event], event: Event) -> Iterator[str]:
    """Name what an event ran within, from the inside."""
    while event.parent is not None:
        event = of[event.parent]
        yield event.name
