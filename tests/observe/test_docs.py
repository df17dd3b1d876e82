"""Docs and dashboard name the metrics there are, and only those."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from raymoe.gateway.observe import GatewayMetrics
from raymoe.observe.catalogue import CATALOGUE, SERVING

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_metrics", ROOT / "docs/make_metrics.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docs_are_up_to_date(made: ModuleType) -> None:
    again = "is out of date: run `python docs/make_metrics.py`"
    assert made.TARGET.read_text() == made.render(), f"docs/metrics.md {again}"
    assert json.loads(made.DASHBOARD.read_text()) == made.dashboard(), f"the dashboard {again}"


def test_the_dashboard_refers_to_metrics_that_exist(made: ModuleType) -> None:
    series = made.names_of(tuple(CATALOGUE.values()))
    board = json.loads(made.DASHBOARD.read_text())
    asked = set()
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            names = set(re.findall(r"raymoe_\w+", target["expr"]))
            assert names and names <= series, panel["title"]
            asked |= names
            for name in names:
                labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
                assert labels <= {*CATALOGUE[re.sub("_bucket$", "", name)].labels}
                counted = name.endswith(("_total", "_bucket"))
                over_time = "rate(" in target["expr"]
                assert over_time <= counted, "a gauge has no rate"
    assert len(asked) > 25
    places = [tuple(p["gridPos"].values()) for p in board["panels"]]
    assert len(set(places)) == len(places) and len({p["id"] for p in board["panels"]}) == len(
        places
    )


class FakeBackend:
    in_flight = resubmitted = 0

    def routers(self) -> list[Any]:
        return []


def test_a_gateway_has_exactly_the_serving_metrics() -> None:
    registry = GatewayMetrics(cast(Any, FakeBackend())).registry
    assert set(registry.values()) == {spec.name for spec in SERVING}


def test_names_follow_the_rules() -> None:
    for spec in CATALOGUE.values():
        assert (spec.kind == "counter") == spec.name.endswith("_total"), spec.name
        assert bool(spec.bounds) == (spec.kind == "histogram")
        assert list(spec.bounds) == sorted(set(spec.bounds))
        assert spec.text.endswith(".") and "|" not in spec.text


@pytest.mark.parametrize("page", ["runbook.md", "metrics.md"])
def test_what_the_pages_name_is_there(page: str, made: ModuleType) -> None:
    text = (ROOT / "docs" / page).read_text()
    series = made.names_of(tuple(CATALOGUE.values())) | CATALOGUE.keys() | {"raymoe_"}
    assert set(re.findall(r"raymoe_\w*", text)) <= series
    settings = set(re.findall(r"`(?:groups|routers|gateway|placement|ray|data_plane)\.\w+", text))
    documented = (ROOT / "docs/config.md").read_text()
    assert {name for name in settings if f"{name}`" not in documented} == set()
    for linked in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / "docs" / linked).exists(), linked
