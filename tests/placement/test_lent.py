"""Groups that are away for a moment, gone for longer, back again; and fleets too small for all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.actions import Drop, Load, Publish
from placement.fake import FakeFleet
from placement.reconcile import ReconcileConfig, Reconciler
from placement.types import GroupSpec
from tests.placement.fleets import fleet

CALM = ReconcileConfig(live=False)


class Played:
    """A reconciler on a fake fleet whose groups may be away."""

    def __init__(self, **spec: object) -> None:
        self.fake = FakeFleet(fleet(groups=3, layers=2, **spec), 2, 9)  # type: ignore[arg-type]
        self.mind = Reconciler(config=CALM)
        self.away: frozenset[str] = frozenset()
        self.now = 0.0

    def settle(self, steps: int = 40) -> list[object]:
        done: list[object] = []
        for _ in range(steps):
            seen = replace(self.fake.snapshot(), away=self.away)
            actions = self.mind.step(seen, self.now)
            self.fake.execute(actions, self.now)
            done += actions
            self.now += 1.0
            self.fake.advance(self.now)
        return done

    def crash(self, group: str) -> GroupSpec:
        """Its memory is gone; it stays part of the fleet."""
        g = self.fake.fleet.ids.index(group)
        self.fake.ready[:, :, g] = False
        return self.fake.fleet.groups[g]


def test_nothing_is_asked_of_a_group_that_is_away_and_its_part_waits() -> None:
    played = Played(slots=20)
    played.settle()
    home = played.fake.ready.copy()
    played.crash("g1")
    played.away = frozenset({"g1"})
    done = played.settle()
    assert not [a for a in done if isinstance(a, Load | Drop)]
    (table,) = [a.table for a in done if isinstance(a, Publish)]
    assert not table.resident[:, :, 1].any(), "clients hear of it at once"
    played.away = frozenset()
    played.settle()
    np.testing.assert_array_equal(played.fake.ready, home)


def test_a_group_that_comes_back_gets_its_experts_back() -> None:
    played = Played(slots=20)
    played.settle()
    home = {g: played.fake.ready[:, :, i].copy() for i, g in enumerate(played.fake.fleet.ids)}
    spec = played.crash("g1")
    played.fake.lose("g1")
    played.settle()
    assert played.fake.ready.any(2).all(), "restored in the others"
    played.fake.join(spec)
    played.settle()
    assert played.fake.ready.any(2).all()
    for g, group in enumerate(played.fake.fleet.ids):
        np.testing.assert_array_equal(played.fake.ready[:, :, g], home[group])


def test_reserves_are_used_when_nothing_else_fits_and_given_free_again() -> None:
    # 18 experts; three groups of 8 with 2 in reserve: two of them hold 16, 12 within budget
    played = Played(slots=8, reserve_bytes=20)
    played.settle()
    spec = played.crash("g2")
    played.fake.lose("g2")
    played.settle()
    assert played.fake.ready.any(2).sum() == 16, "all memory is used, reserves too"
    assert any("reserves included" in line for line in played.mind.events)
    played.fake.join(spec)
    played.settle()
    assert played.fake.ready.any(2).all()
    held = np.einsum("leg,l->g", played.fake.ready, played.fake.fleet.expert_bytes)
    assert (held <= played.fake.fleet.budget_bytes).all()


def test_a_fleet_that_cannot_survive_another_loss_is_restored_all_the_same() -> None:
    played = Played(slots=9, survive="group")  # any two of three hold all 18; one alone does not
    played.settle()
    played.crash("g0")
    played.fake.lose("g0")
    played.settle()
    assert played.fake.ready.any(2).all()
    assert any("survive" in line for line in played.mind.events), "and it is said"
