"""The perturbation: a written function of (seed, fit, retry, step, position).

    noise[c, y, x] = TABLE[(o + (y W + x) C + c) mod T],    o = offset(key(seed, fit, retry), step)

TABLE holds T normal draws, the same for every fit; each step reads it from another place. A field
of more than T values repeats itself after T of them, and of 3,000 steps a handful share their
place. Nine fits paired with fresh draws differed by -0.01 dB, standard error 0.06
(bench/perturbation.py). The value does not depend on layout, tile or device, costs one contiguous
read, and needs only integer products below 2^62, so that every backend can compute it. The draws
are representable in float16.
"""

import functools

import numpy as np
import torch
from torch import Tensor

TABLE_SIZE = 1 << 22
ALIGNMENT = 8  # offsets are multiples of it, so that vector loads stay aligned
PRIME = (1 << 31) - 1
ADDEND = 0x2545F491


@functools.cache
def table() -> Tensor:
    """Return the T normal draws, [T] float32, on the CPU. Read only."""
    draws = np.random.Generator(np.random.PCG64(20180517)).standard_normal(TABLE_SIZE, np.float32)
    return torch.from_numpy(draws.astype(np.float16).astype(np.float32))


def _mix(state: int, value: int) -> int:
    """Absorb a value; x^5 permutes the integers mod 2^31 - 1 (MiMC, Albrecht et al. 2016)."""
    x = (state + value % PRIME + ADDEND) % PRIME
    square = x * x % PRIME
    return square * square % PRIME * x % PRIME


def key(seed: int, fit: int = 0, retry: int = 0) -> int:
    """Return the part of the offset's hash that does not change from step to step.

    Args:
        seed: Of the fit, at least 0.
        fit: Tells fits with one seed apart; 0 where each has its own.
        retry: How often the fit went back.
    """
    return _mix(prefix(seed, fit), retry)


def prefix(seed: int, fit: int = 0) -> int:
    """Return the key before the number of retries is absorbed."""
    state = 0
    for value in (seed, seed // PRIME, fit):
        state = _mix(state, value)
    return state


def offset(key: int, step: int) -> int:
    """Return where step `step` of the fit with this key starts to read the table: in [0, T)."""
    state = key
    for value in (step, 0, 0):
        state = _mix(state, value)
    return state % (TABLE_SIZE // ALIGNMENT) * ALIGNMENT
