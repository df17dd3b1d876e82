"""What the observer says of a fleet that changes, told step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.table import Table
from raymoe.observe.observer import Observer, quantile

L, E = 2, 4


def table_of(epoch: int, homes: dict[str, list[tuple[int, int]]], speed: float = 1.0) -> Table:
    """Replicas by group; shares alike over the replicas of an expert."""
    resident = np.zeros((L, E, len(homes)), np.bool_)
    for g, cells in enumerate(homes.values()):
        for layer, expert in cells:
            resident[layer, expert, g] = True
    ones = np.ones(len(homes))
    return Table(
        term=1,
        epoch=epoch,
        group_ids=tuple(homes),
        resident=resident,
        share=resident / np.maximum(resident.sum(2, keepdims=True), 1),
        speed=ones * speed,
        alpha_s=ones * 0,
        gamma_s=ones * 0,
    )


def group(name: str, **changes: Any) -> dict[str, Any]:
    row = {"id": name, "kind": "default", "state": "ready", "deaths": 0, "speed": 1.0}
    return {**row, "last_error": "", **changes}


def status(*groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    profile = {"answers": {"g0": 4}, "latency_s": {"g0": 2.0}}
    router = {"id": "router-1", "state": "ready", "profile": profile}
    base = {"groups": list(groups), "routers": [router], "ready": True, "balancedness": 0.9}
    return {**base, **changes}


HALVES = {"g0": [(0, 0), (0, 1), (1, 0), (1, 1)], "g1": [(0, 2), (0, 3), (1, 2), (1, 3)]}


class Rig:
    def __init__(self) -> None:
        self.observer = Observer()
        self.now = 100.0
        self.history: dict[str, Any] = {"events": [], "plans": []}

    def look(
        self,
        now_status: dict[str, Any],
        table: Table,
        load: Any = None,
        values: Any = None,
        why: Callable[..., tuple[float, str]] = lambda cell: (0.0, "its load grew"),
    ) -> list[str]:
        """The sentences that are new."""
        seq = self.observer.events.seq
        self.now += 2.0
        self.observer.look(
            now_status,
            table,
            np.ones((L, E)) if load is None else load,
            self.history,
            why,
            values or {},
            now=self.now,
            at=1000 + self.now,
        )
        return [f"{e['kind']}: {e['text']}" for e in self.observer.events.since(seq)]


def test_moves_are_told_and_counted_and_nothing_else_is_said() -> None:
    rig = Rig()
    calm = status(group("g0"), group("g1"))
    assert rig.look(calm, table_of(1, HALVES)) == []
    assert rig.look(calm, table_of(1, HALVES)) == []
    both = {**HALVES, "g1": [*HALVES["g1"], (0, 1)]}
    joined = rig.look(calm, table_of(2, both))
    assert joined == ["replica: layer 0 expert 1 added on g1: its load grew"]
    moved = {"g0": [c for c in HALVES["g0"] if c != (0, 1)], "g1": both["g1"]}
    assert rig.look(calm, table_of(3, moved)) == ["replica: layer 0 expert 1 removed from g0"]
    lost = rig.look(calm, table_of(4, {"g1": [(la, e) for la in range(L) for e in range(E)]}))
    assert [s for s in lost if "g1" in s] == [
        f"replica: layer {la} expert {e} added on g1: its load grew"
        for la, e in [(0, 0), (1, 0), (1, 1)]
    ]
    shown = rig.observer.shown(experts=True)
    assert shown["raymoe_replicas_added_total"] == {("g0",): 4, ("g1",): 8}
    assert shown["raymoe_replicas_dropped_total"] == {("g0",): 4, ("g1",): 0}
    assert shown["raymoe_expert_replicas"][("1", "3")] == 1
    assert len(shown["raymoe_expert_load"]) == L * E


def test_many_changes_at_once_are_one_sentence() -> None:
    rig = Rig()
    everything = [(layer, expert) for layer in range(L) for expert in range(E)]
    rig.look(status(group("g0")), table_of(1, {"g0": everything}))
    said = rig.look(status(group("g0")), table_of(2, {"g0": everything, "g1": everything}))
    assert said == ["replica: 8 replicas added on g1"]


def test_groups_and_routers_that_come_and_go() -> None:
    rig = Rig()
    table = table_of(1, HALVES)
    rig.look(status(group("g0"), group("g1")), table)
    dead = group("g1", state="lost", deaths=1, last_error="killed")
    assert rig.look(status(group("g0"), dead, ready=False), table) == [
        "alarm: group g1 was lost: killed",
        "alarm: an expert has no ready replica: requests wait for it",
    ]
    back = group("g1", deaths=1, speed=0.5)
    assert rig.look(status(group("g0"), back, group("g2"), routers=[]), table) == [
        "group: group g1: lost → ready",
        "group: group g1: speed 1.00 → 0.50",
        "group: group g2 (default) has joined the fleet",
        "alarm: router-1 was lost",
        "group: every expert has a ready replica",
    ]
    assert rig.look(status(group("g0"), group("g2"), routers=[]), table) == [
        "group: group g1 has left the fleet"
    ]


def test_a_router_that_leaves_is_not_lost() -> None:
    rig = Rig()
    table = table_of(1, HALVES)
    serving = status(group("g0"), group("g1"))
    rig.look(serving, table)
    (router,) = serving["routers"]
    leaving = status(group("g0"), group("g1"), routers=[{**router, "state": "draining"}])
    assert rig.look(leaving, table) == ["router: router-1 leaves: no new requests"]
    gone = status(group("g0"), group("g1"), routers=[])
    assert rig.look(gone, table) == ["router: router-1 has left"]


def test_plans_and_the_reconcilers_sentences_are_taken_over_once() -> None:
    rig = Rig()
    calm, table = status(group("g0"), group("g1")), table_of(1, HALVES)
    plan = {"at": 5.0, "trigger": "load", "loading_s": 0.25, "promised": 0.1, "realised": None}
    detail = "add layer 0: expert 1 on g1, to relieve g0"  # told with the replica, once it is there
    events = [{"at": 5.0, "event": detail}, {"at": 5.0, "event": "delta plan: 1 loads"}]
    rig.history = {"events": events, "plans": [plan]}
    assert rig.look(calm, table) == ["plan: delta plan: 1 loads"]
    assert rig.look(calm, table) == []
    both = {**HALVES, "g1": [*HALVES["g1"], (0, 1)]}
    told = rig.look(calm, table_of(2, both), why=lambda _: (0.0, detail))
    assert told == ["replica: layer 0 expert 1 added on g1: to relieve g0"]
    shown = rig.observer.shown(experts=False)
    assert shown["raymoe_plans_total"] == {("load",): 1}
    assert shown["raymoe_plan_gain_predicted"] == {(): 0.1}
    assert shown["raymoe_plan_gain_realised"] == {}
    assert "raymoe_expert_load" not in shown
    later = {**plan, "at": 9.0, "trigger": "groups"}
    rig.history = {"events": [], "plans": [later, {**plan, "realised": 0.08}]}
    rig.look(calm, table)
    shown = rig.observer.shown(experts=False)
    assert shown["raymoe_plans_total"] == {("load",): 1, ("groups",): 1}
    assert shown["raymoe_plan_gain_realised"] == {(): 0.08}


def test_loads_by_share_and_balancedness_by_layer() -> None:
    rig = Rig()
    load = np.array([[4.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    rig.look(status(group("g0"), group("g1")), table_of(1, HALVES), load)
    assert rig.observer.group_load() == {"g0": 4.0, "g1": 2.0}
    assert rig.observer.layer_balancedness() == {0: 0.75}, "(6 / 2) / (4 / 1); no load, no figure"
    view = rig.observer.view(0, 0.0, [0, 7])
    assert view["layers"]["0"]["load"] == [4.0, 0.0, 1.0, 1.0]
    assert view["layers"]["0"]["replicas"][2] == [(1, 1.0)]
    assert view["layers"]["7"] == {"groups": [], "load": [], "replicas": []}
    assert view["latency_s"] == {"g0": 0.5}
    assert view["layers"]["0"]["why"] == {}
    told = rig.observer.view(0, 0.0, [0], why=True)["layers"]["0"]["why"]
    assert set(told) == {"0,0", "1,0", "2,1", "3,1"}
    assert told["2,1"] == {"since": 0.0, "why": "its load grew"}


def test_answers_of_routers_that_end_are_kept() -> None:
    rig = Rig()
    table, groups = table_of(1, HALVES), [group("g0"), group("g1")]
    rig.look(status(*groups), table)
    profile = {"answers": {"g0": 3}, "latency_s": {"g0": 1.0}}
    new = {"id": "router-2", "state": "ready", "profile": profile}
    rig.look(status(*groups, routers=[new]), table)
    shown = rig.observer.shown(experts=False)
    assert shown["raymoe_group_messages_total"] == {("g0",): 7}
    assert shown["raymoe_group_latency_seconds_total"] == {("g0",): 3.0}


def test_history_has_rates_and_quantiles_of_its_time_only() -> None:
    rig = Rig()
    calm, table = status(group("g0"), group("g1", state="loading")), table_of(1, HALVES)
    first = [0.0] * 21 + [5.0, 1000.0]
    for made, slow in ((0.0, 0), (50.0, 4), (50.0, 4)):
        counts = list(first)
        counts[5] += slow  # 40 to 60 ms
        tokens = {(): made}
        rig.look(
            calm,
            table,
            values={
                "raymoe_generation_tokens_total": tokens,
                "raymoe_time_to_first_token_seconds": {(): counts[-23:]},
            },
        )
    points = rig.observer.view(0, 0.0, [])["history"]
    assert [point["tokens_per_s"] for point in points] == [25.0, 0.0]
    assert points[0]["first_token_p50_s"] == pytest.approx(0.05)
    assert points[1]["first_token_p50_s"] is None and points[0]["groups"] == 1
    assert rig.observer.view(0, points[0]["at"], [])["history"] == points[1:]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 9.9), min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(values: list[float], q: float) -> None:
    bounds = tuple(float(b) for b in range(1, 11))
    counts = np.zeros(11)
    for value in values:
        counts[int(np.searchsorted(bounds, value))] += 1
    got = quantile(bounds, counts, q)
    rank = max(int(np.ceil(q * len(values))), 1)
    true = sorted(values)[rank - 1]
    assert (got is not None and abs(np.ceil(got) - np.ceil(true)) <= 1e-6) or abs(got - true) <= 1.0
