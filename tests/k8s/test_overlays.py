"""Every overlay builds, has the structure the APIs ask for, and keeps our rules; and each kind of
mistake, planted into what was built, is found."""

from __future__ import annotations

import math
import re
from typing import Any

import jsonschema
import pytest

from tests.k8s import rules_cluster, rules_objects, rules_pods, rules_serve
from tests.k8s.crd import crd_file, rayservice_schema
from tests.k8s.mistakes import MISTAKES, Mistake
from tests.k8s.overlays import (
    K8S,
    OVERLAYS,
    Doc,
    build,
    cluster_of,
    of_kind,
    quantity,
    read_all,
)
from tests.k8s.schemas import CUSTOM, custom_schema, problems_of_structure

RULES = (*rules_pods.RULES, *rules_cluster.RULES, *rules_serve.RULES, *rules_objects.RULES)


def problems(docs: list[Doc]) -> list[str]:
    """What the structure, or the first rule that is broken, says; later rules build on it."""
    found = [problem for doc in docs for problem in problems_of_structure(doc)]
    for rule in RULES:
        found = found or list(rule(docs))
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_is_sound(overlay: str) -> None:
    assert problems(build(overlay)) == []


def test_the_overlays_promised_are_there() -> None:
    assert OVERLAYS == ["gpu", "ha", "local", "mixed"]


def test_the_examples_have_the_right_structure() -> None:
    for file in sorted((K8S / "examples").glob("*.yaml")):
        for doc in read_all(file.read_text()):
            assert list(problems_of_structure(doc)) == []


crds = pytest.mark.skipif(crd_file() is None, reason="set KUBERAY_CRDS to the folder of the CRDs")


@crds
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_against_the_operators_own_schema(overlay: str) -> None:
    path = crd_file()
    assert path is not None
    checker = jsonschema.Draft202012Validator(rayservice_schema(path))
    (service,) = of_kind(build(overlay), "RayService")
    assert [f"{e.json_path}: {e.message}" for e in checker.iter_errors(service)] == []
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containrs"] = []
    assert [e for e in checker.iter_errors(service) if "containrs" in e.message]


@crds
def test_our_short_schema_knows_no_field_that_the_operators_does_not() -> None:
    path = crd_file()
    assert path is not None

    def compare(ours: dict[str, Any], theirs: dict[str, Any], where: str) -> None:
        for name, child in ours.get("properties", {}).items():
            assert name in theirs["properties"], f"{where}.{name}"
            other = theirs["properties"][name]
            assert not child.get("type") or other["type"] == child["type"], f"{where}.{name}"
            assert set(child.get("enum", [])) <= set(other.get("enum", child.get("enum", [])))
            compare(child.get("items", child), other.get("items", other), f"{where}.{name}")

    compare(CUSTOM["ray.io/v1", "RayService"], rayservice_schema(path)["properties"]["spec"], "")
    jsonschema.Draft202012Validator.check_schema(custom_schema("ray.io/v1", "RayService"))


@pytest.mark.parametrize(("plant", "said"), MISTAKES, ids=[said for _, said in MISTAKES])
def test_a_planted_mistake_is_found(plant: Mistake, said: str) -> None:
    docs = build("ha")
    plant(docs)
    found = problems(docs)
    assert [problem for problem in found if re.search(said, problem)], found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_sizes_that_the_readme_tells(overlay: str) -> None:
    docs = build(overlay)
    cluster = cluster_of(docs)
    pods = [(cluster["headGroupSpec"]["template"]["spec"], 1)]
    pods += [(g["template"]["spec"], g["replicas"]) for g in cluster["workerGroupSpecs"]]
    pods += [(s["spec"]["template"]["spec"], 1) for s in of_kind(docs, "StatefulSet")]
    asked = [(spec["containers"][0]["resources"]["requests"], n) for spec, n in pods]
    asked.append((cluster["autoscalerOptions"]["resources"]["requests"], 1))
    cores = math.ceil(sum(quantity(one["cpu"]) * n for one, n in asked))
    gib = math.ceil(sum(quantity(one["memory"]) * n for one, n in asked) / 2**30)
    (row,) = re.findall(rf"^\| `{overlay}` .*$", (K8S / "README.md").read_text(), re.M)
    assert f"{cores} cores" in row and f"{gib} GiB" in row, (cores, gib)
