"""Noisy speeds, flapping copies: what must not happen; and a real slow-down, which must be seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.actions import Load, Publish
from placement.dwell import Dwell, Held
from placement.errors import PlacementError
from placement.fake import FakeFleet
from placement.forecast import Forecast
from placement.plan import PlanConfig
from placement.planner import delta_plan, full_plan, make_plan
from placement.reconcile import ReconcileConfig, Reconciler
from placement.steady import SteadyFleet
from placement.types import Placement
from tests.placement.fleets import fleet


def noisy(spec, rng, size=0.05, slow=None):
    """The fleet as measured: every number off by some per cent, groups of `slow` slower."""
    groups = tuple(
        replace(
            g,
            speed=g.speed / (slow or {}).get(g.id, 1.0) * float(rng.lognormal(0, size)),
            alpha_s=g.alpha_s * float(rng.lognormal(0, 2 * size)),
            gamma_s=g.gamma_s * float(rng.lognormal(0, 2 * size)),
        )
        for g in spec.groups
    )
    return replace(spec, groups=groups)


def costly(**more):
    spec = fleet(groups=4, layers=2, slots=9, speeds=[1, 1, 0.5, 0.25], **more)
    groups = tuple(replace(g, alpha_s=4e-5, gamma_s=5e-6) for g in spec.groups)
    return replace(spec, groups=groups)


def test_noise_changes_nothing_and_a_slow_down_is_believed_when_seen_twice():
    rng, spec, steady = np.random.default_rng(0), costly(), SteadyFleet()
    first = steady.follow(spec)
    seen = [steady.follow(noisy(spec, rng)) for _ in range(300)]
    assert all(f is first for f in seen)
    slow = [steady.follow(noisy(spec, rng, slow={"g1": 3.0})) for _ in range(4)]
    assert slow[0] is first  # one report may be chance
    assert slow[-1].groups[1].speed == pytest.approx(1 / 3, rel=0.15)
    assert [g.speed for g in slow[-1].groups if g.id != "g1"] == [1, 0.5, 0.25]


def test_one_report_that_many_steps_see_is_one_report():
    spec, steady = costly(), SteadyFleet(report_s=0.5)
    first = steady.follow(spec, 0.0)
    wild = replace(spec, groups=(replace(spec.groups[0], speed=0.1), *spec.groups[1:]))
    for step in range(20):
        assert steady.follow(wild, 1.0 + 0.01 * step) is first
    assert all(steady.follow(spec, now) is first for now in (2.0, 3.0))
    assert [steady.follow(wild, now) is first for now in (4.0, 5.0)] == [True, False]


def test_one_wild_report_is_ignored_and_a_slow_drift_followed():
    spec, steady = costly(), SteadyFleet()
    first = steady.follow(spec)
    wild = replace(spec, groups=(replace(spec.groups[0], speed=0.1), *spec.groups[1:]))
    assert steady.follow(wild) is first
    for _ in range(10):
        assert steady.follow(spec) is first
    for step in range(60):
        speed = 1.0 - step / 100
        now = steady.follow(
            replace(spec, groups=(replace(spec.groups[0], speed=speed), *spec.groups[1:]))
        )
        assert now.groups[0].speed == pytest.approx(speed, rel=0.25)
    assert now.groups[0].speed < 0.5


def test_the_scale_of_speeds_does_not_matter():
    spec, steady = costly(), SteadyFleet()
    first = steady.follow(spec)
    twice = replace(
        spec,
        groups=tuple(replace(g, speed=2 * g.speed) for g in spec.groups),
        tokens_per_s=spec.tokens_per_s / 2,
    )
    assert steady.follow(twice) is first


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10_000))
def test_five_per_cent_of_noise_make_no_plan_and_no_table(seed):
    """A steady load and noisy measurements: after the first plans nothing is asked for."""
    rng = np.random.default_rng(seed)
    spec = costly()
    shape = rng.lognormal(0, 1.2, (2, 12))
    counts = shape / shape.sum(1, keepdims=True) * 20_000
    config = ReconcileConfig(
        plan=PlanConfig(horizon_s=1e4, polish=0), plan_every_s=1.0, dwell_s=0.0
    )
    fake, mind = FakeFleet(spec, 2, 12), Reconciler(config=config)
    late = []
    for now in range(45):
        fake.fleet = noisy(spec, rng) if now else spec
        actions = mind.step(fake.snapshot(counts, 1.0), float(now))
        fake.execute(actions, float(now))
        fake.advance(now + 1.0)
        late += actions if now > 20 else []
    assert not any(isinstance(a, Load | Publish) for a in late)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3))
def test_a_group_three_times_slower_loses_load_within_a_few_windows(seed, which):
    rng = np.random.default_rng(seed)
    spec = fleet(groups=4, layers=2, slots=12)
    shape = rng.lognormal(0, 1.0, (2, 12))
    counts = shape / shape.sum(1, keepdims=True) * 20_000
    config = ReconcileConfig(plan=PlanConfig(horizon_s=1e4, polish=0), plan_every_s=1.0)
    fake, mind = FakeFleet(spec, 2, 12), Reconciler(config=config)

    def carried():
        return float((fake.table.share * counts[:, :, None]).sum((0, 1))[which] / counts.sum())

    before = 0.0
    for now in range(16):
        fake.fleet = noisy(spec, rng, slow={f"g{which}": 3.0} if now >= 8 else None)
        if now == 8:
            before = carried()
        fake.execute(mind.step(fake.snapshot(counts, 1.0), float(now)), float(now))
        fake.advance(now + 1.0)
    assert before == pytest.approx(0.25, abs=0.06)
    assert carried() < 0.6 * before  # level would be 0.1 / 0.25


# -- dwell -----------------------------------------------------------------------------------


def plain(load):
    return Forecast(load=load, scenarios=load[None], spread=load * 0)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_a_delta_plan_leaves_dwelling_copies_alone(seed):
    rng = np.random.default_rng(seed)
    spec = fleet(groups=4, layers=3, slots=12, speeds=[1, 1, 0.5, 0.25])
    config = PlanConfig(horizon_s=1e4)
    current = full_plan(plain(rng.lognormal(0, 1, (3, 8)) * 1e5), spec, config).placement
    held = Held(
        pinned=current.resident & (rng.uniform(size=current.resident.shape) < 0.5),
        barred=~current.resident & (rng.uniform(size=current.resident.shape) < 0.5),
    )
    other = plain(rng.lognormal(0, 1.5, (3, 8)) * 1e5)
    for mode in ("delta", "auto"):
        plan = make_plan(other, spec, current, config, mode, None, held)
        assert held.allows(plan.loads, plan.drops)
    free = delta_plan(other, spec, current, config)
    assert free.after_s <= plan.after_s + 1e-9 or not held.allows(free.loads, free.drops)


def test_what_is_owed_does_not_wait():
    spec = fleet(groups=3, layers=1, slots=8)
    load = np.ones((1, 8)) * 1e5
    current = full_plan(plain(load), spec).placement
    everything = Held(pinned=current.resident.copy(), barred=~current.resident)
    staying = np.array([True, True, False])
    plan = delta_plan(plain(load), spec, current, None, staying, everything)
    assert not plan.placement.resident[:, :, 2].any() and plan.placement.resident.any(2).all()


def test_dwell_is_by_copy_and_ends():
    before = np.zeros((1, 2, 2), bool)
    before[0, :, 0] = True
    after = before.copy()
    after[0, 0] = [False, True]
    old, new = (Placement(resident=r, share=r.astype(float)) for r in (before, after))
    dwell = Dwell(10.0)
    assert dwell.held((1, 2, 2), ("a", "b"), 0.0) is None
    dwell.note(old, new, ("a", "b"), 0.0)
    held = dwell.held((1, 2, 2), ("b", "a"), 9.9)  # another order of groups
    assert np.argwhere(held.pinned).tolist() == [[0, 0, 0]]
    assert np.argwhere(held.barred).tolist() == [[0, 0, 1]]
    dwell.note(new, old, ("a", "b"), 9.95)  # back again: its time starts anew
    held = dwell.held((1, 2, 2), ("a", "b"), 11.0)
    assert np.argwhere(held.pinned).tolist() == [[0, 0, 0]]
    assert dwell.held((1, 2, 2), ("a", "b"), 19.95) is None


def test_no_copy_comes_and_goes_within_its_dwell():
    """A load that swings every window: without a dwell copies flap, with one they do not."""
    rng = np.random.default_rng(1)
    loads = [rng.permutation(np.geomspace(100, 20_000, 12)) for _ in range(2)]
    spec = fleet(groups=4, layers=1, slots=4)

    def shortest_stay(dwell_s):
        config = ReconcileConfig(
            plan=PlanConfig(horizon_s=1e4, margin=0.0, move_cost=0.0, polish=0),
            plan_every_s=0.5,
            dwell_s=dwell_s,
            mode="delta",
        )
        fake, mind = FakeFleet(spec, 1, 12), Reconciler(config=config)
        since: dict = {}
        shortest, last = np.inf, None
        for now in range(40):
            counts = loads[now // 3 % 2][None]
            for _ in range(4):
                fake.execute(mind.step(fake.snapshot(), float(now)), float(now))
                fake.advance(now + 0.5)
            mind.step(fake.snapshot(counts, 1.0), now + 0.5)
            held = mind.target.resident
            if last is not None:
                for cell in map(tuple, np.argwhere(held != last).tolist()):
                    shortest = min(shortest, now - since.get(cell, -np.inf))
                    since[cell] = now
            last = held
        return shortest

    assert shortest_stay(0.0) < 10 <= shortest_stay(10.0)


@pytest.mark.parametrize("bad", [{"dwell_s": -1.0}, {"speed_change": 0.0}, {"speed_change": 1.5}])
def test_bad_patience_is_refused(bad):
    with pytest.raises(PlacementError):
        ReconcileConfig(**bad)
