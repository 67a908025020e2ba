"""The same batch on a real Ray cluster of several nodes, one of which dies in the middle."""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flashdip.engine.batch.inputs import Maker, expand
from flashdip.engine.batch.jobs import Outcome
from flashdip.engine.batch.ray_pool import RayPool
from flashdip.engine.batch.storage import Outputs
from flashdip.engine.errors import ConfigError, UnavailableError
from tests.batches import children, published, start, write_bad, write_pictures

pytest.importorskip("ray", reason="the extra 'cluster' is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Return a cluster whose head does no work; nodes are processes, each with one CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster

        small: dict[str, Any] = {"object_store_memory": 80 << 20}
        head = small | {"num_cpus": 0, "include_dashboard": False}
        cluster: Any = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(num_cpus=1, memory=2 << 30, **small)
        cluster.add_node(num_cpus=1, memory=2 << 30, **small)
        yield cluster
        cluster.shutdown()


def at_work(cluster: Any) -> list[Any]:
    """Return the nodes that run a task of ours, as the titles of their processes tell."""
    return [
        node
        for node in cluster.worker_nodes
        for raylet in node.all_processes["raylet"]
        for process in children(raylet.process.pid)
        if b"flashdip" in Path(f"/proc/{process}/cmdline").read_bytes().partition(b"/")[0]
    ]


def cut_off(cluster: Any, node: Any) -> None:
    """End a node with all that runs on it, as when the power fails."""
    raylets = [raylet.process.pid for raylet in node.all_processes["raylet"]]
    for process in [each for raylet in raylets for each in children(raylet)]:
        os.kill(process, signal.SIGKILL)  # they would outlive the node for a moment
    cluster.remove_node(node, allow_graceful=False)


def test_every_picture_arrives_though_a_node_dies(cluster: Any, tmp_path: Path) -> None:
    inputs, outputs = tmp_path / "in", tmp_path / "out"
    good, bad = write_pictures(inputs, 9), write_bad(inputs)
    options = ("--iterations", "300", "--stop", "fixed", "--ray", cluster.address)
    process = start(inputs, outputs, *options)
    until = time.monotonic() + 120
    while not (outputs.exists() and len(published(outputs)) >= 2 and at_work(cluster)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    cut_off(cluster, at_work(cluster)[0])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err  # because of the bad ones
    assert "Traceback" not in err
    assert sorted(published(outputs)) == sorted(good)
    summary = json.loads((outputs / "summary.json").read_text())
    jobs = {job["name"]: job for job in summary["jobs"]}
    assert {name for name, job in jobs.items() if job["state"] == "failed"} == set(bad)
    assert any(job["attempts"] for job in jobs.values()), "the node died without work"


def test_what_no_node_can_hold_is_refused(cluster: Any, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="expected a node with 1 CPU, 1 GPU"):
        RayPool(cluster.address, device="cuda")
    write_pictures(tmp_path / "in", 1)
    outputs = Outputs(str(tmp_path / "out"))
    maker = Maker("denoise", {"preset": "quick"}, {}, outputs)
    ((job, _),) = maker.jobs(expand([str(tmp_path / "in")], outputs))
    with closing(RayPool(cluster.address, idle=1 << 30)) as pool:
        pool.submit([replace(job, memory=1 << 50)])
        (refused,) = pool.poll(0)
        assert isinstance(refused, Outcome)
        assert "of memory" in str(refused.reason)
        assert pool.busy == 0


def test_other_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="cuda:1"):
        RayPool("auto", device="cuda:1")


def test_no_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    write_pictures(tmp_path / "in", 1)
    process = start(tmp_path / "in", tmp_path / "out", "--ray", "nonsense:address:here")
    _, err = process.communicate(timeout=120)
    assert (process.returncode, "Traceback" in err) == (2, False), err
    assert "expected a cluster at" in err
