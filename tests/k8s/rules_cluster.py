"""What KubeRay's operator and Ray's autoscaler refuse or misunderstand, found before they do."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import ray
from packaging.requirements import Requirement
from ray.scripts.scripts import start

from tests.k8s.overlays import ROOT, Doc, cluster_of, of_kind, pods, workers

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def versions_agree(docs: list[Doc]) -> Iterator[str]:
    """Image tags and rayVersion against pyproject.toml and the Dockerfile."""
    for pod in pods(docs):
        for container in [*pod.spec["containers"], *pod.spec.get("initContainers", [])]:
            name, _, tag = container["image"].rpartition(":")
            if name.endswith("raymoe") and tag not in (
                f"{_PROJECT['version']}-cpu",
                f"{_PROJECT['version']}-cuda",
            ):
                yield f"{pod.owner}: image tag {tag}, but pyproject.toml says {_PROJECT['version']}"
    version = cluster_of(docs)["rayVersion"]
    (ray,) = [Requirement(d) for d in _PROJECT["dependencies"] if d.startswith("ray[")]
    if version not in ray.specifier:
        yield f"rayVersion {version} is not within pyproject.toml's {ray}"
    built = set(re.findall(r"^ARG RAY_VERSION=(.*)$", (ROOT / "Dockerfile").read_text(), re.M))
    if built != {version}:
        yield f"rayVersion {version}, but the Dockerfile installs Ray {', '.join(sorted(built))}"


def operator_takes_it(docs: list[Doc]) -> Iterator[str]:
    """The checks of KubeRay 1.7's own validation that a manifest of ours could fail."""
    (service,) = of_kind(docs, "RayService")
    cluster, name = cluster_of(docs), service["metadata"]["name"]
    if not _DNS_1035.fullmatch(name) or len(name) > 41:
        yield f"name {name!r} is too long or not a DNS label"
    names = [group["groupName"] for group in cluster["workerGroupSpecs"]]
    if len(set(names)) != len(names):
        yield f"worker groups of the same name: {names}"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        own, start = group.get("groupName", "head"), group.get("rayStartParams", {})
        if not _DNS_1035.fullmatch(own):
            yield f"group name {own!r} is not a DNS label"
        if "labels" in start:
            yield f"{own}: labels belong into `labels`, not into rayStartParams"
        if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(start):
            yield f"{own}: resources both in `resources` and in rayStartParams"
        if group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield f"{own}: the autoscaler (v2) needs restartPolicy Never"
        least, now, most = (group.get(k, 0) for k in ("minReplicas", "replicas", "maxReplicas"))
        if "groupName" in group and not least <= now <= most:
            yield f"{own}: replicas {now} not within minReplicas {least} and maxReplicas {most}"
    if cluster["authOptions"]["mode"] != "token" or not cluster["authOptions"].get("secretName"):
        yield "Ray's own authentication is off, or its token is not ours"


def scales(docs: list[Doc]) -> Iterator[str]:
    """Pods come and go with the actors that ask for them; nothing is pinned to the head."""
    cluster = cluster_of(docs)
    if (
        not cluster.get("enableInTreeAutoscaling")
        or cluster["autoscalerOptions"]["version"] != "v2"
    ):
        yield "Ray's autoscaler (v2) is off: pending groups would wait for ever"
    if cluster["headGroupSpec"].get("resources", {}).get("CPU") != "0":
        yield "the head offers CPUs: routers or groups could run there"
    for name, group in workers(docs).items():
        resources = group.get("resources", {})
        experts = group["template"]["metadata"]["labels"]["app.kubernetes.io/component"]
        if experts == "experts" and resources != {"CPU": "0", "expert_slot": "1"}:
            yield f"{name}: must offer no CPU and one expert_slot, got {resources}"


def upgrades(docs: list[Doc]) -> Iterator[str]:
    """A new cluster beside the old one, for every change; requests go to serving pods alone."""
    (service,) = of_kind(docs, "RayService")
    spec = service["spec"]
    if spec["upgradeStrategy"]["type"] != "NewCluster":
        yield "an upgrade must make a new cluster: see README.md, Upgrade"
    if not spec.get("excludeHeadPodFromServeSvc"):
        yield "the Service must leave the head out"
    ports = spec["serveService"]["spec"]["ports"]
    if [(port["name"], port.get("targetPort")) for port in ports] != [("serve", "serve")]:
        yield "the Service must look its port up by name: experts' pods have none of that name"
    for pod in pods(docs):
        if pod.ray and pod.labels["app.kubernetes.io/component"] == "experts":
            if "serve" in pod.ports():
                yield f"{pod.owner}: a port named serve, so that the Service sends requests there"
        elif pod.ray and pod.ports().get("serve") != 8000:
            yield f"{pod.owner}: no port named serve at 8000"
    template = cluster_of(docs)["headGroupSpec"]["template"]
    generated = template["metadata"].get("annotations", {}).get("raymoe/serve-config", "")
    configs = {doc["metadata"]["name"]: doc for doc in of_kind(docs, "ConfigMap")}
    if generated not in configs or not generated.startswith("serve-config-"):
        yield "a change of serve.yaml would be no change of the cluster"
    elif configs[generated]["data"]["serveConfigV2"] != spec["serveConfigV2"]:
        yield "serveConfigV2 is not the generated config"


def head_can_be_lost(docs: list[Doc]) -> Iterator[str]:
    """With Redis: its address is a Service of ours, its password comes from a Secret."""
    options = cluster_of(docs).get("gcsFaultToleranceOptions")
    if options is None:
        return
    host = options["redisAddress"].removeprefix("redis://").partition(":")[0]
    if "." not in host and host not in {s["metadata"]["name"] for s in of_kind(docs, "Service")}:
        yield f"no Service {host} for the head's state"
    if "secretKeyRef" not in options.get("redisPassword", {}).get("valueFrom", {}):
        yield "the password of Redis must come from a Secret"


@cache
def _ray_reads(name: str) -> bool:
    """Whether the installed Ray's own code names this variable."""
    if f'"{name}"' in _ray_sources():
        return True
    # What is set by RayConfig is only a name in the compiled servers.
    return re.search(rb"\b%b\b" % name.removeprefix("RAY_").encode(), _gcs_server()) is not None


@cache
def _ray_sources() -> str:
    folders = ("_private", "_common", "serve/_private")
    files = [f for folder in folders for f in (Path(ray.__file__).parent / folder).rglob("*.py")]
    return "\n".join(file.read_text() for file in files)


@cache
def _gcs_server() -> bytes:
    return (Path(ray.__file__).parent / "core/src/ray/gcs/gcs_server").read_bytes()


def ray_knows(docs: list[Doc]) -> Iterator[str]:
    """Variables and parameters that Ray would ignore, or refuse when the pod starts."""
    options = {name.removeprefix("--") for option in start.params for name in option.opts}
    cluster = cluster_of(docs)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        for name in set(group.get("rayStartParams", {})) - options:
            yield f"{group.get('groupName', 'head')}: `ray start` has no option --{name}"
    for pod in pods(docs):
        for variable in pod.main.get("env", []) if pod.ray else []:
            name = variable["name"]
            if name.startswith("RAY_") and not _ray_reads(name):
                yield f"{pod.owner}: Ray reads no variable {name}"


RULES = (versions_agree, operator_takes_it, ray_knows, scales, upgrades, head_can_be_lost)
