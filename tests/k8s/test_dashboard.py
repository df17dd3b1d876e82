"""The dashboard asks only for metrics that exist, with labels that they have."""

from __future__ import annotations

import json
import re
from typing import Any

from raymoe.observe.catalogue import CATALOGUE
from tests.k8s.overlays import build, of_kind

_NAME = re.compile(r"raymoe_[a-z0-9_]+")
_OF_HISTOGRAM = re.compile(r"_(bucket|sum|count)$")
_BY_PROMETHEUS = {"le", "pod", "instance"}


def panels() -> list[dict[str, Any]]:
    """Of the ConfigMap that Grafana's sidecar picks up."""
    (found,) = [d for d in of_kind(build("gpu"), "ConfigMap") if "raymoe.json" in d["data"]]
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    listed: list[dict[str, Any]] = json.loads(found["data"]["raymoe.json"])["panels"]
    return listed


def wrong(expression: str) -> list[str]:
    """Metrics of a query that do not exist, and labels that none of its metrics has."""
    names = _NAME.findall(expression)
    bare = [_OF_HISTOGRAM.sub("", name) if name not in CATALOGUE else name for name in names]
    found = [name for name in bare if name not in CATALOGUE]
    known = {label for name in bare if name in CATALOGUE for label in CATALOGUE[name].labels}
    asked = re.findall(r"\b(?:by|without) \(([\w, ]+)\)", expression)
    labels = {label.strip() for group in asked for label in group.split(",")}
    labels |= set(re.findall(r"(\w+)=~?\"", expression))
    for name, plain in zip(names, bare, strict=True):
        of_histogram = plain in CATALOGUE and CATALOGUE[plain].kind == "histogram"
        if of_histogram != (name != plain):
            found.append(name)
        counts = plain in CATALOGUE and CATALOGUE[plain].kind == "counter"
        if counts and not re.search(rf"(rate|increase)\({name}", expression):
            found.append(f"{name} without its rate")
    return found + sorted(labels - known - _BY_PROMETHEUS)


def test_every_metric_and_label_of_the_dashboard_exists() -> None:
    expressions = [target["expr"] for panel in panels() for target in panel.get("targets", [])]
    assert len(expressions) >= 15
    assert [(e, wrong(e)) for e in expressions if wrong(e)] == []


def test_a_query_of_what_is_not_there_is_found() -> None:
    assert wrong("max(raymoe_epochs)") == ["raymoe_epochs"]
    assert wrong("max by (gruop) (raymoe_group_up)") == ["gruop"]
    assert wrong('rate(raymoe_http_requests_total{code="200"}[1m])') == ["code"]
    assert wrong("sum(raymoe_generation_tokens_total)") == [
        "raymoe_generation_tokens_total without its rate"
    ]
    assert wrong("rate(raymoe_time_to_first_token_seconds[1m])") == [
        "raymoe_time_to_first_token_seconds"
    ]


def test_panels_lie_on_the_grid_without_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        across = range(at["x"], at["x"] + at["w"])
        cells = {(x, y) for x in across for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24 and not cells & taken, panel["title"]
        taken |= cells
