"""The reconciler on a fake fleet: starts, follows the load, survives losses, drains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import DoesNotFit, PlacementError
from placement.fake import FakeFleet
from placement.plan import PlanConfig
from placement.reconcile import ReconcileConfig, Reconciler
from placement.simulate import Event, simulate
from placement.types import Placement
from placement.unplanned import regroup
from tests.placement.fleets import fleet


def counts(windows=6, layers=2, experts=12, seed=0, pairs=20_000):
    rng = np.random.default_rng(seed)
    weight = rng.lognormal(0, 1.2, (layers, experts))
    return np.stack([[rng.multinomial(pairs, w / w.sum()) for w in weight] for _ in range(windows)])


def config(**more):
    plan = PlanConfig(horizon_s=1e4, polish=0, **more)
    return ReconcileConfig(plan=plan, plan_every_s=0.01)


def mixed(**more):
    return fleet(groups=4, layers=2, slots=9, speeds=[1, 1, 0.5, 0.25], **more)


def test_it_beats_a_static_placement_on_a_mixed_fleet():
    live = simulate(counts(), mixed(), config(), window_s=0.02)
    static = simulate(counts(), mixed(), ReconcileConfig(live=False), window_s=0.02)
    assert live.balancedness > 1.1 * static.balancedness
    assert sum(static.loaded_bytes) == 0 < sum(live.loaded_bytes)
    assert sum(live.missing) == 0


def test_a_lost_group_is_restored_from_the_others():
    events = (Event(window=3, kind="lose", group="g0"),)
    report = simulate(counts(), mixed(), config(), window_s=0.02, events=events)
    assert report.missing[2] == 0 and report.missing[-1] == 0
    assert any("gone: ['g0']" in line for line in report.events)


def test_a_drained_group_leaves_without_a_pair_unserved():
    events = (Event(window=2, kind="drain", group="g3"),)
    report = simulate(counts(), mixed(), config(), window_s=0.02, events=events)
    assert sum(report.missing) == 0
    assert any("gone: ['g3']" in line for line in report.events)


def test_a_lost_group_may_come_back():
    events = (Event(window=1, kind="lose", group="g1"), Event(window=3, kind="join", group="g1"))
    report = simulate(counts(), mixed(), config(), window_s=0.02, events=events)
    assert report.missing[-1] == 0
    assert any("new: ['g1']" in line for line in report.events)


def test_a_straggler_calls_for_a_plan_at_once():
    events = (Event(window=3, kind="slow", group="g0", value=0.4),)
    report = simulate(counts(), mixed(), config(), window_s=0.02, events=events)
    assert any("speed changed: ['g0']" in line for line in report.events)
    assert report.balancedness > 0.8


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000))
def test_groups_die_in_the_middle_of_plans_and_every_expert_comes_back(seed):
    """Random deaths, slow-downs and memory losses while loads are under way."""
    rng = np.random.default_rng(seed)
    spec = fleet(groups=5, layers=2, slots=14, speeds=[1, 1, 1, 0.5, 0.25])
    fake, mind = FakeFleet(spec, 2, 12), Reconciler(config=config())
    shape = rng.lognormal(0, 1.5, (2, 12))
    deaths, once = 0, np.zeros((2, 12), bool)
    for now in range(120):
        if now % 12 == 0:
            shape = shape * rng.lognormal(0, 0.8, shape.shape)
        counts_now = rng.poisson(shape / shape.sum(1, keepdims=True) * 5000).astype(float)
        fake.execute(mind.step(fake.snapshot(counts_now, 0.02), now * 0.02), now * 0.02)
        served = fake.ready.any(2)
        once |= served
        lost = rng.uniform()
        if lost < 0.04 and deaths < 2 and now > 10:
            victim = str(rng.choice(fake.fleet.ids))
            fake.lose(victim)
            deaths += 1
        elif lost < 0.08:
            fake.slow(str(rng.choice(fake.fleet.ids)), float(rng.uniform(0.5, 1.5)))
        elif deaths == 0:
            assert served[once].all(), "an expert was dropped"
        held = np.einsum("leg,l->g", fake.ready | fake.loading, fake.fleet.expert_bytes)
        assert (held <= [g.memory_bytes for g in fake.fleet.groups]).all()
        if rng.uniform() < 0.6:
            fake.advance((now + 1) * 0.02)
    for now in range(200, 260):
        fake.execute(mind.step(fake.snapshot(), float(now)), float(now))
        fake.advance(now + 1.0)
    assert fake.ready.any(2).all()
    assert (fake.table.resident & fake.ready).any(2).all()


def test_a_group_that_loses_memory_is_brought_within_it():
    spec = mixed()
    fake, mind = FakeFleet(spec, 2, 12), Reconciler(config=config())
    for now in range(30):
        fake.execute(mind.step(fake.snapshot(), float(now)), float(now))
        fake.advance(now + 1.0)
    small = replace(spec.groups[0], memory_bytes=30)
    fake.fleet = replace(fake.fleet, groups=(small, *spec.groups[1:]))
    for now in range(30, 60):
        fake.execute(mind.step(fake.snapshot(), float(now)), float(now))
        assert fake.ready.any(2).all()
        fake.advance(now + 1.0)
    assert fake.ready[:, :, 0].sum() * 10 <= 30


def test_too_small_a_rest_is_said_and_the_others_serve_on():
    spec = fleet(groups=2, layers=1, slots=4)
    events = (Event(window=1, kind="lose", group="g1"),)
    windows = counts(layers=1, experts=8, windows=4)
    report = simulate(windows, spec, config(), window_s=0.02, events=events)
    assert any(line.startswith("no plan: ") and "40 bytes" in line for line in report.events)
    assert 0 < report.missing[-1] < windows[-1].sum()


def test_a_fleet_too_small_from_the_start_is_refused():
    with pytest.raises(DoesNotFit):
        simulate(counts(), fleet(groups=2, layers=2, slots=5))


def test_a_restarted_controller_goes_on_from_what_is_ready():
    spec = mixed()
    fake = FakeFleet(spec, 2, 12)
    for e in range(12):
        fake.ready[:, e, e % 4] = True
    mind = Reconciler(term=2)
    actions = mind.step(fake.snapshot(), 0.0)
    assert [type(a).__name__ for a in actions] == ["Publish"]
    assert actions[0].table.order == (2, 1)
    np.testing.assert_array_equal(actions[0].table.resident, fake.ready)


def test_small_windows_are_gathered_before_a_plan():
    spec = mixed()
    fake = FakeFleet(spec, 2, 12)
    mind = Reconciler(config=replace(config(), min_tokens=1000))
    mind.step(fake.snapshot(), 0.0)
    first = mind.target
    mind.step(fake.snapshot(np.full((2, 12), 10.0), 1.0), 1.0)
    assert mind.target is first and mind.plan is None


def test_plans_that_do_not_hold_what_they_promise_raise_the_margin():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2, (12, 2, 12)) * rng.integers(1, 4000, (12, 2, 12))
    spec, fake = mixed(), FakeFleet(mixed(), 2, 12)
    mind = Reconciler(config=config(margin=0.0, move_cost=0.0))
    seen = []
    for w, window in enumerate(noise):
        for _ in range(60):
            actions = mind.step(fake.snapshot(), w * 1.0)
            fake.execute(actions, 0.0)
            fake.advance(1e9)
        mind.step(fake.snapshot(window.astype(float), 0.02), w + 0.5)
        seen.append(mind.caution)
    assert max(seen) > 1.0
    assert spec.ids == fake.fleet.ids


def test_regroup_follows_ids():
    resident = np.zeros((1, 2, 3), bool)
    resident[0, 0, :2] = resident[0, 1, 2] = True
    share = np.array([[[0.25, 0.75, 0], [0, 0, 1.0]]])
    moved = regroup(Placement(resident=resident, share=share), ("a", "b", "c"), ("b", "d", "a"))
    assert moved.resident[0].tolist() == [[True, False, True], [False, False, False]]
    np.testing.assert_allclose(moved.share[0], [[0.75, 0, 0.25], [0, 0, 0]])
    lost = regroup(Placement(resident=resident, share=share), ("a", "b", "c"), ("b", "c"))
    np.testing.assert_allclose(lost.share[0], [[1, 0], [0, 1]])


@pytest.mark.parametrize("event", [("lose", "gx"), ("slow", "gx"), ("join", "g0")])
def test_events_of_unknown_groups_are_refused(event):
    events = (Event(window=0, kind=event[0], group=event[1]),)
    with pytest.raises(PlacementError):
        simulate(counts(windows=2), mixed(), config(), window_s=0.02, events=events)


def test_impossible_simulations_are_refused():
    with pytest.raises(PlacementError, match="shape"):
        simulate(np.ones((2, 12)), mixed())
    with pytest.raises(PlacementError, match="not one of"):
        Event(window=0, kind="explode", group="g0")
