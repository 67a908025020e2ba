"""How long a launch would take on a GPU that is not here. Every figure from here is *modelled*.

A program's work comes from three places: from its control flow the turns of its loops and what lies
outside them (`work`), from the machine code what a turn costs (`sass`), from the launch the bytes
that cannot be avoided. A multiprocessor has four things to give: multiply-adds of its matrix units,
instructions, bytes of shared memory, bytes from the L2 cache. The programs on it share these; each
by itself waits for its own latencies, unless loads run ahead of it. Programs are dealt out to
multiprocessors as they become free; the GPU's memory and L2 cache serve all of them.

Nothing is assumed to stay in the L2 cache from one launch to the next. The model is held against
published figures for a plain matrix product (tests/kernels/fused/test_cost.py).
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flashdip.kernels.fused.inspect import Compiled
from flashdip.kernels.fused.launch import Launch
from flashdip.kernels.fused.sass import Loop
from flashdip.kernels.fused.tiles import ARCHITECTURES
from flashdip.kernels.fused.work import Array, Work, follow


@dataclass(frozen=True)
class GPU:
    """What a GPU has to give; "a cycle" is one of a multiprocessor's clock.

    Attributes:
        name: As its maker calls it.
        arch: What is compiled for it.
        processors: Multiprocessors.
        clock: Hz, the boost clock that the data sheet's rates are stated at.
        sustained: Share of that which is kept up while the matrix units are busy.
        macs: 16-bit multiply-adds with float32 sums, a cycle and multiprocessor.
        l2: Bytes a cycle from the L2 cache to all multiprocessors.
        memory: Bytes a second.
        l2_latency: Cycles.
        memory_latency: Cycles.
    """

    name: str
    arch: str
    processors: int
    clock: float
    sustained: float
    macs: int
    l2: int
    memory: float
    l2_latency: int
    memory_latency: int

    @property
    def peak(self) -> float:
        """Operations a second of the matrix units at the boost clock."""
        return 2.0 * self.macs * self.processors * self.clock


# Processors, clocks, matrix rates, memory: NVIDIA's H100, A100 and Ada architecture white papers.
# Sustained: the matrix product of largest rate that Bekman found, over the data sheet's ("Maximum
# achievable matmul FLOPS" in his "Machine learning engineering", 2025: H100 SXM 794.5 of 989, A100
# SXM 271.2 of 312 TFLOP/s); for the RTX 4090, 155.9 of 165.2 (pytorch issue 181718).
# L2: 5120 bytes a cycle in the A100 white paper; the H100 is taken to have the same, the RTX 4090
# 40 % of it: there NVIDIA states nothing. Latencies: Luo et al., "Benchmarking and dissecting the
# Nvidia Hopper GPU architecture via microbenchmarking" (2024).
GPUS = (
    GPU("H100 SXM", "sm_90", 132, 1.830e9, 0.803, 2048, 5120, 3.35e12, 263, 479),
    GPU("A100 80GB", "sm_80", 108, 1.410e9, 0.869, 1024, 5120, 2.04e12, 262, 466),
    GPU("RTX 4090", "sm_89", 128, 2.520e9, 0.944, 256, 2048, 1.008e12, 273, 542),
)

WARPS = {"sm_86": 48, "sm_89": 48, "sm_120": 48}  # that a multiprocessor holds; the others 64
SCHEDULERS = 4  # of a multiprocessor; each issues an instruction a cycle
SHARED = 128  # bytes a cycle and multiprocessor, of shared memory and of what spills
PORT = 64  # bytes a cycle from the L2 cache to one multiprocessor
STREAMED = 0.9  # of the memory's rate is reached by long streams
BARRIER = (
    30  # cycles from the first warp's arrival to the last one's departure, if they arrive at once
)
SUM = 100  # cycles of a sum across the warps of a program
START = 1000  # cycles from a program's begin to its first load and from its last store to its end
GAP = (
    1.3e-6  # seconds between launches of a CUDA graph: Hazy Research, "Look Ma, No Bubbles" (2025)
)
# Times of resources that work side by side are put together by a power mean: they are not quite
# independent. Of the exponents tried, this one comes closest to the published figures.
OVERLAP = 6


def programs_per_processor(compiled: Compiled) -> int:
    """Return how many programs a multiprocessor holds at once (NVIDIA's occupancy calculator)."""
    warps = compiled.threads // 32
    limits = ARCHITECTURES[compiled.arch]
    most_warps = WARPS.get(compiled.arch, 64)
    by_registers = 65536 // (_up(compiled.registers * 32, 256) * warps)
    by_shared = (limits.shared + 1024) // (_up(compiled.shared, 128) + 1024)
    return max(1, min(by_registers, by_shared, most_warps // warps, most_warps // 2))


def occupancy(compiled: Compiled) -> float:
    """Return the share of a multiprocessor's places for warps that are taken."""
    most_warps = WARPS.get(compiled.arch, 64)
    return programs_per_processor(compiled) * compiled.threads / 32 / most_warps


def waves(launch: Launch, compiled: Compiled) -> float:
    """Return how many times the launch's programs fill the GPU."""
    places = ARCHITECTURES[compiled.arch].processors * programs_per_processor(compiled)
    return math.prod(launch.grid) / places


def modelled_seconds(launch: Launch, compiled: Compiled, gpu: GPU) -> float:
    """Return how long a launch takes, without the gap before it."""
    arguments = [launch.arguments[name] for name in compiled.arguments]
    work = follow(compiled.ttir, launch.grid, arguments)
    clock = gpu.clock * (gpu.sustained if launch.gemm else 1.0)
    share, alone, l2 = _cycles(work, compiled, gpu)
    places = gpu.processors * programs_per_processor(compiled)
    busy = max(_makespan(share, gpu.processors), _makespan(alone, places))
    streams = (
        busy / clock,
        float(l2.sum()) / (gpu.l2 * gpu.clock),  # clocked apart from the multiprocessors
        launch.bytes / (gpu.memory * STREAMED),
    )
    tail = work.tail * (gpu.l2_latency + SUM) / gpu.clock
    return float(_mean(*map(np.asarray, streams))) + tail


def modelled_step(seconds: Sequence[float]) -> float:
    """Return how long launches take one after another in a CUDA graph, from the time of each."""
    return sum(seconds) + GAP * len(seconds)


# The least time of a step of the default network in 16 bits, in seconds, by side of the image: a
# sum over 67 launches, of each the longer of its operations at a sustained rate (800, 250, 150
# TFLOP/s) and its bytes at the memory's rate.
ROOF = {
    "H100 SXM": {256: 0.236e-3, 512: 0.886e-3, 1024: 3.483e-3},
    "A100 80GB": {256: 0.586e-3, 512: 2.248e-3, 1024: 8.895e-3},
    "RTX 4090": {256: 1.039e-3, 512: 3.959e-3, 1024: 15.64e-3},
}


def _cycles(work: Work, compiled: Compiled, gpu: GPU) -> tuple[Array, Array, Array]:
    """Return for each program its share of a multiprocessor, its time alone, its bytes from L2."""
    warps = compiled.threads // 32
    rate = gpu.macs if compiled.matrix_instructions else 32 * SCHEDULERS
    macs, issued = work.straight.copy(), work.elements / 32
    issued += 2.5 * work.straight / (16 * 8 * 16)  # a product, and loads of its operands
    shared, l2 = np.zeros_like(macs), work.bytes.copy()
    alone = START + work.rounds * gpu.memory_latency + work.sums * SUM
    loops = _matched(work, compiled.code.loops)
    for turns, done, loop in zip(work.turns, work.macs, loops, strict=True):
        macs += done
        if loop is None:
            continue
        # The compiler may have put several turns of the text into one of the code.
        turns = done / (loop.macs * warps) if loop.macs else turns
        issued += turns * loop.instructions * warps
        shared += turns * (loop.shared + loop.local) * warps
        l2 += turns * loop.loaded * warps
        ahead = (compiled.stages - 1) * (loop.copies > 0)
        wait = gpu.l2_latency * (3 if not ahead else 1)  # load, store, load again: all in a row
        once = (loop.instructions * warps / SCHEDULERS, (loop.shared + loop.local) * warps / SHARED)
        compute = np.asarray(_mean(np.asarray(loop.macs * warps / rate), *map(np.asarray, once)))
        turn = np.maximum(compute, wait / ahead) if ahead else compute + wait
        alone = alone + turns * (turn + BARRIER * loop.barriers)
    share = _mean(macs / rate, issued / SCHEDULERS, shared / SHARED, l2 / PORT)
    return share, np.maximum(alone, share), l2


def _matched(work: Work, loops: Sequence[Loop]) -> Sequence[Loop | None]:
    """Return for each loop of the text the one of the code: in order, or all like the mean one."""
    if len(loops) == len(work.turns):
        return loops
    if not loops:
        return [None] * len(work.turns)
    fields = Loop.__dataclass_fields__
    mean = {name: round(sum(getattr(loop, name) for loop in loops) / len(loops)) for name in fields}
    return [Loop(**mean)] * len(work.turns)


def _makespan(durations: Array, places: int) -> float:
    """Return when the last program ends, each taking the place that is free first, in order."""
    if np.ptp(durations) == 0:
        return float(durations[0]) * math.ceil(len(durations) / places)
    free = [0.0] * places
    for duration in durations.tolist():
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def _mean(*times: Array) -> Array:
    total: Array = sum(time**OVERLAP for time in times) ** (1 / OVERLAP)
    return total


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
