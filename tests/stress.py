"""The long versions of tests that pytest runs shortly: `make stress`, or one by its name.

    python tests/stress.py [kills] [memory] [fits] [throughput]

kills: 50 processes of a batch, workers and drivers, are killed at random moments; nothing may be
lost, made again or half-written. memory: a worker's peak within 15 % of the plan. fits: the
same of a single fit, on each backend. throughput: 200 pictures of 64x64 in a batch against one
after another in one process, both with all cores; to be run on a quiet machine.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from flashdip.engine.config import FitConfig
from flashdip.engine.networks.skip import SkipConfig
from flashdip.engine.planning import plan
from flashdip.kernels import noise

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.batches import Killing, published, write_bad, write_pictures

KILLS = 50
QUICK = ("--preset", "quick", "--sigma", "20", "--stop", "fixed")

SIDE = 448  # pixels of the picture whose fit is weighed
FITTED = (("native", "fp32"), ("native", "bf16"), ("reference", "fp32"), ("onnx", "fp32"))
NARROW = FitConfig(
    network=SkipConfig(inputs=8, down=(16, 16, 16), skip=2, upsample="nearest"),
    iterations=6,
    read_every=2,
    window=2,
    stop=("es-wmv",),
)
# The growth of a fresh process by a fit, after a small one has brought all that is taken once.
MEASURE = """
import json, sys
from dataclasses import replace
import torch
from flashdip.engine.config import FitConfig
from flashdip.engine.fit import fit
from flashdip.engine.memory import resident
from flashdip.engine.problems import Problem

backend, side, record = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
config = FitConfig.from_record(record)
def problem(side):
    return Problem(torch.rand(1, 3, side, side), (3, side, side))
fit(problem(32), replace(config, iterations=2), backend=backend, device="cpu")
large = problem(side)
before = resident()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
fit(large, config, backend=backend, device="cpu")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024 - before)
"""

ONE_BY_ONE = """
import pathlib, sys
import flashdip
inputs, outputs, iterations = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
for path in sorted(inputs.iterdir()):
    result = flashdip.denoise(path, preset="quick", sigma=20, stop="fixed", iterations=iterations)
    result.write(outputs / path.name)
"""


def kills(folder: Path, seed: int = 0) -> None:
    """Kill 50 processes of a batch that is started again and again."""
    inputs, outputs = folder / "in", folder / "out"
    good, bad = write_pictures(inputs, 150), write_bad(inputs)
    chance = random.Random(seed)
    killing = Killing(inputs, outputs, chance, ("--workers", "2", "--iterations", "300"))
    while killing.kills < KILLS:
        killing.round(workers=chance.randint(0, 3), longest=6.0)
        print(f"{killing.kills} killed, {len(killing.kept)} of {len(good)} published", flush=True)
    assert killing.finish() == 1
    assert sorted(published(outputs)) == sorted(good)
    jobs = json.loads((outputs / "summary.json").read_text())["jobs"]
    assert {job["name"] for job in jobs if job["state"] == "failed"} == set(bad)
    print(f"{killing.kills} kills lost nothing: {len(good)} published, {len(bad)} refused")


def memory(folder: Path) -> None:
    """Compare a worker's peak with the plan, for pictures of two sizes in two precisions."""
    for side in (128, 384):
        _noisy(folder / f"in{side}", 2, side)
        for precision in ("fp32", "bf16"):
            more = ("--precision", precision, "--iterations", "12", *QUICK)
            command = _batch(folder / f"in{side}", folder / f"out{side}{precision}", *more)
            plan = json.loads(subprocess.check_output([*command, "--dry-run"]))
            summary = json.loads(subprocess.check_output(command))
            planned = max(group["memory_bytes"] for group in plan["groups"])
            peak = max(job["peak_memory_bytes"] for job in summary["jobs"])
            print(f"{side}x{side} {precision}: {planned / 1e6:.0f} MB planned, {peak / 1e6:.0f} MB "
                  f"taken, {peak / planned - 1:+.1%}")  # fmt: skip
            assert abs(peak / planned - 1) <= 0.15


def fits(folder: Path) -> None:
    """Compare the growth of a process by a fit with the plan, the median of five each."""
    for backend, precision in FITTED:
        config = replace(NARROW, precision=precision)  # type: ignore[arg-type]
        command = [sys.executable, "-c", MEASURE, backend, str(SIDE), json.dumps(config.record())]
        taken = statistics.median(int(subprocess.check_output(command)) for _ in range(5))
        found = plan(config, (3, SIDE, SIDE), backend=backend, device="cpu", timed=False)
        # The small fit has brought the table of draws; each graph of ONNX holds its own.
        brought = 0 if backend == "onnx" else 4 * noise.TABLE_SIZE
        planned = found.memory_bytes - brought
        print(f"{backend} {precision}: {planned / 1e6:.0f} MB planned, {taken / 1e6:.0f} MB taken, "
              f"{taken / planned - 1:+.1%}")  # fmt: skip
        assert abs(taken / planned - 1) <= 0.15


def throughput(folder: Path) -> None:
    """Compare a batch of 200 small pictures with one after another in one process."""
    count, iterations = 200, 100
    # Each is to choose its threads itself.
    free = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    _noisy(folder / "in", count, 64)
    options = ("--iterations", str(iterations), *QUICK)
    begun = time.perf_counter()
    command = _batch(folder / "in", folder / "out", *options)
    subprocess.run(command, check=True, capture_output=True, env=free)
    batch = time.perf_counter() - begun
    (folder / "one").mkdir()
    begun = time.perf_counter()
    places = [str(folder / "in"), str(folder / "one"), str(iterations)]
    subprocess.run([sys.executable, "-c", ONE_BY_ONE, *places], check=True, env=free)
    alone = time.perf_counter() - begun
    print(
        f"{count} pictures of 64x64, {iterations} iterations: {batch:.1f} s in a batch, "
        f"{alone:.1f} s one after another: {alone / batch:.2f} times the throughput"
    )


def _noisy(folder: Path, count: int, side: int) -> None:
    folder.mkdir()
    y, x = np.mgrid[:side, :side] / side
    clean = 60 + 150 * np.stack([x, y, (x + y) / 2], axis=2)
    for index in range(count):
        noise = np.random.default_rng(index).normal(0, 20, clean.shape)
        pixels = np.clip(clean + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")


def _batch(inputs: Path, outputs: Path, *more: str) -> list[str]:
    start = [sys.executable, "-m", "flashdip.cli", "batch", str(inputs), "-o", str(outputs)]
    return [*start, "--quiet", "--json", *more]


def main() -> None:
    """Run what the arguments name, or everything."""
    parts = {part.__name__: part for part in (kills, memory, fits, throughput)}
    for name in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder))


if __name__ == "__main__":
    main()
