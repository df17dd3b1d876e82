"""Whether an upgrade finds room: asked before it is started, changes nothing.

    .venv/bin/python k8s/room.py gpu

An upgrade builds a second Ray cluster beside the first. This puts the pods that the overlay begins
with, one by one, onto the nodes that `kubectl` knows, beside all that runs there, and says which
would find no place. Exit status 0 when all do, 1 when some do not, 2 when it could not be told.
Looked at: requests, node selectors, taints, one serving pod a node where the overlay wants that.
Not looked at: affinities, quotas, zones of volumes, nodes that a cluster autoscaler would add.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Doc = dict[str, Any]
Amounts = dict[str, float]
_HERE = Path(__file__).resolve().parent
_FACTORS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "m": 1e-3, "k": 1e3}
_FACTORS |= {"M": 1e6, "G": 1e9, "T": 1e12}
_BARS = ("NoSchedule", "NoExecute")
_EPSILON = 1e-6  # of sums of millicores


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A pod that the second cluster begins with: whose it is, what it asks for and where."""

    owner: str
    asks: Amounts
    selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Doc, ...] = ()
    alone: bool = False  # not two of this owner on one node


@dataclass(kw_only=True)
class Node:
    """A node that takes pods, and what is free on it."""

    name: str
    labels: Mapping[str, str]
    taints: tuple[Doc, ...]
    free: Amounts
    owners: Counter[str] = field(default_factory=Counter)  # of the second cluster's pods put here

    def suits(self, pod: Wanted) -> bool:
        """What it asks for is of a kind that is here; selector; taints."""
        return (
            all(name in self.free for name in pod.asks)
            and all(self.labels.get(k) == v for k, v in pod.selector.items())
            and all(any(_tolerates(one, taint) for one in pod.tolerations) for taint in self.taints)
        )

    def has_room(self, pod: Wanted) -> bool:
        """What is free suffices."""
        if pod.alone and self.owners[pod.owner]:
            return False
        return all(self.free[k] + _EPSILON >= amount for k, amount in pod.asks.items())

    def take(self, pod: Wanted) -> None:
        """Puts the pod here."""
        self.owners[pod.owner] += 1
        for name, amount in pod.asks.items():
            self.free[name] -= amount


def quantity(text: str | float) -> float:
    """A Kubernetes quantity as a number."""
    text = str(text)
    for suffix, factor in _FACTORS.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)


def asked(spec: Doc, beside: tuple[Doc, ...] = ()) -> Amounts:
    """What the scheduler counts for a pod: its containers together, or one that runs before them.

    `beside` are the resources of containers that an operator adds.
    """
    found: Amounts = {"pods": 1.0}
    for container in [*spec["containers"], *({"resources": one} for one in beside)]:
        for name, amount in container.get("resources", {}).get("requests", {}).items():
            found[name] = found.get(name, 0.0) + quantity(amount)
    for container in spec.get("initContainers", []):
        for name, amount in container.get("resources", {}).get("requests", {}).items():
            found[name] = max(found.get(name, 0.0), quantity(amount))
    return found


def second_cluster(docs: list[Doc]) -> list[Wanted]:
    """Every pod that KubeRay makes of the overlay's RayService at first."""
    (service,) = [doc for doc in docs if doc["kind"] == "RayService"]
    cluster = service["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    found = [_wanted("head", head, (cluster["autoscalerOptions"]["resources"],))]
    for group in cluster["workerGroupSpecs"]:
        spec = group["template"]["spec"]
        found += [_wanted(group["groupName"], spec)] * group["replicas"]
    return found


def _wanted(owner: str, spec: Doc, beside: tuple[Doc, ...] = ()) -> Wanted:
    spread = spec.get("topologySpreadConstraints", [])
    return Wanted(
        owner=owner,
        asks=asked(spec, beside),
        selector=spec.get("nodeSelector", {}),
        tolerations=tuple(spec.get("tolerations", [])),
        alone=any(
            one["topologyKey"] == "kubernetes.io/hostname"
            and one["whenUnsatisfiable"] == "DoNotSchedule"
            for one in spread
        ),
    )


def nodes_of(nodes: list[Doc], pods: list[Doc]) -> list[Node]:
    """Nodes that are ready and take pods, less what runs on them."""
    found = {}
    for doc in nodes:
        spec, status = doc.get("spec", {}), doc["status"]
        ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status["conditions"])
        if ready and not spec.get("unschedulable"):
            found[doc["metadata"]["name"]] = Node(
                name=doc["metadata"]["name"],
                labels=doc["metadata"].get("labels", {}),
                taints=tuple(
                    t for t in spec.get("taints", []) if t["effect"] != "PreferNoSchedule"
                ),
                free={name: quantity(amount) for name, amount in status["allocatable"].items()},
            )
    for pod in pods:
        node = found.get(pod["spec"].get("nodeName", ""))
        if node is not None and pod["status"].get("phase") not in ("Succeeded", "Failed"):
            for name, amount in asked(pod["spec"]).items():
                if name in node.free:
                    node.free[name] -= amount
    return sorted(found.values(), key=lambda node: node.name)


def _tolerates(toleration: Doc, taint: Doc) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    wanted = (toleration.get("key"), toleration.get("value", ""))
    return wanted == (taint["key"], taint.get("value", ""))


def homeless(wanted: list[Wanted], nodes: list[Node]) -> list[Wanted]:
    """Pods that find no node; the others are put onto the nodes.

    The hardest to place first, each onto the node that it leaves the least free: exact only where
    pods are few a node, which GPUs see to.
    """
    out = []
    for pod in sorted(wanted, key=lambda pod: _hardness(pod, nodes), reverse=True):
        places = [node for node in nodes if node.suits(pod) and node.has_room(pod)]
        if places:
            min(places, key=lambda node: (node.free["memory"], node.name)).take(pod)
        else:
            out.append(pod)
    return out


def _hardness(pod: Wanted, nodes: list[Node]) -> tuple[float, ...]:
    gpus = sum(amount for name, amount in pod.asks.items() if "/" in name)
    return (-sum(node.suits(pod) for node in nodes), gpus, pod.asks.get("memory", 0.0))


def told(amounts: Mapping[str, float]) -> str:
    """Amounts as people read them."""
    words = [f"{amounts.get('cpu', 0):.3g} cores", f"{amounts.get('memory', 0) / 2**30:.3g} GiB"]
    words += [f"{v:g} {k}" for k, v in sorted(amounts.items()) if "/" in k and v]
    return ", ".join(words)


def report(wanted: list[Wanted], nodes: list[Node]) -> Iterator[str]:
    """What there is no room for, one line a kind of pod; nothing when all find a place."""
    left = homeless(wanted, nodes)
    of_owner = Counter(pod.owner for pod in wanted)
    for owner, count in Counter(pod.owner for pod in left).items():
        pod = next(pod for pod in left if pod.owner == owner)
        suiting = [node for node in nodes if node.suits(pod)]
        line = f"no room for {count} of {of_owner[owner]} pods of {owner}, {told(pod.asks)} each: "
        if not suiting:
            labels = "".join(f" labelled {k}={v}" for k, v in pod.selector.items())
            yield line + f"no node that has this{labels} takes them"
            continue
        free = [f"{n.name} {told({k: n.free[k] for k in pod.asks})}" for n in suiting]
        listed = "; ".join(free[:5])
        more = f"; {len(free) - 5} more" if len(free) > 5 else ""
        yield line + f"free beside the rest of the new cluster: {listed}{more}"


def _ask(*command: str) -> str:
    done = subprocess.run(["kubectl", *command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"kubectl {' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def main(arguments: list[str]) -> int:
    """Prints the answer; the exit status."""
    overlays = sorted(folder.name for folder in (_HERE / "overlays").iterdir())
    folder = _HERE / "overlays" / arguments[0] if len(arguments) == 1 else None
    if len(arguments) == 1 and arguments[0] not in overlays:
        folder = Path(arguments[0])
    if folder is None or not (folder / "kustomization.yaml").exists():
        print(f"say which overlay: {', '.join(overlays)}, or a folder with a kustomization.yaml")
        return 2
    try:
        docs = [doc for doc in yaml.safe_load_all(_ask("kustomize", str(folder))) if doc]
        wanted = second_cluster(docs)
        nodes, pods = (
            json.loads(_ask("get", *what, "--output", "json"))["items"]
            for what in (("nodes",), ("pods", "--all-namespaces"))
        )
    except (RuntimeError, FileNotFoundError) as e:
        print(f"it cannot be told: {e}")
        return 2
    lines = list(report(wanted, nodes_of(nodes, pods)))
    total = {k: sum(p.asks.get(k, 0.0) for p in wanted) for pod in wanted for k in pod.asks}
    print(f"a second cluster begins with {len(wanted)} pods: {told(total)}")
    print("\n".join(lines) or "all of them find room beside what runs now")
    if lines:
        print(
            "An upgrade would leave these Pending, unless your cluster adds nodes for them; the old"
            " one would serve on. Make room first, or take the downtime: k8s/README.md, Upgrade."
        )
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
