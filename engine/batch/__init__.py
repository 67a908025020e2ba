"""Many pictures: one queue, a worker a device, a journal; the same on one machine or on Ray.

jobs      what a job is to the driver: opened, fitted, ended
pictures  jobs that read a file, and publish a picture and its record
problems  jobs from Python, whose results come back
inputs    files, folders, globs and manifests to jobs
storage   where files are read and published: local folders, or whatever fsspec reaches
journal   what became of each job
worker    does jobs, many of one shape in one step
pool      where workers run: processes here
ray_pool  or tasks on a Ray cluster
driver    one queue to one pool, with retries
progress  the live table
summary   summary.json, summary.csv, index.html
machine   what this machine offers: devices, threads, memory
plan      what a batch needs, before it begins
watch     a folder that is served
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashdip.engine.batch.problems import run

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    """Import `run` on first use, so that the command's help does not load torch."""
    if name != "run":
        raise AttributeError(f"module 'flashdip.engine.batch' has no attribute {name!r}")
    from flashdip.engine.batch.problems import run

    return run
