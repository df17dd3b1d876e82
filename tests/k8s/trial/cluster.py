"""A Ray cluster of such pods, and what KubeRay's operator does with it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from tests.k8s.overlays import Doc, cluster_of
from tests.k8s.rules_serve import serve_config
from tests.k8s.trial.kuberay import TOKEN
from tests.k8s.trial.pod import Pod

_BEGAN = time.monotonic()
_APPLICATIONS = "/api/serve/applications/"
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
        self.name, self._docs, self._first, self._made = name, docs, first, pods
        self._spec = cluster_of(docs)
        self.pods: list[Pod] = []
        self.add_head()
        for group in self._spec["workerGroupSpecs"]:
            for number in range(group["replicas"]):
                self._add(f"{group['groupName']}-{number}", group, self.pods[0].ip)

    def _add(self, name: str, group: Doc, head: str | None) -> Pod:
        at = self._first + (0 if head is None else len(self.pods))
        redis = self._spec.get("gcsFaultToleranceOptions", {})
        pod = Pod(self.name, name, at, group, head, redis)
        self._made.append(pod)
        self.pods.insert(0 if head is None else len(self.pods), pod)
        return pod

    def add_head(self) -> None:
        """A head pod, the first or in place of one that was lost, at the same address."""
        head = self._add("head", self._spec["headGroupSpec"], None)
        wait_until(lambda: head.ready, 120, f"the head of {self.name} is ready")

    def lose_head(self) -> None:
        """As when its node is gone: no signal, no drain."""
        self.pods.pop(0).remove()

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
        """Hands over the Serve config and waits for RUNNING."""
        wait_until(lambda: self._takes(serve_config(self._docs)), 60, f"{self.name} is told")
        self.await_running()

    def await_running(self) -> None:
        """Until Serve calls the application RUNNING; tells each change on the way."""
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
