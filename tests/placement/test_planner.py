"""Plans: every constraint holds, whatever the fleet; better than what was; edge cases."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.errors import DoesNotFit, PlacementError
from placement.explain import explain, summary
from placement.forecast import Forecast, forecast_windows
from placement.initial import place_at_start
from placement.plan import PlanConfig
from placement.planner import delta_plan, full_plan, make_plan, net_gain_s
from placement.pour import host_lists, pour
from placement.types import Fleet, GroupSpec, Placement
from tests.placement.fleets import fleet


def known(load):
    load = np.asarray(load, float)
    return Forecast(load=load, scenarios=load[None], spread=np.zeros_like(load))


def skewed(seed=0, layers=3, experts=16, pairs=1e6):
    rng = np.random.default_rng(seed)
    load = rng.lognormal(0, 1, (layers, experts))
    return load / load.sum(1, keepdims=True) * pairs


def level(placement, load, spec):
    hosts, copies = host_lists(placement.resident)
    zero = np.zeros(len(spec.groups))
    poured = pour(load[:, None], hosts, copies, spec.pair_rate, zero, sweeps=8)
    return float(poured.level.max(2).sum())


def check(placement, spec, present=None, staying=None):
    """The independent checker: every constraint of a plan."""
    resident, share = placement.resident, placement.share
    present = np.ones(resident.shape[:2], bool) if present is None else present
    assert (resident.any(2) == present).all()
    np.testing.assert_allclose(share.sum(2), present, atol=1e-9)
    assert (share >= 0).all() and not share[~resident].any()
    held = np.einsum("leg,l->g", resident, spec.expert_bytes)
    budget = np.array([g.memory_bytes for g in spec.groups]) - spec.reserve_bytes
    assert (held <= budget).all()
    if staying is not None:
        assert not resident[:, :, ~staying].any()


@st.composite
def problems(draw):
    groups = draw(st.integers(1, 6))
    layers = draw(st.integers(1, 3))
    experts = draw(st.integers(1, 12))
    sizes = np.array([draw(st.sampled_from([5, 10, 15])) for _ in range(layers)])
    need = int(experts * sizes.sum())
    spare = draw(st.sampled_from([1.3, 2.0, 4.0]))
    weights = np.array([draw(st.sampled_from([1, 2, 3])) for _ in range(groups)], float)
    memory = (need * spare * weights / weights.sum()).astype(int) + 15
    specs = tuple(
        GroupSpec(
            id=f"g{g}",
            node=f"n{g % 2}",
            memory_bytes=int(memory[g]),
            speed=draw(st.sampled_from([0.1, 0.5, 1.0])),
        )
        for g in range(groups)
    )
    reserve = draw(st.sampled_from([0, 5]))
    spec = Fleet(groups=specs, expert_bytes=sizes, reserve_bytes=reserve)
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape = (draw(st.integers(1, 4)), layers, experts)
    counts = rng.integers(0, 1000, shape) * (
        rng.uniform(size=shape) < draw(st.sampled_from([0, 0.3, 1]))
    )
    return spec, counts, rng


def planned(make):
    """The plan, or None when it rightly says how many bytes are missing."""
    try:
        return make()
    except DoesNotFit as error:
        return None if error.missing_bytes > 0 else pytest.fail("no bytes are missing")


@settings(max_examples=30, deadline=None)
@given(problems())
def test_every_plan_satisfies_every_constraint(problem):
    spec, counts, rng = problem
    forecast = forecast_windows(counts)
    full = planned(lambda: full_plan(forecast, spec))
    if full is None:
        return
    check(full.placement, spec)
    later = forecast_windows(np.concatenate([counts, counts[:, :, ::-1]]))
    delta = delta_plan(later, spec, full.placement)
    check(delta.placement, spec)
    few = PlanConfig(budget_bytes=int(rng.integers(0, 60)))
    for plan in (full_plan(forecast, spec, few), delta_plan(later, spec, delta.placement, few)):
        check(plan.placement, spec)
        spare = (plan.placement.copies() - 1).sum(1)
        assert int((spare * spec.expert_bytes).sum()) <= few.budget_bytes
    staying = np.ones(len(spec.groups), bool)
    staying[int(rng.integers(len(staying)))] = False
    drained = planned(lambda: delta_plan(later, spec, delta.placement, staying=staying))
    if drained is not None:
        check(drained.placement, spec, staying=staying)


def test_the_same_input_gives_the_same_plan():
    spec = fleet(groups=4, slots=15, speeds=[1, 1, 0.5, 0.25])
    forecast = forecast_windows(np.random.default_rng(0).integers(0, 99, (4, 3, 16)))
    one, two = full_plan(forecast, spec), full_plan(forecast, spec)
    np.testing.assert_array_equal(one.placement.resident, two.placement.resident)
    np.testing.assert_array_equal(one.placement.share, two.placement.share)
    assert one.changes == two.changes


def test_a_full_plan_is_near_the_bound_on_a_mixed_fleet():
    spec = fleet(groups=8, slots=20, speeds=[1] * 4 + [0.5] * 2 + [0.25] * 2)
    load = skewed(experts=32)
    plan = full_plan(known(load), spec)
    ideal = load.sum() / spec.pair_rate.sum()
    assert level(plan.placement, load, spec) < 1.1 * ideal
    start = place_at_start(spec, experts=32)
    assert level(start, load, spec) > 1.3 * ideal


def test_a_delta_plan_on_small_cases_against_brute_force():
    """Two groups, four experts, one spare place: the best of all layouts, or near it."""
    spec = fleet(groups=2, layers=1, slots=3, speeds=[1.0, 0.5])
    rng = np.random.default_rng(0)
    layouts = [
        np.array(rows, bool)[None]
        for rows in itertools.product([(1, 0), (0, 1), (1, 1)], repeat=4)
        if (np.array(rows).sum(0) <= 3).all()
    ]
    ratios = []
    for _ in range(12):
        load = rng.lognormal(0, 1, (1, 4)) * 1e5
        best = min(level(Placement(resident=r, share=r * 1.0), load, spec) for r in layouts)
        plan = delta_plan(known(load), spec, place_at_start(spec, experts=4))
        ratios.append(level(plan.placement, load, spec) / best)
    assert np.mean(ratios) < 1.1


def test_a_good_placement_is_kept():
    spec = fleet(groups=4, slots=20)
    load = skewed()
    current = full_plan(known(load), spec).placement
    plan = delta_plan(known(load), spec, current, PlanConfig(margin=0.01))
    assert plan.mode == "keep"
    assert not plan.loads.any() and not plan.drops.any()


def test_nothing_moves_when_bytes_cost_more_than_they_gain():
    spec = fleet(groups=4, slots=20)
    slow = tuple(replace(g, bandwidth_bytes_per_s=1e-3) for g in spec.groups)
    spec = replace(spec, groups=slow)
    current = place_at_start(spec, experts=16)
    dear = delta_plan(known(skewed()), spec, current, PlanConfig(horizon_s=1.0))
    assert dear.mode == "keep"
    cheap = delta_plan(known(skewed()), spec, current, PlanConfig(horizon_s=1e9))
    assert cheap.loads.any() and net_gain_s(cheap, spec) > 0


def test_the_byte_budget_of_an_interval_is_kept():
    spec = fleet(groups=4, slots=20)
    current = place_at_start(spec, experts=16)
    for limit in (0, 10, 55, 200):
        plan = delta_plan(known(skewed()), spec, current, PlanConfig(interval_bytes=limit))
        assert sum(c.loaded_bytes for c in plan.changes) <= limit
        assert plan.loaded_bytes <= limit
        check(plan.placement, spec)


def test_the_memory_budget_of_a_full_plan_is_kept_at_the_curves():
    spec = fleet(groups=4, slots=20)
    plan = full_plan(known(skewed()), spec, PlanConfig(budget_bytes=40, rounds=0))
    extra = int((plan.placement.copies() - 1).sum())
    assert 0 < extra * 10 <= 40


def test_a_full_plan_keeps_its_memory_budget_through_the_search():
    spec = fleet(groups=4, slots=20)
    plan = full_plan(known(skewed()), spec, PlanConfig(budget_bytes=40))
    assert int((plan.placement.copies() - 1).sum()) * 10 <= 40


def test_a_lost_group_is_made_good():
    spec = fleet(groups=4, slots=20)
    current = full_plan(known(skewed()), spec).placement
    left = replace(spec, groups=spec.groups[:3])
    cut = Placement(resident=current.resident[:, :, :3], share=current.share[:, :, :3])
    plan = delta_plan(known(skewed()), left, cut)
    check(plan.placement, left)
    restored = {(o.layer, o.expert) for o in plan.owed if o.kind == "restore"}
    assert restored == set(map(tuple, np.argwhere(~cut.resident.any(2)).tolist()))


def test_a_drained_group_is_emptied_and_a_shrunk_one_within_its_bytes():
    spec = fleet(groups=4, slots=20)
    current = full_plan(known(skewed()), spec).placement
    staying = np.array([True, False, True, True])
    check(
        delta_plan(known(skewed()), spec, current, staying=staying).placement, spec, staying=staying
    )
    small = replace(spec.groups[0], memory_bytes=70)
    spec = replace(spec, groups=(small, *spec.groups[1:]))
    check(delta_plan(known(skewed()), spec, current).placement, spec)


def test_a_straggler_is_relieved():
    spec = fleet(groups=4, slots=20)
    load = skewed()
    current = full_plan(known(load), spec).placement
    slow = replace(spec, groups=(replace(spec.groups[0], speed=0.3), *spec.groups[1:]))
    plan = delta_plan(known(load), slow, current)
    assert level(plan.placement, load, slow) < 0.97 * level(current, load, slow) + 1e-9 or (
        level(current, load, slow) < 1.05 * load.sum() / slow.pair_rate.sum()
    )


def test_auto_takes_the_full_plan_when_it_wins():
    spec = fleet(groups=4, slots=12)
    bad = np.zeros((3, 16, 4), bool)
    for e in range(16):
        bad[:, e, e // 4] = True
    load = np.tile(np.repeat([1000.0, 1, 1, 1], 4), (3, 1)) * 300
    auto = make_plan(known(load), spec, Placement(resident=bad, share=bad * 1.0))
    ideal = load.sum() / spec.pair_rate.sum()
    assert level(auto.placement, load, spec) < 1.15 * ideal


@pytest.mark.parametrize(
    "load",
    [np.zeros((2, 8)), np.eye(2, 8) * 1e5, np.ones((2, 8))],
    ids=["all zero", "one expert takes all", "level"],
)
@pytest.mark.parametrize("groups", [1, 2, 12])
def test_edge_loads_and_fleets(load, groups):
    spec = fleet(groups=groups, layers=2, slots=-(-16 // groups) + 1)
    plan = full_plan(known(load), spec)
    check(plan.placement, spec)
    check(delta_plan(known(load), spec, plan.placement).placement, spec)


def test_memory_for_exactly_one_of_each():
    spec = fleet(groups=4, layers=2, slots=4)
    plan = full_plan(known(skewed(layers=2, experts=8)), spec)
    check(plan.placement, spec)
    assert (plan.placement.copies() == 1).all()


def test_layers_of_unequal_width_and_size():
    spec = fleet(groups=3, layers=2, slots=9, experts_of_layer=(4, 8))
    spec = replace(spec, expert_bytes=np.array([20, 10]))
    load = skewed(layers=2, experts=8)
    present = spec.present(8)
    check(full_plan(known(load * present), spec).placement, spec, present)


def test_active_experts_are_priced():
    """gamma spreads many cold experts; without it one group could hold them all for free."""
    spec = fleet(groups=2, layers=1, slots=20)
    specs = tuple(replace(g, gamma_s=1e-3) for g in spec.groups)
    load = np.array([[1000.0, *[1.0] * 10]])
    plan = full_plan(known(load), replace(spec, groups=specs), PlanConfig(batches_per_s=100.0))
    assert plan.placement.resident[0].sum(0).min() >= 4


def test_infeasible_plans_say_by_how_many_bytes():
    spec = fleet(groups=2, layers=2, slots=5)
    with pytest.raises(DoesNotFit, match="60 bytes"):
        full_plan(known(skewed(layers=2, experts=8)), spec)


def test_impossible_questions_are_refused():
    spec = fleet()
    forecast = known(skewed())
    with pytest.raises(PlacementError, match="layers"):
        full_plan(known(skewed(layers=2)), spec)
    with pytest.raises(PlacementError, match="shape"):
        delta_plan(forecast, spec, place_at_start(spec, experts=8))
    with pytest.raises(PlacementError, match="current"):
        make_plan(forecast, spec, mode="delta")
    with pytest.raises(PlacementError, match="mode"):
        make_plan(forecast, spec, mode="best")
    for wrong in ({"horizon_s": 0.0}, {"margin": -1.0}, {"interval_bytes": -1}):
        with pytest.raises(PlacementError):
            PlanConfig(**wrong)


def test_every_action_has_a_reason_with_numbers():
    spec = fleet(groups=4, slots=14, speeds=[1, 1, 0.5, 0.25])
    plan = delta_plan(known(skewed()), spec, place_at_start(spec, skewed(seed=5)))
    lines = explain(plan, spec)
    assert len(lines) == len(plan.changes) > 0
    assert all("gains" in line and "MB" in line and "margin" in line for line in lines)
    numbers = summary(plan, spec)
    assert numbers["loads"] == plan.loads.sum() and numbers["gain_s"] > 0
