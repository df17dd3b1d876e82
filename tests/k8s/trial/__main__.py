"""An upgrade of the overlay `local` on this machine, under requests that must not fail.

    sudo .venv/bin/python -m tests.k8s.trial

Two Ray clusters one after the other, their pods in namespaces of their own. What KubeRay's operator
does is done here: the Serve config goes to the dashboard with Ray's token; once Serve calls the
second application RUNNING the Service leads there; later the first cluster's pods get SIGTERM.
Takes about five minutes on two cores; 10.79.0.0/24 must be free.
"""

from __future__ import annotations

import copy
import json
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s.overlays import Doc, build, cluster_of, of_kind
from tests.k8s.rules_serve import serve_config
from tests.k8s.trial.clients import Load, Service
from tests.k8s.trial.kuberay import TOKEN
from tests.k8s.trial.pod import BRIDGE, NETWORK, Pod, run

_BEGAN = time.monotonic()
_APPLICATIONS = "/api/serve/applications/"
_BESIDE_S = 25.0  # both clusters run: what is open on the old one ends there
_DRAIN_LIMIT_S = 330.0


def say(*words: object) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f}]", *words, flush=True)


def wait_until(holds: Callable[[], bool], limit_s: float, what: str) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {limit_s:.0f} s: {what}")
        time.sleep(0.2)


class Cluster:
    """A Ray cluster's pods, and its dashboard as the operator uses it."""

    def __init__(self, name: str, docs: list[Doc], first: int, pods: list[Pod]) -> None:
        """`first` ends the head's address; all pods are put into `pods` too, to be removed."""
        self.name, self._docs = name, docs
        cluster = cluster_of(docs)
        head = Pod(name, "head", first, cluster["headGroupSpec"], None)
        self.pods = [head]
        pods.append(head)
        wait_until(lambda: head.ready, 90, f"the head of {name} is ready")
        for group in cluster["workerGroupSpecs"]:
            for number in range(group["replicas"]):
                at = first + len(self.pods)
                pod = Pod(name, f"{group['groupName']}-{number}", at, group, head.ip)
                self.pods.append(pod)
                pods.append(pod)

    def ask(self, method: str, body: Any = None, token: str = TOKEN) -> Any:
        request = urllib.request.Request(
            f"http://{self.pods[0].ip}:8265{_APPLICATIONS}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answered:
            text = answered.read()
        return json.loads(text) if text else None

    def serve(self) -> None:
        """Hands over the Serve config and waits for RUNNING; tells each change on the way."""
        wait_until(lambda: self._takes(serve_config(self._docs)), 60, f"{self.name} is told")
        told: list[str] = []

        def runs() -> bool:
            try:
                applications = self.ask("GET")["applications"].values()
            except OSError as e:
                say(f"{self.name}: {e!r}")
                return False
            found: Any = next(iter(applications), {"status": "none"})
            parts = {n: d["status"] for n, d in found.get("deployments", {}).items()}
            ready = [pod.name for pod in self.pods if pod.ready]
            line = f"{self.name}: {found['status']} {parts} ready: {', '.join(ready)}"
            if line not in told:
                told.append(line)
                say(line)
            return bool(found["status"] == "RUNNING")

        wait_until(runs, 300, f"{self.name} is RUNNING")

    def _takes(self, config: Any) -> bool:
        try:
            self.ask("PUT", config)
        except OSError as e:  # the dashboard is not quite there
            say(f"{self.name}: {e!r}")
            return False
        return True

    def delete(self) -> None:
        """SIGTERM to all its pods; waits for their ends."""
        began = time.monotonic()
        for pod in self.pods:
            pod.terminate()
        left = list(self.pods)
        while left and time.monotonic() - began < _DRAIN_LIMIT_S:
            for pod in [pod for pod in left if pod.status is not None]:
                left.remove(pod)
                say(f"{pod.name} ended with {pod.status}, {time.monotonic() - began:.1f} s after")
            time.sleep(0.2)
        assert not left, [pod.name for pod in left]


def check_pods(cluster: Cluster) -> None:
    """All are ready and alive, locked down as the manifest says, and Ray asks for its token."""
    wait_until(lambda: all(pod.ready for pod in cluster.pods), 30, "all pods are ready")
    assert {pod.alive() for pod in cluster.pods} == {200}
    for pod in cluster.pods:
        status = pod.inside("cat /proc/1/status; touch /x /models/x; cat /proc/1/cmdline")
        for said in ("Uid:\t1000\t1000", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"):
            assert said in status, (pod.name, status)
        assert status.count("Read-only file system") == 2, (pod.name, status)
        assert "/ray\0start" in status, "SIGTERM would not reach Ray"
    with pytest.raises(urllib.error.HTTPError, match=r"40[13]"):
        cluster.ask("GET", token="wrong" * 8)


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    docs = build("local")
    changed = copy.deepcopy(docs)
    (service,) = of_kind(changed, "RayService")
    before = service["spec"]["serveConfigV2"]
    service["spec"]["serveConfigV2"] = before.replace("routers: {", "routers: {max_batch: 32, ")
    assert service["spec"]["serveConfigV2"] != before
    pods: list[Pod] = []
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    try:
        run("ip", "address", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        run("ip", "link", "set", BRIDGE, "up")
        old = Cluster("old", docs, 10, pods)
        old.serve()
        check_pods(old)
        say("the first cluster serves; its pods are as the manifest says")
        way = Service(old.pods)
        with Load(way.port) as load:
            time.sleep(5)
            new = Cluster("new", changed, 40, pods)
            new.serve()
            way.pods = new.pods
            say("the Service leads to the new cluster")
            time.sleep(_BESIDE_S)
            old.delete()
            time.sleep(3)
        say(f"{load.told()}; connections refused: {way.refused}")
        assert not load.failures and not way.refused, load.failures[:5]
    finally:
        for pod in pods:
            pod.remove()
        run("ip", "link", "delete", BRIDGE, check=False)


if __name__ == "__main__":
    main()
