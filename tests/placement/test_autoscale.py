"""Survival by the byte, and how many groups of which kind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from placement.autoscale import Autoscaler, Kind, ScaleConfig, moving_bytes
from placement.errors import DoesNotFit, PlacementError
from placement.forecast import Forecast
from placement.initial import place_at_start
from placement.plan import PlanConfig
from placement.planner import full_plan
from placement.survive import shortfall
from tests.placement.fleets import fleet

BIG = Kind(name="big", speed=2.0, memory_bytes=400, price=3.0)
SMALL = Kind(name="small", speed=1.0, memory_bytes=200, price=1.0)


def everything(layers=3, experts=16):
    return np.ones((layers, experts), bool)


def test_nothing_to_survive_is_survived():
    assert shortfall(fleet(groups=1), everything()) == (0, "")


@pytest.mark.parametrize(
    ("survive", "slots", "missing"),
    [("group", 15, 30), ("group", 16, 0), ("node", 20, 80), ("node", 24, 0)],
)
def test_survival_is_counted_in_bytes(survive, slots, missing):
    # 48 experts of 10 bytes; 4 groups on 2 nodes
    found, name = shortfall(fleet(groups=4, slots=slots, survive=survive), everything())
    assert found == missing
    assert bool(name) == bool(missing)


def test_the_reserve_counts_and_the_largest_group_is_the_worst_loss():
    spec = fleet(groups=4, slots=16, survive="group", reserve_bytes=10)
    assert shortfall(spec, everything())[0] == 30
    big = replace(spec.groups[2], memory_bytes=400)
    spec = replace(spec, groups=(*spec.groups[:2], big, spec.groups[3]), reserve_bytes=0)
    assert shortfall(spec, everything()) == (0, "")
    poor = tuple(replace(g, memory_bytes=100) for g in spec.groups if g is not big)
    spec = replace(spec, groups=(*poor, big))
    assert shortfall(spec, everything()) == (180, "group g2")


def test_a_plan_that_would_not_survive_is_refused():
    load = np.ones((3, 16))
    forecast = Forecast(load=load, scenarios=load[None], spread=load * 0)
    with pytest.raises(DoesNotFit, match=r"survive: node .* 80 bytes"):
        full_plan(forecast, fleet(groups=4, slots=20, survive="node"))


def test_second_replicas_prefer_another_node():
    rng = np.random.default_rng(0)
    load = rng.lognormal(0, 1.5, (3, 16)) * 1e4
    forecast = Forecast(load=load, scenarios=load[None], spread=load * 0)
    apart = {}
    for survive in ("none", "node"):
        spec = fleet(groups=4, slots=30, survive=survive)
        resident = full_plan(forecast, spec, PlanConfig(margin=0.0)).placement.resident
        nodes = np.stack([resident[:, :, 0::2].any(2), resident[:, :, 1::2].any(2)]).all(0)
        twice = resident.sum(2) > 1
        apart[survive] = (nodes & twice).sum() / max(twice.sum(), 1)
    assert apart["node"] >= apart["none"] and apart["node"] > 0.6


def scaler(**more):
    settings = {"up_after_s": 10.0, "down_after_s": 30.0, "cool_down_s": 20.0, **more}
    return Autoscaler(ScaleConfig(**settings), (BIG, SMALL))


def run(auto, spec, busy, times, **more):
    """busy: utilisation of the fleet's groups. Returns the decisions."""
    load = np.full((3, 16), busy * spec.pair_rate.sum() / 48)
    placement = place_at_start(spec, experts=16)
    return [auto.step(spec, load, placement, float(t), **more) for t in times]


def test_a_busy_fleet_grows_after_a_while_and_then_cools_down():
    decisions = run(scaler(), fleet(groups=4, slots=20), 1.2, [0, 5, 10, 15, 40, 51])
    assert [bool(d.add) for d in decisions] == [False, False, True, False, True, False]
    assert decisions[2].add == (("small", 4),)  # 4 -> 8 of speed 1 for 0.6; cheapest per speed
    assert "utilisation 1.20" in decisions[2].why


def test_a_kind_that_runs_out_gives_way_to_the_next():
    auto = Autoscaler(ScaleConfig(), (BIG, replace(SMALL, most=1)))
    decisions = run(auto, fleet(groups=4, slots=20), 1.2, [0, 10])
    assert dict(decisions[1].add) == {"small": 1, "big": 2}


def test_a_short_peak_changes_nothing():
    auto, spec = scaler(), fleet(groups=4, slots=20)
    seen = run(auto, spec, 1.2, [0, 5]) + run(auto, spec, 0.6, [8]) + run(auto, spec, 1.2, [12, 18])
    assert not any(d.add or d.retire for d in seen)


def test_queueing_grows_the_fleet_even_when_it_is_not_busy():
    auto = scaler(queue_s=0.01)
    decisions = run(auto, fleet(groups=4, slots=20), 0.5, [0, 10], queue_s=0.05)
    assert decisions[1].add == (("small", 1),) and "queueing" in decisions[1].why


def test_an_idle_fleet_retires_the_group_that_is_cheapest_to_empty():
    spec = fleet(groups=4, slots=40, speeds=[1, 1, 1, 0.5])
    auto = scaler()
    decisions = run(auto, spec, 0.3, [0, 15, 30, 45])
    assert [d.retire for d in decisions] == [(), (), ("g3",), ()]
    placement = place_at_start(spec, experts=16)
    moved = [moving_bytes(spec, placement, g) for g in range(4)]
    assert moved[3] == min(moved) and f"{moved[3]} bytes to move" in decisions[2].why


def test_no_group_goes_that_memory_or_survival_needs():
    spec = fleet(groups=4, slots=16, survive="group")
    assert not run(scaler(), spec, 0.1, [0, 40])[1].retire
    assert not run(scaler(least=4), fleet(groups=4, slots=40), 0.1, [0, 40])[1].retire


def test_a_fleet_that_would_not_survive_a_loss_grows_at_once():
    spec = fleet(groups=4, slots=15, survive="group", experts_of_layer=(16, 16, 16))
    decision = run(scaler(), spec, 0.5, [0])[0]
    assert decision.add == (("small", 1),) and "30 bytes missing" in decision.why


def test_impossible_settings_are_refused():
    with pytest.raises(PlacementError, match="low < target"):
        ScaleConfig(low=0.9)
    with pytest.raises(PlacementError, match="least"):
        ScaleConfig(least=0)
    with pytest.raises(PlacementError, match="positive"):
        Kind(name="x", speed=0.0, memory_bytes=1)
    with pytest.raises(PlacementError, match="at least one kind"):
        Autoscaler(ScaleConfig(), ())


def test_kinds_are_chosen_by_their_measured_speed_for_their_price():
    spec = fleet(groups=2, layers=3, slots=50, speeds=[4.0, 1.0])
    named = zip(spec.groups, ("big", "small"), strict=True)
    spec = replace(spec, groups=tuple(replace(g, kind=kind) for g, kind in named))
    asked = run(scaler(), spec, 1.2, [0, 10])[1].add
    assert {name for name, _ in asked} == {"small"}, "as declared: 1 for 1 before 2 for 3"
    auto = scaler()
    auto.learn(spec)
    assert {name for name, _ in run(auto, spec, 1.2, [0, 10])[1].add} == {"big"}, "4 for 3"
    auto = scaler()
    auto.learn(spec)
    rest = replace(spec, groups=spec.groups[1:])
    auto.learn(rest)  # the last one of the kind has gone: what it did is known
    assert run(auto, rest, 1.2, [0, 10])[1].add == (("big", 1),)
    away = scaler()
    away.learn(spec, away=frozenset({"g0"}))
    assert away.speed_of(BIG, spec) == BIG.speed


def measured(auto, busiest, used, times):
    spec = fleet(groups=4, slots=20)
    load, placement = np.full((3, 16), 1.0), place_at_start(spec, experts=16)
    return [auto.step(spec, load, placement, float(t), measured=busiest, used=used) for t in times]


def test_one_busy_group_is_a_matter_of_placement_at_first_and_worth_one_group_later():
    auto = scaler(uneven_s=60.0, cool_down_s=5.0)
    decisions = measured(auto, 0.96, 0.5, range(0, 500, 5))
    added = [(5 * at, d.add) for at, d in enumerate(decisions) if d.add]
    assert added == [(60, (("small", 1),))], "once, however long it lasts"
    assert "busiest group stays at 0.96" in decisions[12].why
    assert "did not help" in " ".join(d.why for d in decisions)
    # it has helped, but not enough: another one
    decisions = measured(auto, 0.84, 0.4, range(500, 800, 5))
    assert sum(bool(d.add) for d in decisions) == 1
    # all of them are busy: as many as it takes
    assert measured(auto, 0.96, 0.9, [800, 812])[1].add == (("small", 2),)


def test_a_short_time_with_one_busy_group_changes_nothing():
    auto = scaler(uneven_s=60.0)
    seen = measured(auto, 1.0, 0.7, range(0, 55, 5)) + measured(auto, 0.75, 0.7, range(55, 300, 5))
    assert not any(d.add or d.retire for d in seen)
    assert not any(d.retire for d in measured(auto, 0.5, 0.2, range(300, 500, 5))), (
        "nor is one retired while the busiest has its part to do"
    )
