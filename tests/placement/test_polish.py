"""Polishing: never worse, never against a constraint, and better than the search alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.dwell import Held
from placement.flows import Flows
from placement.forecast import Forecast
from placement.layout import Layout
from placement.plan import PlanConfig
from placement.planner import delta_plan, full_plan
from placement.polish import Polisher
from placement.pour import host_lists, pour
from placement.score import layer_score
from placement.types import bytes_by_group
from tests.placement.fleets import fleet


def layout(rng, layers, experts, groups, extra):
    resident = np.zeros((layers, experts, groups), bool)
    for layer in range(layers):
        resident[layer, np.arange(experts), rng.integers(groups, size=experts)] = True
        for e in rng.integers(experts, size=extra):
            resident[layer, e, rng.integers(groups)] = True
    return resident


def polisher(rng, resident, *, free, price=0.0, margin=0.0, allowed=None, pool=1000, **more):
    layers, experts, groups = resident.shape
    size = rng.integers(1, 4, layers) * 10
    load = rng.dirichlet(np.full(experts, 0.5), size=(layers, 5))
    return Polisher(
        Layout(
            load=load,
            resident=resident,
            allowed=np.ones(groups, bool) if allowed is None else allowed,
            room=np.full(groups, free, np.int64),
            size=size,
            rate=rng.choice([0.25, 0.5, 1.0], groups),
            base=np.zeros(groups),
            price=np.full(groups, price),
            margin=margin,
            pool=pool,
            **more,
        )
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.booleans(), st.sampled_from([0, 30, 1000]))
def test_bytes_copies_and_score_are_what_they_are_said_to_be(seed, groups, trades, pool):
    rng = np.random.default_rng(seed)
    before = layout(rng, 3, 8, groups, int(rng.integers(0, 8)))
    pinned = before & (rng.random(before.shape) < 0.2)
    barred = ~before & (rng.random(before.shape) < 0.2)
    allowed = rng.random(groups) < 0.8
    work = polisher(
        rng,
        before.copy(),
        free=int(rng.integers(0, 50)),
        allowed=allowed,
        held=Held(pinned=pinned, barred=barred),
        pool=pool,
    )
    start, room = work.score.copy(), work.room.copy()
    work.run(12, trades=trades)
    after = work.resident
    assert work.score.sum() <= start.sum() + 1e-12
    assert after.any(2).all()
    if not trades:  # layers keep their copies
        assert (work.score <= start + 1e-12).all()
        assert (after.sum((1, 2)) == before.sum((1, 2))).all()
    grown = int(((after.sum((1, 2)) - before.sum((1, 2))) * work.layout.size).sum())
    assert grown <= pool and work.pool == pool - grown
    used = bytes_by_group(after, work.layout.size) - bytes_by_group(before, work.layout.size)
    np.testing.assert_array_equal(room - used, work.room)
    assert (work.room >= np.minimum(room, 0)).all()
    assert not (after & ~before)[:, :, ~allowed].any()
    assert not (pinned & ~after).any() and not (barred & after).any()
    hosts, copies = host_lists(after)
    made = work.layout
    again = layer_score(pour(made.load, hosts, copies, made.rate, made.base).level, made.rate)
    np.testing.assert_allclose(again, work.score, rtol=0.05)  # pouring in another order
    assert len(work.changes) > 0 or (work.score == start).all()


def test_it_finds_what_the_search_misses():
    """Few copies, many loads that may come: the layout is better for all of them together."""
    rng = np.random.default_rng(0)
    spec = fleet(groups=8, layers=4, slots=20, speeds=[1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25])
    load = rng.lognormal(0, 0.8, (4, 32)) * 1e4
    cases = load * rng.lognormal(0, 0.4, (12, 4, 32))
    forecast = Forecast(load=load, scenarios=cases, spread=load * 0.4)
    plain = full_plan(forecast, spec, PlanConfig(budget_bytes=80, polish=0))
    better = full_plan(forecast, spec, PlanConfig(budget_bytes=80, polish=60))
    assert better.after_s < 0.97 * plain.after_s
    assert better.placement.resident.sum() == plain.placement.resident.sum()


def test_a_plan_that_restores_is_polished_too():
    rng = np.random.default_rng(0)
    spec = fleet(groups=7, layers=4, slots=24, speeds=[1, 1, 1, 1, 0.5, 0.5, 0.25])
    load = rng.lognormal(0, 0.8, (4, 32)) * 1e4
    cases = load * rng.lognormal(0, 0.4, (12, 4, 32))
    forecast = Forecast(load=load, scenarios=cases, spread=load * 0.4)
    lost = full_plan(forecast, spec, PlanConfig(polish=0)).placement
    lost.resident[:, :4] = False  # what a group that is gone alone had
    plans = [
        delta_plan(forecast, spec, lost, PlanConfig(horizon_s=1e4, polish=polish))
        for polish in (0, 36)
    ]
    assert all(plan.owed for plan in plans)
    assert plans[1].after_s < plans[0].after_s


def test_layers_trade_copies():
    """A copy no use to its layer goes where another layer needs one: bytes are short."""
    load = np.full((2, 4), 1.0)
    load[1, 0] = 4.0
    resident = np.zeros((2, 4, 2), bool)
    resident[:, [0, 1], 0] = resident[:, [2, 3], 1] = True
    resident[0, 0, 1] = True  # a spare copy in the level layer
    made = Layout(
        load=load[:, None, :],
        resident=resident,
        allowed=np.ones(2, bool),
        room=np.array([0, 0]),
        size=np.array([10, 10]),
        rate=np.ones(2),
        base=np.zeros(2),
        price=np.zeros(2),
        margin=0.001,
    )
    work = Polisher(made)
    work.run(20)
    assert resident.sum((1, 2)).tolist() == [4, 5] and resident[1, 0].all()
    traded = [c for c in work.changes if c.kind == "replace" and c.other_layer == 0]
    assert [(c.layer, c.other_expert) for c in traded] == [(1, 0)]


def test_a_first_look_agrees_with_pouring_everything():
    """Where only the experts that change are replicated, both are the same."""
    rng = np.random.default_rng(8)
    resident = layout(rng, 3, 8, 4, 0)
    work = polisher(np.random.default_rng(9), resident, free=40)
    flows, layer = Flows(work.layout), np.arange(3)
    experts = np.tile([1, -1], (3, 1))
    hosts = np.full((3, 2, 2), 4)
    hosts[:, 0] = [0, 3]
    told = flows.gain(layer, experts, hosts)
    _, copies = flows.changed(layer, experts, hosts)
    poured = flows.pour(layer, *flows.changed(layer, experts, hosts))
    assert copies[:, 1].tolist() == [2, 2, 2]
    found = flows.score - layer_score(poured.level, work.layout.rate)
    np.testing.assert_allclose(told, found, atol=1e-12)


def test_dear_bytes_and_a_byte_limit_are_heeded():
    rng = np.random.default_rng(1)
    resident = layout(rng, 3, 12, 4, 4)
    dear = polisher(np.random.default_rng(2), resident.copy(), free=100, price=1.0)
    dear.run(10)
    assert not dear.changes and (dear.resident == resident).all()
    spec = fleet(groups=4, layers=3, slots=20)
    load = rng.lognormal(0, 1, (3, 12)) * 1e4
    steady = Forecast(load=load, scenarios=load[None], spread=load * 0)
    first = full_plan(steady, spec, PlanConfig(polish=0)).placement
    other = Forecast(load=load[:, ::-1], scenarios=load[None, :, ::-1], spread=load * 0)
    plan = delta_plan(other, spec, first, PlanConfig(horizon_s=1e5, interval_bytes=60))
    assert plan.loaded_bytes <= 60


def test_the_same_input_gives_the_same_plan():
    rng = np.random.default_rng(3)
    resident = layout(rng, 2, 10, 3, 5)
    runs = []
    for _ in range(2):
        work = polisher(np.random.default_rng(4), resident.copy(), free=40)
        work.run(10)
        runs.append(work.resident)
    np.testing.assert_array_equal(*runs)


def test_copies_do_not_gather_on_one_node():
    rng = np.random.default_rng(6)
    node = np.array([0, 0, 1, 1])
    resident = np.zeros((3, 10, 4), bool)
    resident[:, np.arange(10), rng.integers(2, size=10)] = True
    resident[:, :4, 2] = True  # four experts with a copy on either node
    for way in (node, None):
        work = polisher(np.random.default_rng(7), resident.copy(), free=40, node=way)
        work.run(25)
        several = work.resident.sum(2) > 1
        on = np.stack([work.resident[:, :, node == n].any(2) for n in (0, 1)])
        apart = on.all(0)[several]
        assert work.changes and (apart.all() if way is not None else True)


@pytest.mark.parametrize("groups", [1, 2])
def test_one_group_leaves_nothing_to_polish(groups):
    rng = np.random.default_rng(5)
    work = polisher(rng, layout(rng, 1, 4, groups, 0), free=0)
    work.run(3)
    assert work.resident.any(2).all()
