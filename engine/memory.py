"""How much memory there is: what this process has, and what it may still take."""

import os
from pathlib import Path

import torch

_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available(device: torch.device) -> int | None:
    """Return the bytes that a fit may still take: of a GPU's memory, or of the machine's.

    On Linux that is the least of what the kernel calls available and what the limits of this
    process's control groups leave (containers, batch systems). None where nothing tells.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [room for room in (_machine(), *_groups()) if room is not None]
    return min(found, default=None)


def resident() -> int | None:
    """Return the bytes of memory that this process has now; None where nothing tells."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _machine() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    try:  # where there is no such file, all of the machine's
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _groups() -> list[int]:
    """Return what the memory limit of each control group above this process leaves."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":  # version 2, the unified hierarchy
            root, limit, usage, file = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, file = _CGROUPS / "memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # Inside a container the path may be the host's: then the root is the container's group.
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                rooms.append(_room(group, limit, usage, file))
    return [room for room in rooms if room is not None]


def _room(group: Path, limit: str, usage: str, file: str) -> int | None:
    """Return limit less usage of one group; pages of files that can be dropped are not used."""
    try:
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, most - used + int(statistics.get(file, 0)))
    except (OSError, ValueError):  # no such group, or the limit is "max"
        return None
