"""A Ray cluster that grows and shrinks by itself, on this machine, as a child process.

Ray's autoscaler (v2) runs with the node types that it would read from an overlay of k8s/, and with
Ray's fake provider, whose nodes are raylets on this machine, in place of KubeRay's. Not with
`ray.cluster_utils.AutoscalingCluster`: that runs `ray stop --force`, which ends every Ray here.

Run as a program it prints the cluster's address and then obeys its standard input: `nodes` lists
the worker nodes that are alive as JSON, `drain NODE` tells Ray that one is to go, as SIGTERM to its
pod would, `kill NODE` ends one with SIGKILL. Everything ends when its input does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from actors.local import free_port

_PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
_HEAD_TYPE = "ray.head.default"  # what the fake provider calls it
_HEAD_ID = "f" * 51 + "00000"
_STORE_BYTES = 80 << 20
DRAIN_S = 120
_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_worker_niceness": "0",
    "OMP_NUM_THREADS": "1",
    # a node that is killed is to be noticed within seconds
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "6",
}


def autoscaling_config(cluster: dict[str, Any], gcs: str, idle_s: float) -> dict[str, Any]:
    """What Ray's autoscaler makes of a RayCluster's spec, for the fake provider."""
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr as derive,
    )

    config: dict[str, Any] = derive({"metadata": {"name": "c", "namespace": "n"}, "spec": cluster})
    types = config["available_node_types"]
    types[_HEAD_TYPE] = types.pop(config["head_node_type"])
    for node_type in types.values():
        resources = node_type["resources"]
        resources.pop("memory", None)  # this machine does not have what the pods would
        resources["object_store_memory"] = _STORE_BYTES
    config["head_node_type"] = _HEAD_TYPE
    config["idle_timeout_minutes"] = idle_s / 60
    config["provider"] = {
        "type": "external",
        "module": _PROVIDER,
        "gcs_address": gcs,
        "head_node_id": _HEAD_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
        "foreground_node_launch": True,
    }
    return config


class Cloud:
    """The cluster as seen by a test: `with Cloud(spec_of_a_raycluster) as cloud: ...`."""

    def __init__(self, cluster: dict[str, Any], secret: str, idle_s: float = 4.0) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rmc"))
        self.env = {"RAY_AUTH_MODE": "disabled", "RAYMOE_SECRET": secret}
        gcs = f"127.0.0.1:{free_port()}"
        config = autoscaling_config(cluster, gcs, idle_s)
        (self._folder / "autoscaling.json").write_text(json.dumps(config))
        self._log = (self._folder / "log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.cloud", str(self._folder), gcs],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, **_ENVIRONMENT, **self.env},
        )
        self.address: str = self._answer()

    def nodes(self) -> dict[str, str]:
        """Worker nodes that are alive: Ray's id -> label raymoe-pool."""
        found: dict[str, str] = self._ask("nodes")
        return found

    def pools(self) -> list[str]:
        """The pools of the worker nodes that are alive, in order."""
        return sorted(self.nodes().values())

    def drain(self, node: str) -> None:
        """Tells Ray that the node will go within `DRAIN_S`."""
        assert self._ask(f"drain {node}") == "done"

    def kill(self, node: str) -> None:
        """SIGKILLs the node's raylet and everything below it."""
        assert self._ask(f"kill {node}") == "done"

    def await_pools(self, wanted: list[str], limit_s: float) -> float:
        """Seconds until the worker nodes are of these pools."""
        began = time.monotonic()
        seen: list[list[str]] = []
        while time.monotonic() - began < limit_s:
            now = self.pools()
            if now == sorted(wanted):
                return time.monotonic() - began
            if now not in seen:
                seen.append(now)
            time.sleep(0.5)
        raise AssertionError(f"nodes of {sorted(wanted)} wanted, seen were {seen}")

    def __enter__(self) -> Cloud:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        tree = psutil.Process(self._process.pid).children(recursive=True)
        try:
            self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for process in psutil.wait_procs(tree, timeout=5)[1]:
            process.kill()
        self._log.close()
        if error is not None:
            for log in sorted(self._folder.glob("r/session_latest/logs/monitor*")):
                print(f"---- {log.name}\n{log.read_text()[-4000:]}")
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, _, value = line.strip().partition(" ")
            if word == "raymoe-cloud:":
                return json.loads(value)
        raise AssertionError((self._folder / "log").read_text()[-4000:])


def node_of(pid: int) -> str:
    """Id of the node that a process of Ray's runs on: its raylet is above it."""
    above = psutil.Process(pid).parents()
    (raylet,) = [process for process in above if process.name() == "raylet"]
    return raylet.environ()["RAY_CLOUD_INSTANCE_ID"]


def _raylets(root: psutil.Process) -> Iterator[tuple[str, psutil.Process]]:
    """(node id, process) of every raylet below `root`."""
    for process in root.children(recursive=True):
        try:
            if process.name() == "raylet":
                yield process.environ().get("RAY_CLOUD_INSTANCE_ID", ""), process
        except psutil.Error:
            continue


def _drain(gcs: str, node: str) -> None:
    """What `ray start --block` does when its pod gets SIGTERM."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    accepted, why = GcsClient(address=gcs).drain_node(
        node,
        autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION,
        "its pod got SIGTERM",
        int((time.time() + DRAIN_S) * 1000),
        timeout=10,
    )
    assert accepted, why


def _say(value: Any) -> None:
    print("raymoe-cloud:", json.dumps(value), flush=True)


def main(folder: str, gcs: str) -> None:
    import ray

    with Path(folder, "autoscaling.json").open() as file:
        head_resources = json.load(file)["available_node_types"][_HEAD_TYPE]["resources"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--port={gcs.partition(':')[2]}", "--node-ip-address=127.0.0.1"]
    command += [f"--num-cpus={head_resources['CPU']}", f"--object-store-memory={_STORE_BYTES}"]
    command += [f"--autoscaling-config={folder}/autoscaling.json", f"--temp-dir={folder}/r"]
    command += ["--include-dashboard=false", "--disable-usage-stats"]
    head = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=sys.stderr)
    root = psutil.Process(head.pid)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                ray.init(address=gcs, log_to_driver=False, logging_level="ERROR")
                break
            except ConnectionError:
                if head.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
        _say(gcs)
        for line in sys.stdin:
            order, _, node = line.strip().partition(" ")
            if order == "kill":
                (raylet,) = [process for name, process in _raylets(root) if name == node]
                for process in [raylet, *raylet.children(recursive=True)]:
                    process.kill()
                _say("done")
            elif order == "drain":
                _drain(gcs, node)
                _say("done")
            else:
                alive = [n for n in ray.nodes() if n["Alive"] and "raymoe-pool" in n["Labels"]]
                _say({n["NodeID"]: n["Labels"]["raymoe-pool"] for n in alive})
        ray.shutdown()
    finally:
        tree = [root, *root.children(recursive=True)]
        for process in tree:
            process.kill()
        psutil.wait_procs(tree, timeout=5)


if __name__ == "__main__":
    main(*sys.argv[1:])
