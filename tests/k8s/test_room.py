"""Whether a second cluster finds room, asked of nodes and pods as `kubectl` lists them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from k8s.room import asked, homeless, nodes_of, report, second_cluster
from tests.k8s.overlays import K8S, KUBECTL, build, cluster_of, workers

GPU_TAINT = {"key": "nvidia.com/gpu", "effect": "NoSchedule"}


def node(name: str, cpu: int, gib: int, gpus: int = 0, **more: Any) -> dict[str, Any]:
    """A node as `kubectl get nodes -o json` lists it; the taint of GPU nodes where it has any."""
    amounts = {"cpu": str(cpu), "memory": f"{gib}Gi", "pods": "110"}
    return {
        "metadata": {"name": name, "labels": more.get("labels", {})},
        "spec": {"taints": [GPU_TAINT] if gpus else [], **more.get("spec", {})},
        "status": {
            "allocatable": {**amounts, **({"nvidia.com/gpu": str(gpus)} if gpus else {})},
            "conditions": [{"type": "Ready", "status": more.get("ready", "True")}],
        },
    }


def running(overlay: str, **nodes: str) -> list[dict[str, Any]]:
    """The pods of the cluster that serves, each on the node named for its worker group."""
    cluster = cluster_of(build(overlay))
    head = cluster["headGroupSpec"]["template"]["spec"]
    pods = [(head, nodes["head"])]
    for name, group in workers(build(overlay)).items():
        pods += [(group["template"]["spec"], nodes[name])] * group["replicas"]
    return [{"spec": {**spec, "nodeName": at}, "status": {"phase": "Running"}} for spec, at in pods]


def test_it_fits_where_everything_is_there_twice() -> None:
    nodes = [node("cpu", 16, 64), node("gpus", 32, 128, gpus=4)]
    pods = running("gpu", head="cpu", serving="cpu", experts="gpus")
    assert list(report(second_cluster(build("gpu")), nodes_of(nodes, pods))) == []


def test_gpus_that_are_taken_are_missed() -> None:
    nodes = [node("cpu", 16, 64), node("gpus", 32, 128, gpus=3)]
    pods = running("gpu", head="cpu", serving="cpu", experts="gpus")
    (line,) = report(second_cluster(build("gpu")), nodes_of(nodes, pods))
    assert line.startswith("no room for 1 of 2 pods of experts, 4 cores, 24 GiB, 1 nvidia.com/gpu")
    assert "gpus 20 cores, 56 GiB" in line


def test_pods_that_have_ended_take_nothing() -> None:
    nodes = [node("cpu", 16, 64), node("gpus", 32, 128, gpus=2)]
    pods = running("gpu", head="cpu", serving="cpu", experts="gpus")
    for pod in pods:
        pod["status"]["phase"] = "Succeeded"
    assert list(report(second_cluster(build("gpu")), nodes_of(nodes, pods))) == []


@pytest.mark.parametrize(
    "spoilt",
    [
        node("gpus", 32, 128, gpus=4, ready="False"),
        node("gpus", 32, 128, gpus=4, spec={"unschedulable": True}),
        node("gpus", 32, 128, gpus=4, spec={"taints": [{"key": "mine", "effect": "NoExecute"}]}),
    ],
    ids=["not ready", "cordoned", "tainted"],
)
def test_nodes_that_take_no_pods_do_not_count(spoilt: dict[str, Any]) -> None:
    lines = list(report(second_cluster(build("gpu")), nodes_of([node("cpu", 16, 64), spoilt], [])))
    assert len(lines) == 1 and "of experts" in lines[0] and "takes them" in lines[0]


def test_pools_need_nodes_of_their_kind() -> None:
    product = "nvidia.com/gpu.product"
    nodes = [
        node("cpu", 16, 64),
        node("h", 32, 128, gpus=8, labels={product: "NVIDIA-H100-80GB-HBM3"}),
        node("l", 32, 128, gpus=8, labels={product: "NVIDIA-L4"}),
    ]
    (line,) = report(second_cluster(build("mixed")), nodes_of(nodes, []))
    assert "1 of 1 pods of a100" in line and f"{product}=NVIDIA-A100-SXM4-40GB" in line


def test_serving_pods_of_ha_want_a_node_each() -> None:
    gpus = node("gpus", 32, 128, gpus=4)
    (pod,) = homeless(second_cluster(build("ha")), nodes_of([node("cpu", 32, 128), gpus], []))
    assert pod.owner == "serving"
    two = [node("cpu", 32, 128), node("other", 8, 32), gpus]
    assert homeless(second_cluster(build("ha")), nodes_of(two, [])) == []


def test_an_init_container_counts_where_it_is_the_larger() -> None:
    resources = {"requests": {"cpu": "250m", "memory": "1Gi"}}
    spec = {"containers": [{"resources": resources}, {"resources": resources}]}
    assert asked(spec) == {"cpu": 0.5, "memory": 2**31, "pods": 1}
    spec["initContainers"] = [{"resources": {"requests": {"cpu": "2"}}}]
    assert asked(spec) == {"cpu": 2, "memory": 2**31, "pods": 1}


def test_the_program_asks_kubectl_and_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "nodes").write_text(json.dumps({"items": [node("small", 4, 8)]}))
    (tmp_path / "pods").write_text(json.dumps({"items": []}))
    fake = tmp_path / "kubectl"
    fake.write_text(
        f'#!/bin/sh\n[ "$1" = get ] && exec cat "{tmp_path}/$2"\nexec "{KUBECTL}" "$@"\n'
    )
    fake.chmod(0o755)

    def ask(overlay: str, path: str = f"{tmp_path}:{os.environ['PATH']}") -> tuple[int, str]:
        command = [sys.executable, str(K8S / "room.py"), overlay]
        done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True)
        return done.returncode, done.stdout.decode() + done.stderr.decode()

    status, said = ask("local")
    assert status == 1 and "no room for" in said and "would serve on" in said
    (tmp_path / "nodes").write_text(json.dumps({"items": [node("large", 16, 64)]}))
    assert ask("local") == (
        0,
        "a second cluster begins with 4 pods: 2.75 cores, 9 GiB\n"
        "all of them find room beside what runs now\n",
    )
    assert ask("locale")[0] == 2
    status, said = ask("local", path="/nowhere")
    assert status == 2 and "kubectl" in said
