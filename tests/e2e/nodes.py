"""A Ray cluster of several nodes on this machine, as a child process that is told what to do.

Run as a program it starts a head and one node of each kind named on its command line, prints the
cluster's address, and then obeys its standard input: `kill KIND` ends that node with SIGKILL,
`down` the head's GCS, `up` starts it anew from what it kept on disk (Ray's RocksDB storage).
Everything ends when its input does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

_SECRET = "a secret for the tests of several nodes"


class Nodes:
    """The cluster as seen by a test: `with Nodes("a", "b") as nodes: ... nodes.kill("b")`.

    A node of kind K offers 8 CPUs and 8 of the custom resource K.
    """

    def __init__(self, *kinds: str) -> None:
        self._folder = tempfile.mkdtemp(prefix="rmn")
        self.env = {"RAY_AUTH_MODE": "disabled", "RAYMOE_SECRET": _SECRET}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.nodes", self._folder, *kinds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={
                **os.environ,
                **self.env,
                "OMP_NUM_THREADS": "1",
                "RAY_worker_niceness": "0",
                "RAY_SERVE_ENABLE_HA_PROXY": "0",
                # a node that is killed is to be noticed within seconds
                "RAY_health_check_initial_delay_ms": "0",
                "RAY_health_check_period_ms": "500",
                "RAY_health_check_timeout_ms": "5000",
                "RAY_health_check_failure_threshold": "6",
                "RAY_gcs_storage": "rocksdb",
                "RAY_gcs_storage_path": str(Path(self._folder) / "gcs"),
            },
        )
        self.address = self._answer()

    def kill(self, kind: str) -> None:
        """SIGKILLs the node's raylet and everything that runs on it."""
        self._tell(f"kill {kind}")
        assert self._answer() == "done"

    def head_down(self) -> None:
        """SIGKILLs the cluster's GCS; raylets and workers live on."""
        self._tell("down")
        assert self._answer() == "done"

    def head_up(self) -> None:
        """Starts it again, with its state of before, at the same address."""
        self._tell("up")
        assert self._answer() == "done"

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *error: object) -> None:
        tree = psutil.Process(self._process.pid).children(recursive=True)
        try:
            self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for process in psutil.wait_procs(tree, timeout=5)[1]:
            process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, _, value = line.strip().partition(" ")
            if word == "raymoe-nodes:":
                return value
        raise AssertionError("the cluster of several nodes ended by itself")


def main(folder: str, *kinds: str) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 8,
            "resources": {"head": 8},
            "temp_dir": folder,
            "include_dashboard": False,
            "object_store_memory": 100 << 20,
        },
    )
    nodes = {
        kind: cluster.add_node(num_cpus=8, resources={kind: 8}, object_store_memory=100 << 20)
        for kind in kinds
    }
    print("raymoe-nodes:", cluster.address, flush=True)
    for line in sys.stdin:
        order, *kinds_named = line.split()
        if order == "down":
            cluster.head_node.kill_gcs_server()
        elif order == "up":
            cluster.head_node.start_gcs_server()
        else:
            _kill(cluster, nodes.pop(kinds_named[0]))
        print("raymoe-nodes: done", flush=True)
    cluster.shutdown()


def _kill(cluster: Any, node: Any) -> None:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    workers = raylet.children(recursive=True)
    cluster.remove_node(node, allow_graceful=False)
    for process in workers:
        if process.is_running():
            process.kill()


if __name__ == "__main__":
    main(*sys.argv[1:])
