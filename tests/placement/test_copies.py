"""Second copies: as many as fit, on other nodes, the heaviest experts first."""

from __future__ import annotations

import numpy as np

from placement.actions import Load
from placement.copies import with_copies
from placement.fake import FakeFleet
from placement.initial import place_at_start
from placement.reconcile import ReconcileConfig, Reconciler
from placement.types import bytes_by_group
from tests.placement.fleets import fleet


def test_all_twice_where_memory_allows_and_on_another_node() -> None:
    spec = fleet(groups=4, layers=2, slots=12)
    once = place_at_start(spec, experts=12)
    twice = with_copies(once, spec, 2)
    assert (twice.copies() == 2).all()
    assert (twice.resident >= once.resident).all()
    nodes = np.array([g.node for g in spec.groups])
    for layer, expert in np.ndindex(2, 12):
        assert len(set(nodes[twice.resident[layer, expert]])) == 2
    np.testing.assert_allclose(twice.share.sum(2), 1.0)
    assert with_copies(once, spec, 1) is once


def test_the_heaviest_first_within_the_budget_and_not_on_those_that_leave() -> None:
    spec = fleet(groups=3, layers=1, slots=6, reserve_bytes=10)
    load = np.arange(12, dtype=float)[None]
    staying = np.array([True, True, False])
    once = place_at_start(spec, load)
    more = with_copies(once, spec, 2, load, staying)
    added = more.copies()[0] > 1
    assert added.any() and load[0, added].min() > load[0, ~added].max()
    held = bytes_by_group(more.resident, spec.expert_bytes)
    assert (held <= spec.budget_bytes).all() and held[2] == (once.resident[:, :, 2].sum() * 10)


def test_the_reconciler_keeps_two_and_makes_them_anew_after_a_loss() -> None:
    spec = fleet(groups=4, layers=2, slots=20)
    fake = FakeFleet(spec, 2, 12)
    mind = Reconciler(config=ReconcileConfig(copies=2))

    def settle(start: float) -> int:
        loads = 0
        for now in range(40):
            actions = mind.step(fake.snapshot(), start + now)
            loads += sum(isinstance(a, Load) for a in actions)
            fake.execute(actions, start + now)
            fake.advance(start + now + 1.0)
        return loads

    settle(0.0)
    assert (fake.ready.sum(2) == 2).all()
    fake.lose("g2")
    assert fake.ready.any(2).all(), "no expert is lost"
    assert settle(100.0) > 0
    assert (fake.ready.sum(2) == 2).all()
    assert settle(200.0) == 0, "and then it rests"
