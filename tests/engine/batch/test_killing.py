"""Whatever is killed when, and with the disk full: nothing is lost, made twice, or half-written."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from tests.batches import Killing, children, published, start, write_bad, write_pictures

FAST = ("--workers", "2", "--iterations", "60", "--stop", "fixed")


def test_random_kills_lose_nothing(tmp_path: Path) -> None:
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    good, bad = write_pictures(inputs, 10), write_bad(inputs)
    more = ("--workers", "2", "--iterations", "300", "--stop", "fixed")
    killing = Killing(inputs, outputs, random.Random(3), more)
    for workers, longest in ((1, 0.5), (2, 2.0), (1, 4.0)):  # while they load; later; in the fits
        killing.round(workers, longest)
    assert killing.kills >= 3
    assert killing.finish() == 1  # because of the bad ones
    assert sorted(published(outputs)) == sorted(good)

    summary = json.loads((outputs / "summary.json").read_text())
    states = {job["name"]: job["state"] for job in summary["jobs"]}
    assert sorted(states) == sorted([*good, *bad])
    assert all((states[name] == "failed") == (name in bad) for name in states)
    assert all(job["reason"] for job in summary["jobs"] if job["name"] in bad)
    assert summary["complete"]
    assert not list((outputs / ".flashdip" / "staging").iterdir())


def test_a_poisonous_picture_is_given_up_and_the_rest_go_on(tmp_path: Path) -> None:
    """Each worker that takes it is killed: as by the system when memory runs out."""
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    good = write_pictures(inputs, 3)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import builtins, os, pathlib, signal\n"
        "read = pathlib.Path.read_bytes\n"
        "def deadly(path):\n"
        "    if path.name == '1.png' and path.parent.name == 'in':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return read(path)\n"
        "pathlib.Path.read_bytes = deadly\n"
    )
    hook = {"PYTHONPATH": str(tmp_path / "hook")}
    process = start(inputs, outputs, *FAST, environment=hook)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert sorted(published(outputs)) == sorted(name for name in good if name != "1.png")
    jobs = {job["name"]: job for job in json.loads((outputs / "summary.json").read_text())["jobs"]}
    assert jobs["1.png"]["state"] == "failed"
    assert "3 attempts" in jobs["1.png"]["reason"]
    assert "SIGKILL" in jobs["1.png"]["reason"]


def tmpfs(folder: Path, size: int) -> bool:
    """Mount a small disk at a folder, where that is allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        return False


FULL = """
import errno, os
sync = os.fsync
def full(number):
    if os.path.exists({flag!r}) and os.readlink(f"/proc/self/fd/{{number}}").startswith({disk!r}):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return sync(number)
os.fsync = full
"""


def test_a_full_disk_ends_the_batch_in_one_line_and_the_same_command_goes_on(
    tmp_path: Path,
) -> None:
    inputs, disk = tmp_path / "in", tmp_path / "disk"
    good = write_pictures(inputs, 6)
    flag, hook = tmp_path / "full", tmp_path / "hook"
    hook.mkdir()
    outputs, ballast, environment = disk / "out", disk / "ballast", dict[str, str]()
    rooms = [40 << 10, 140 << 10]  # for not even the journal; for it, not for all pictures
    real = tmpfs(disk, 1 << 20)
    if not real:
        (hook / "sitecustomize.py").write_text(FULL.format(flag=str(flag), disk=str(disk)))
        environment, rooms = {"PYTHONPATH": str(hook)}, [0]
        flag.touch()
    try:
        before: dict[str, tuple[int, str]] = {}
        for room in rooms:
            if real:
                ballast.unlink(missing_ok=True)
                used = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
                ballast.write_bytes(bytes((1 << 20) - used - room))
            process = start(inputs, outputs, *FAST, environment=environment)
            _, err = process.communicate(timeout=120)
            assert process.returncode == 2, err
            assert err.count("\n") == 1, err
            assert "disk is full" in err
            found = published(outputs)
            assert before.items() <= found.items()
            before = found
        (ballast if real else flag).unlink()
        process = start(inputs, outputs, *FAST, environment=environment)
        _, err = process.communicate(timeout=120)
        assert (process.returncode, err) == (0, "")
        after = published(outputs)
        assert sorted(after) == sorted(good)
        assert before.items() <= after.items()
    finally:
        if real:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def test_ctrl_c_stops_at_once_and_the_second_run_goes_on(tmp_path: Path) -> None:
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    good = write_pictures(inputs, 6)
    process = start(inputs, outputs, *FAST)
    until = time.monotonic() + 60
    while not published(outputs) if outputs.exists() else True:
        assert time.monotonic() < until
        time.sleep(0.02)
    workers = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert not any(os.path.exists(f"/proc/{worker}") for worker in workers)
    before = published(outputs)
    with sqlite3.connect(outputs / ".flashdip" / "journal.sqlite") as base:
        states = {state for (state,) in base.execute("SELECT state FROM jobs")}
    base.close()
    assert "running" not in states
    process = start(inputs, outputs, *FAST)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    after = published(outputs)
    assert sorted(after) == sorted(good)
    assert before.items() <= after.items()


@pytest.mark.parametrize("more", [(), ("--journal", "other.sqlite")])
def test_a_second_driver_is_refused(tmp_path: Path, more: tuple[str, ...]) -> None:
    import fcntl

    inputs, outputs = tmp_path / "in", tmp_path / "out"
    write_pictures(inputs, 1)
    (outputs / ".flashdip").mkdir(parents=True)
    with (outputs / ".flashdip" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(inputs, outputs, *FAST, *more)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err.count("\n")) == (2, 1)
    assert "in use" in err
