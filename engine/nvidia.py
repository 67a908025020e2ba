"""What NVIDIA's driver tells about itself and its GPUs."""

import ctypes
import subprocess
from typing import Any

from flashdip.engine.attempt import attempt

_FIELDS = "driver_version,name,memory.total,compute_cap"


def survey() -> dict[str, Any] | None:
    """Return driver, cuda (the newest it supports, or None) and gpus; None without any GPU.

    Raises:
        Exception: There is no driver, or its tool is broken.
    """
    command = ("nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader")
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    cells = [[cell.strip() for cell in row.split(",")] for row in done.stdout.splitlines()]
    gpus = [
        {"name": name, "memory": memory, "compute_capability": capability}
        for _, name, memory, capability in cells
    ]
    return {"driver": cells[0][0], "cuda": attempt(cuda, None), "gpus": gpus} if gpus else None


def cuda() -> str:
    """Return the newest CUDA that the driver supports, such as "13.0".

    Raises:
        OSError: There is no driver.
    """
    version = ctypes.c_int()
    if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
        raise OSError("cuDriverGetVersion failed")
    return f"{version.value // 1000}.{version.value % 1000 // 10}"
