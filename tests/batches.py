"""A batch of tiny fits as a person would run it, and what must hold whatever is killed when."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

TINY = (
    *("--preset", "quick", "--set", "network.down=8,8", "--set", "network.inputs=4"),
    *("--set", "read_every=2", "--precision", "fp32", "--sigma", "20", "--quiet"),
)
BAD = {"empty.png": b"", "text.png": b"no picture", "cut.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0"}


def write_pictures(folder: Path, count: int) -> list[str]:
    """Write noisy pictures of three sizes, some of them in a folder below; return their names."""
    names = []
    for index in range(count):
        height, width = ((16, 16), (16, 24), (32, 32))[index % 3]
        y, x = np.mgrid[:height, :width] / width
        clean = 60 + 150 * np.stack([x, y, (x + y) / 2], axis=2)
        noise = np.random.default_rng(index).normal(0, 20, clean.shape)
        name = f"below/{index}.png" if index % 4 == 0 else f"{index}.png"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(clean + noise, 0, 255).astype(np.uint8)).save(path)
        names.append(name)
    return names


def write_bad(folder: Path) -> list[str]:
    """Write files that are no pictures; return their names."""
    for name, data in BAD.items():
        (folder / name).write_bytes(data)
    return list(BAD)


def command(inputs: Path, outputs: Path, *more: str) -> list[str]:
    """Return the command line of a batch."""
    start = [sys.executable, "-m", "flashdip.cli", "batch", str(inputs), "-o", str(outputs)]
    return [*start, *TINY, *more]


def start(
    inputs: Path, outputs: Path, *more: str, environment: dict[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Start a batch in a process of its own."""
    return subprocess.Popen(
        command(inputs, outputs, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | (environment or {}),
    )


def children(process: int) -> list[int]:
    """Return the processes that a process started."""
    try:
        text = Path(f"/proc/{process}/task/{process}/children").read_text()
    except OSError:
        return []
    return [int(each) for each in text.split()]


def alive(process: int) -> bool:
    """Tell whether a process is there and not dead already."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def published(outputs: Path) -> dict[str, tuple[int, str]]:
    """Return time and hash of each published picture, after checking that all of it is whole.

    What a batch has not finished may lie in its own folder; everywhere else each file is a picture
    that its record describes, a record, or a summary.
    """
    found = {}
    for path in outputs.rglob("*"):
        inside = path.relative_to(outputs)
        if path.is_dir() or inside.parts[0] == ".flashdip":
            continue
        if path.suffix in (".json", ".csv", ".html"):
            assert path.read_bytes(), path
            if path.suffix == ".json":
                json.loads(path.read_text())
            continue
        assert path.suffix == ".png", path
        data = path.read_bytes()
        record = json.loads(path.with_name(f"{path.name}.json").read_text())
        digest = hashlib.sha256(data).hexdigest()
        if record["sha256"] == digest:  # else it is about to be replaced
            with Image.open(path) as image:
                image.load()
            found[str(inside)] = (path.stat().st_mtime_ns, digest)
    return found


@dataclass
class Killing:
    """Runs a batch again and again, kills what it likes, and checks that nothing is lost.

    Attributes:
        inputs, outputs: Folders.
        chance: Decides what is killed when.
        kept: What was published so far.
        kills: How many processes were killed.
    """

    inputs: Path
    outputs: Path
    chance: random.Random
    more: tuple[str, ...] = ()
    kept: dict[str, tuple[int, str]] = field(default_factory=dict)
    kills: int = 0

    def check(self) -> None:
        """Check that what was published is still there, and was not made again."""
        found = published(self.outputs)
        for name, stamp in self.kept.items():
            assert found.get(name) == stamp, f"{name} was lost or made again"
        self.kept = found

    def round(self, workers: int, longest: float) -> None:
        """Start the batch, kill some workers, then the driver; all at random moments.

        Args:
            workers: How many of them to kill.
            longest: Seconds between two kills, at most.
        """
        process = start(self.inputs, self.outputs, *self.more)
        try:
            seen: set[int] = set()
            for _ in range(workers):
                until = time.monotonic() + 60
                while not children(process.pid) and process.poll() is None:
                    assert time.monotonic() < until, "no worker was started"
                    time.sleep(0.05)
                time.sleep(self.chance.uniform(0, longest))
                there = children(process.pid)
                seen.update(there)
                if there:
                    self._kill(self.chance.choice(there))
            time.sleep(self.chance.uniform(0, longest))
            seen.update(children(process.pid))
            if process.poll() is None:
                self._kill(process.pid)
        finally:
            process.kill()
            process.communicate()
        until = time.monotonic() + 20
        while any(map(alive, seen)):
            assert time.monotonic() < until, "workers outlive their driver"
            time.sleep(0.05)
        self.check()

    def finish(self) -> int:
        """Run the batch to its end; return its exit code."""
        process = start(self.inputs, self.outputs, *self.more)
        _, err = process.communicate(timeout=300)
        assert "Traceback" not in err, err
        self.check()
        return process.returncode

    def _kill(self, process: int) -> None:
        try:
            os.kill(process, signal.SIGKILL)
            self.kills += 1
        except ProcessLookupError:
            pass
