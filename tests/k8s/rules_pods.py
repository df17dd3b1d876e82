"""What every pod has to be: locked down, able to drain, probed, with memory for what it does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.k8s.overlays import Doc, Pod, cluster_of, pods, quantity

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
AFTER_DRAIN_S = 30  # Ray ends its processes after the drain; then the kubelet kills
RESERVED_ENV = {
    "RAY_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_MODE",
    "RAY_REDIS_ADDRESS",
    "REDIS_PASSWORD",
    "RAY_enable_autoscaler_v2",
}
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_KEY")


def locked_down(docs: list[Doc]) -> Iterator[str]:
    """The `restricted` pod security standard, and what goes beyond it."""
    for pod in pods(docs):
        spec, of_pod = pod.spec, pod.spec.get("securityContext", {})
        for name in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(name):
                yield f"{pod.owner}: {name}"
        if any("hostPath" in volume for volume in spec.get("volumes", [])):
            yield f"{pod.owner}: hostPath"
        if not of_pod.get("runAsNonRoot") or not of_pod.get("runAsUser"):
            yield f"{pod.owner}: may run as root"
        if of_pod.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.owner}: no seccomp profile"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.owner}: the API token is mounted everywhere"
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            yield from _container(pod.owner, container)
    options = cluster_of(docs)["autoscalerOptions"]
    image = cluster_of(docs)["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
    yield from _container("pods of head", {"name": "autoscaler", "image": image, **options})


def _container(owner: str, container: dict[str, Any]) -> Iterator[str]:
    where, own = f"{owner}, {container['name']}", container.get("securityContext", {})
    if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
        yield f"{where}: may gain privileges"
    if own.get("capabilities", {}).get("drop") != ["ALL"] or own["capabilities"].get("add"):
        yield f"{where}: has capabilities"
    if not own.get("readOnlyRootFilesystem"):
        yield f"{where}: can write to its root file system"
    wanted, limits = (container.get("resources", {}).get(k, {}) for k in ("requests", "limits"))
    if not {"cpu", "memory"} <= set(wanted) & set(limits):
        yield f"{where}: needs requests and limits of cpu and memory"
    elif wanted["memory"] != limits["memory"]:
        yield f"{where}: memory requested and memory limit differ"
    if "@" not in container["image"] and not re.search(r":[\w.-]*\d[\w.-]*$", container["image"]):
        yield f"{where}: image {container['image']} names no version"


def drains(docs: list[Doc]) -> Iterator[str]:
    """SIGTERM reaches Ray, and Ray has the time it wants."""
    drain_s = {}
    for pod in pods(docs):
        for container in pod.spec["containers"]:
            if "preStop" in container.get("lifecycle", {}):
                yield f"{pod.owner}: a preStop hook runs before Ray hears of the end"
        if not pod.ray:
            continue
        grace_s = pod.spec.get("terminationGracePeriodSeconds", 30)
        drain_s[pod.labels["app.kubernetes.io/component"]] = float(pod.env(DRAIN) or 30)
        if grace_s < float(pod.env(DRAIN) or 30) + AFTER_DRAIN_S:
            yield f"{pod.owner}: killed {grace_s} s after SIGTERM, in the middle of its drain"
    if drain_s["serving"] < max(drain_s.values()):
        yield "serving pods have to drain longest"


def probed(docs: list[Doc]) -> Iterator[str]:
    """Probes of their own, at ports that something listens on."""
    for pod in pods(docs):
        for name in ("readinessProbe", "livenessProbe"):
            for container in pod.spec["containers"]:
                if name not in container and not pod.owner.startswith("Job"):
                    yield f"{pod.owner}, {container['name']}: no {name}"
        if not pod.ray:
            continue
        ready = pod.main.get("readinessProbe", {}).get("httpGet", {})
        serving = pod.labels["app.kubernetes.io/component"] == "serving"
        if serving and (ready.get("path"), ready.get("port")) != ("/health", "serve"):
            yield f"{pod.owner}: ready must mean that the endpoint's /health says so"
        if not serving and (ready.get("path"), ready.get("port")) != ("/api/healthz", 52365):
            yield f"{pod.owner}: nothing but Ray's own health can be asked for here"
        if isinstance(ready.get("port"), str) and ready["port"] not in pod.ports():
            yield f"{pod.owner}: the readiness probe's port {ready['port']} is not there"


def has_memory(docs: list[Doc]) -> Iterator[str]:
    """/dev/shm is memory of its own size and holds Ray's object store; /tmp can be written."""
    cluster = cluster_of(docs)
    groups = [("pods of head", cluster["headGroupSpec"])]
    groups += [(f"pods of {g['groupName']}", g) for g in cluster["workerGroupSpecs"]]
    store = {name: g.get("rayStartParams", {}).get("object-store-memory") for name, g in groups}
    for pod in pods(docs):
        if not pod.ray:
            continue
        shm = (pod.volume("/dev/shm") or {}).get("emptyDir", {})
        limit = quantity(pod.main["resources"]["limits"]["memory"])
        if shm.get("medium") != "Memory" or "sizeLimit" not in shm:
            yield f"{pod.owner}: /dev/shm must be an emptyDir in memory with a sizeLimit"
        elif not float(store[pod.owner] or "inf") <= quantity(shm["sizeLimit"]) <= limit / 2:
            yield f"{pod.owner}: /dev/shm must hold object-store-memory, within half the memory"
        if "emptyDir" not in (pod.volume("/tmp") or {}):
            yield f"{pod.owner}: Ray cannot write to /tmp"


def keeps_secrets(docs: list[Doc]) -> Iterator[str]:
    """Secrets come from a Secret, as a file or a reference; never as text, never in arguments."""
    for pod in pods(docs):
        for container in [*pod.spec["containers"], *pod.spec.get("initContainers", [])]:
            for variable in container.get("env", []):
                if _SECRET_NAME.search(variable["name"]) and "value" in variable:
                    yield f"{pod.owner}: {variable['name']} is written in the manifest"
                if pod.ray and variable["name"] in RESERVED_ENV:
                    yield f"{pod.owner}: {variable['name']} is KubeRay's to set"
            words = " ".join([*container.get("command", []), *container.get("args", [])])
            if re.search(r"(token|secret|requirepass|password)[= ]+[A-Za-z0-9]{4,}", words, re.I):
                yield f"{pod.owner}: a secret in the arguments"
        yield from _token_of_the_api(pod)


def _token_of_the_api(pod: Pod) -> Iterator[str]:
    """The autoscaler's token is mounted nowhere else."""
    projected = {v["name"] for v in pod.spec.get("volumes", []) if "projected" in v}
    for container in pod.spec["containers"]:
        if projected & {mount["name"] for mount in container.get("volumeMounts", [])}:
            yield f"{pod.owner}, {container['name']}: gets a token of the Kubernetes API"


RULES = (locked_down, drains, probed, has_memory, keeps_secrets)
