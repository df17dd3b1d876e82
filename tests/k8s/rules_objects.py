"""The objects around the pods: selectors that select, ports that are there, doors that are shut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tests.k8s.overlays import K8S, Doc, Pod, of_kind, pods, workers

README = (K8S / "README.md").read_text()


def _selected(docs: list[Doc], selector: Mapping[str, Any]) -> list[Pod]:
    wanted = selector.get("matchLabels", selector)
    return [p for p in pods(docs) if all(p.labels.get(k) == v for k, v in wanted.items())]


def select_something(docs: list[Doc]) -> Iterator[str]:
    """Every selector of pods here finds pods, and every port by name is one of theirs."""
    for doc in docs:
        where, spec = f"{doc['kind']} {doc['metadata']['name']}", doc.get("spec", {})
        if doc["kind"] == "NetworkPolicy":
            yield from _policy(docs, where, spec)
        elif doc["kind"] in ("PodDisruptionBudget", "PodMonitor", "Service"):
            found = _selected(docs, spec["selector"])
            if not found:
                yield f"{where}: selects no pod"
            wanted = [e["port"] for e in spec.get("podMetricsEndpoints", [])]
            wanted += [p["targetPort"] for p in spec.get("ports", [])]
            yield from _ports(where, found, wanted)


def _policy(docs: list[Doc], where: str, spec: Doc) -> Iterator[str]:
    found = _selected(docs, spec["podSelector"])
    if not found:
        yield f"{where}: selects no pod"
    for direction, side in (("ingress", "from"), ("egress", "to")):
        for rule in spec.get(direction, []):
            if direction.capitalize() not in spec["policyTypes"]:
                yield f"{where}: {direction} rules without that policy type"
            for peer in rule.get(side, []):
                ours = "podSelector" in peer and "namespaceSelector" not in peer
                if ours and not _selected(docs, peer["podSelector"]):
                    yield f"{where}: {side} selects no pod"
        ports = [p["port"] for r in spec.get(direction, []) for p in r.get("ports", [])]
        if direction == "ingress":
            yield from _ports(where, found, ports)


def _ports(where: str, found: list[Pod], wanted: list[str | int]) -> Iterator[str]:
    for port in wanted:
        for pod in found:
            if isinstance(port, str) and port not in pod.ports():
                yield f"{where}: {pod.owner} have no port {port}"


def shut(docs: list[Doc]) -> Iterator[str]:
    """All traffic is denied first; from outside only the endpoint can be reached."""
    policies = {p["metadata"]["name"]: p["spec"] for p in of_kind(docs, "NetworkPolicy")}
    for pod in pods(docs):
        covering = [p for p in policies.values() if pod in _selected(docs, p["podSelector"])]
        if not any({"Ingress", "Egress"} <= set(p["policyTypes"]) for p in covering):
            yield f"{pod.owner}: no policy denies their traffic both ways"
        for policy in covering:
            for rule in policy.get("ingress", []):
                to_endpoint = [p["port"] for p in rule.get("ports", [])] == ["serve"]
                serving = pod.labels.get("app.kubernetes.io/component") == "serving"
                if not rule.get("from") and not (to_endpoint and serving):
                    yield f"{pod.owner}: open to everybody"
    inside = policies.get("raymoe-inside", {"podSelector": {"matchLabels": {"no": "pod"}}})
    if len(_selected(docs, inside["podSelector"])) < len(workers(docs)) + 1:
        yield "raymoe-inside must let all Ray pods talk to each other"


def evictable(docs: list[Doc]) -> Iterator[str]:
    """Budgets that Kubernetes can count, and that leave it a pod to evict."""
    for budget in of_kind(docs, "PodDisruptionBudget"):
        name, spec = budget["metadata"]["name"], budget["spec"]
        least = spec.get("minAvailable")
        if "maxUnavailable" in spec or not isinstance(least, int):
            yield f"{name}: only a number in minAvailable works for pods of a RayCluster"
            continue
        groups = {pod.labels["ray.io/group"] for pod in _selected(docs, spec["selector"])}
        if least >= sum(workers(docs)[group]["replicas"] for group in groups):
            yield f"{name}: allows no eviction at all"


def spread_out(docs: list[Doc]) -> Iterator[str]:
    """Constraints count a cluster's own pods; what a budget protects is on several nodes."""
    names: dict[str, set[tuple[str, str]]] = {}
    for pod in pods(docs):
        for one in pod.spec.get("topologySpreadConstraints", []):
            if pod not in _selected(docs, one["labelSelector"]):
                yield f"{pod.owner}: a spread constraint that does not count them"
            if one.get("matchLabelKeys") != ["ray.io/cluster"]:
                yield f"{pod.owner}: spread together with the old cluster of an upgrade"
            if one["whenUnsatisfiable"] == "DoNotSchedule" and one.get("minDomains", 1) < 2:
                yield f"{pod.owner}: all may be put on one node"
            names.setdefault(pod.owner, set()).add((one["topologyKey"], one["whenUnsatisfiable"]))
    for budget in of_kind(docs, "PodDisruptionBudget"):
        for pod in _selected(docs, budget["spec"]["selector"]):
            keys = {key for key, _ in names.get(pod.owner, set())}
            if "kubernetes.io/hostname" not in keys:
                yield f"{pod.owner}: a budget protects them, but they may share one node"
            serving = pod.labels["app.kubernetes.io/component"] == "serving"
            if serving and ("kubernetes.io/hostname", "DoNotSchedule") not in names[pod.owner]:
                yield f"{pod.owner}: one node lost could be all gateways"


def least_rights(docs: list[Doc]) -> Iterator[str]:
    """Accounts without rights of their own, all of them there; secrets by the names told."""
    for kind in ("Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding"):
        for doc in of_kind(docs, kind):
            yield f"{kind} {doc['metadata']['name']}: no pod of ours needs rights"
    accounts = {}
    for doc in of_kind(docs, "ServiceAccount"):
        accounts[doc["metadata"]["name"]] = doc
        if doc.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount {doc['metadata']['name']}: mounts its token"
    for pod in pods(docs):
        if pod.spec.get("serviceAccountName") not in accounts:
            yield f"{pod.owner}: no ServiceAccount {pod.spec.get('serviceAccountName')}"
    for doc in of_kind(docs, "Secret"):
        yield f"Secret {doc['metadata']['name']}: secrets do not belong into manifests"
    for name, key in _secret_keys(docs):
        if name != "raymoe-secrets" or f"--from-literal={key}=" not in README:
            yield f"Secret {name}, key {key}: README.md does not create it"


def _secret_keys(node: Any) -> Iterator[tuple[str, str]]:
    """(name, key) of every reference to a Secret, at any depth."""
    if isinstance(node, list):
        for child in node:
            yield from _secret_keys(child)
    elif isinstance(node, dict):
        for key, child in node.items():
            if key == "secretKeyRef":
                yield child["name"], child["key"]
            elif key == "secret" and "secretName" in child:
                yield from ((child["secretName"], item["key"]) for item in child["items"])
            elif key == "authOptions":
                yield child["secretName"], "auth_token"
            else:
                yield from _secret_keys(child)


def one_namespace(docs: list[Doc]) -> Iterator[str]:
    """Everything lies in the namespace that the overlay makes, with pod security enforced."""
    (space,) = of_kind(docs, "Namespace")
    enforced = space["metadata"]["labels"].get("pod-security.kubernetes.io/enforce")
    if enforced != "restricted":
        yield "the namespace does not enforce the restricted pod security standard"
    for doc in docs:
        if doc["kind"] != "Namespace" and doc["metadata"].get("namespace") != "raymoe":
            yield f"{doc['kind']} {doc['metadata']['name']}: in another namespace"


RULES = (select_something, shut, evictable, spread_out, least_rights, one_namespace)
