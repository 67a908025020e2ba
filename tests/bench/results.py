"""Made-up results, as `flashdip bench` writes them."""

import math
from typing import Any

import numpy as np

from flashdip.bench import schema
from flashdip.bench.measure import summarise
from flashdip.bench.suite import row

MACHINE: dict[str, Any] = {
    "hardware": {
        "system": "Linux x86_64",
        "cpu": "a CPU",
        "cores": 2,
        "memory_gib": 8,
        "device": "a CPU",
        "device_memory_gib": None,
    },
    "software": {"torch": "2.13.0", "flashdip": "0.1.0", "threads": 2, "commit": "abc"},
}
STATE: dict[str, Any] = {
    "load": 0.1,
    "clock_mhz": 2600,
    "memory_clock_mhz": None,
    "temperature_c": None,
    "power_w": None,
    "throttled": [],
}
SECONDS = {"published": 1.06, "published + host work": 1.12, "reference": 1.9, "native": 0.72}


def steps(
    seed: int, *, rounds: int = 12, slower: dict[str, float] | None = None, spread: float = 0.03
) -> dict[str, Any]:
    """Make up a result of the kind "step", with the noise of a shared machine of two cores.

    A run as a whole is a few per cent faster or slower than another one, a round than other rounds,
    a sample than others of its round; a row keeps an offset through a run, from how its memory
    happens to lie; and one sample in thirty was disturbed by something else.

    Args:
        seed: Of the noise.
        rounds: Samples of each row.
        slower: Factors on the seconds of rows.
        spread: Standard deviation of rounds, relative.
    """
    draw = np.random.default_rng(seed)
    mood = math.exp(draw.normal(0, 0.03)) * np.exp(draw.normal(0, spread, rounds))
    samples = {}
    for name, seconds in SECONDS.items():
        own = seconds * (slower or {}).get(name, 1.0) * math.exp(draw.normal(0, 0.007))
        noise = np.exp(draw.normal(0, 0.6 * spread, rounds))
        disturbed = np.where(draw.random(rounds) < 1 / 30, 1.4, 1.0)
        samples[name] = own * mood * noise * disturbed
    rows = []
    for name, taken in samples.items():
        ratio = float(np.median(samples["published"] / taken))
        parameters = {"precision": "fp32", "size": 256, "fits": 1, "network": "published-denoise"}
        rows.append(row(name, parameters, summarise(taken.tolist(), ratio), "published"))
    found = {"results": rows, "left_out": {}}
    return schema.document("step", MACHINE, STATE, STATE, None, found)


def score(rate: float, device: str = "a GPU", ratio: float | None = 5.0) -> dict[str, Any]:
    """Make up a result of the kind "gpu"."""
    parameters = {"precision": "fp16", "size": 512, "fits": 4, "network": "balanced"}
    fast = row("ours", parameters, summarise([0.001] * 3, ratio), "published")
    base = row("published", {}, summarise([0.005] * 3, 1.0), "published")
    hardware = MACHINE["hardware"] | {"device": device, "device_memory_gib": 80}
    return schema.document(
        "gpu",
        MACHINE | {"hardware": hardware},
        STATE,
        STATE,
        {"copy": 3e12, "product": {"fp16": 8e14}},
        {"results": [base, fast], "left_out": {}},
        {
            "restorations_per_hour": rate,
            "size": 512,
            "preset": "balanced",
            "iterations": 900,
            "backend": "triton",
            "precision": "fp16",
            "fits": 4,
            "iterations_per_second": {"256": 3000.0, "512": 900.0},
            "watts": 600.0,
            "sustained": {"seconds": 30.0, "samples": [900.0, 890.0], "kept": 0.99},
        },
    )
