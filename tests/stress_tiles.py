"""A 24-megapixel photograph within 6 GB on 2 cores, and tiles against the whole: `make stress`.

Run as `python tests/stress_tiles.py [ITERATIONS]`. The first picture gets a few iterations only, as
memory does not depend on them; the second one is fitted in earnest.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage import data

LIMIT = 6_000_000_000
HEIGHT, WIDTH = 4000, 6000
# Runs the command line and prints what it took of memory at most.
RUN = """
import json, resource, sys
from flashdip import cli
try:
    cli.main()
finally:
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"most": used}), file=sys.stderr)
"""


def flashdip(*arguments: str) -> tuple[dict[str, Any], int]:
    """Run a command in a process of its own; return its record, and its peak memory in bytes."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", RUN, *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"flashdip {' '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout), int(json.loads(done.stderr.splitlines()[-1])["most"])


def photograph(height: int, width: int) -> np.ndarray:
    """Return a noisy photograph of any size: one of scikit-image's, enlarged."""
    small = Image.fromarray(data.astronaut())
    large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
    large += np.random.default_rng(0).normal(0, 25, large.shape).astype(np.float32)
    pixels: np.ndarray = np.clip(large, 0, 255).astype(np.uint8)
    return pixels


def large_picture(folder: Path, iterations: int) -> None:
    """Restore 24 megapixels, and hold the process to its limit."""
    Image.fromarray(photograph(HEIGHT, WIDTH)).save(folder / "large.png", compress_level=1)
    options = ("--preset", "quick", "--sigma", "25", "--memory", "6GB", "--device", "cpu")
    count = ("--iterations", str(iterations))
    names = (str(folder / "large.png"), "-o", str(folder / "large.tif"))
    record, used = flashdip("denoise", *names, *options, *count)
    tiles = record["tiles"]
    print(
        f"{WIDTH}x{HEIGHT}: {tiles['grid'][0]} x {tiles['grid'][1]} tiles of {tiles['side']}, "
        f"{sum(tiles['iterations'])} iterations in {record['seconds_fit']:.0f} s, "
        f"agreement {tiles['agreement_db']:.1f} dB, peak {used / 1e9:.2f} GB of 6 GB"
    )
    if used > LIMIT:
        sys.exit(f"stress: expected at most {LIMIT} bytes of memory, got {used}")


def tiled_against_whole(folder: Path) -> None:
    """Denoise one picture both ways; the tiles may lose 0.3 dB."""
    clean = data.astronaut()[:256, 80:336]
    noisy = clean + np.random.default_rng(0).normal(0, 25, clean.shape)
    Image.fromarray(clean).save(folder / "clean.png")
    Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(folder / "noisy.png")
    found = []
    for name, tile in (("whole", ()), ("tiled", ("--tile", "144"))):
        names = (str(folder / "noisy.png"), "-o", str(folder / f"{name}.png"))
        options = ("--preset", "quick", "--sigma", "25", "--truth", str(folder / "clean.png"))
        record, _ = flashdip("denoise", *names, *options, *tile)
        found.append(float(record["psnr"]))
        print(f"{name}: {record['psnr']:.2f} dB after {record['iterations']} iterations")
    if found[1] < found[0] - 0.3:
        sys.exit(f"stress: expected at most 0.3 dB less in tiles than {found[0]}, got {found[1]}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        large_picture(Path(temporary), int(sys.argv[1]) if len(sys.argv) > 1 else 20)
        tiled_against_whole(Path(temporary))
