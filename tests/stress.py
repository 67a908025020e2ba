"""The long versions of tests that pytest runs shortly: `make stress`, or one by its name.

    python tests/stress.py [kills] [memory] [throughput]

kills: 50 processes of a batch, workers and drivers, are killed at random moments; nothing may be
lost, made again or half-written. memory: a worker's peak within 15 % of the plan. throughput: 200
pictures of 64x64 in a batch against one after another in one process, both with all cores; to be
run on a quiet machine.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.batches import Killing, published, write_bad, write_pictures

KILLS = 50
QUICK = ("--preset", "quick", "--sigma", "20", "--stop", "fixed")

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
    parts = {part.__name__: part for part in (kills, memory, throughput)}
    for name in sys.argv[1:] or parts:
        with tempfile.TemporaryDirectory() as folder:
            parts[name](Path(folder))


if __name__ == "__main__":
    main()
