"""Groups on demand: the autoscaler's decisions as actions, and what they save in a simulation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.actions import Drain, Spawn
from placement.autoscale import Autoscaler, Kind, ScaleConfig, fleet_for
from placement.fake import FakeFleet
from placement.plan import PlanConfig
from placement.reconcile import ReconcileConfig, Reconciler
from placement.simulate import simulate
from tests.placement.fleets import fleet

KIND = Kind(name="default", speed=1.0, memory_bytes=120, bandwidth_bytes_per_s=1e6)
SCALE = ScaleConfig(
    target=0.6, high=0.8, low=0.45, up_after_s=0.0, down_after_s=2.0, cool_down_s=0.9
)
PLAN = ReconcileConfig(plan=PlanConfig(horizon_s=1e4, polish=0), plan_every_s=0.5)


def daily(windows=30, peak=4.0, layers=2, experts=8):
    """Pairs of one window, busiest in the middle; `peak` groups' worth of work there."""
    rng = np.random.default_rng(0)
    weight = rng.lognormal(0, 0.5, (layers, experts))
    weight /= weight.sum()
    day = 0.1 + 0.9 * np.sin(np.arange(windows) / windows * np.pi) ** 4
    return np.round(weight * day[:, None, None] * peak * 1e6)


def test_a_varying_load_needs_fewer_group_seconds_than_a_fleet_for_its_peak():
    window_s = 30.0
    load, spec = daily(), fleet(groups=1, layers=2, slots=20)
    counts = load * window_s
    slow = replace(SCALE, down_after_s=2 * window_s, cool_down_s=0.9 * window_s)
    scaler = Autoscaler(slow, (KIND,))
    elastic = simulate(counts, spec, PLAN, window_s=window_s, autoscaler=scaler, start_s=5.0)
    peak_load = load[load.sum((1, 2)).argmax()]
    large = fleet_for(spec, peak_load, SCALE, (KIND,), elastic.balancedness)
    peak = simulate(counts, large, PLAN, window_s=window_s)
    assert peak.busiest < SCALE.high
    assert abs(peak.group_s - len(large.groups) * len(counts) * window_s) < 1e-6
    assert elastic.group_s < 0.75 * peak.group_s
    assert sum(elastic.missing) == 0 and elastic.behind_s[-1] == 0
    assert max(elastic.groups) >= 5 and elastic.groups[-1] <= 2


def test_spawns_are_asked_for_until_seen_and_then_no_more():
    spec = fleet(groups=1, layers=2, slots=16)
    fake = FakeFleet(spec, 2, 8, (KIND,), start_s=5.0)
    mind = Reconciler(config=PLAN, autoscaler=Autoscaler(SCALE, (KIND,)))
    mind.step(fake.snapshot(), 0.0)
    busy = np.full((2, 8), 2e6 / 16)
    asked = [a for a in mind.step(fake.snapshot(busy, 1.0), 1.0) if isinstance(a, Spawn)]
    again = [a for a in mind.step(fake.snapshot(), 1.1) if isinstance(a, Spawn)]
    assert asked == again and len(asked) == 3  # 2 groups' work at 0.6
    assert len({a.group for a in asked}) == 3
    fake.execute(asked, 1.1)
    fake.execute(asked, 1.1)  # repeated safely
    assert len(fake.starting) == 3
    for now in (1.2, 3.0):  # they start: what comes counts, cool-down or not
        assert not any(isinstance(a, Spawn) for a in mind.step(fake.snapshot(busy * now, now), now))
    fake.advance(7.0)
    assert len(fake.fleet.groups) == 4
    names = {*fake.fleet.ids}
    more = mind.step(fake.snapshot(busy * 20, 2.0), 9.0)
    fresh = [a.group for a in more if isinstance(a, Spawn)]
    assert fresh and not names & set(fresh)


def test_a_drain_is_asked_for_until_seen_and_its_group_leaves_whole():
    spec = fleet(groups=3, layers=2, slots=16)
    fake = FakeFleet(spec, 2, 8, (KIND,))
    mind = Reconciler(config=PLAN, autoscaler=Autoscaler(replace(SCALE, least=2), (KIND,)))
    idle = np.full((2, 8), 1e4 / 16)
    drains = []
    for now in range(12):
        actions = mind.step(fake.snapshot(idle, 1.0), float(now))
        drains = [a for a in actions if isinstance(a, Drain)]
        if drains:
            assert drains == [
                a for a in mind.step(fake.snapshot(), now + 0.1) if isinstance(a, Drain)
            ]
            break
        fake.execute(actions, float(now))
        fake.advance(now + 1.0)
    assert len(drains) == 1
    for step in range(30):
        fake.execute(mind.step(fake.snapshot(), 20.0 + step), 20.0 + step)
        fake.advance(21.0 + step)
        assert fake.ready.any(2).all()
    assert len(fake.fleet.groups) == 2 and not fake.draining  # `least`


def test_no_traffic_and_no_autoscaler_ask_for_nothing():
    fake = FakeFleet(fleet(groups=2, layers=2, slots=16), 2, 8)
    mind = Reconciler(config=PLAN)
    for now in range(400):
        actions = mind.step(fake.snapshot(), float(now))
        assert not any(isinstance(a, Spawn | Drain) for a in actions)
        fake.execute(actions, float(now))
        fake.advance(now + 1.0)
