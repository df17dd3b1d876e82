"""Whatever the target, every expert stays served at each step, and the target is reached."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.actions import Drop, Load, Publish, Retire, Snapshot
from placement.converge import Converger
from placement.table import Table
from placement.types import Bools, Placement
from tests.placement.fleets import fleet


class World:
    """A fleet that does as told, one thing at a time, in an order of the test's choosing."""

    def __init__(self, spec, ready, seed=0):
        self.spec, self.ready = spec, ready.copy()
        self.loading: Bools = np.zeros_like(ready)
        self.table: Table | None = None
        self.seen = 0  # the oldest epoch a client still uses
        self.rng = np.random.default_rng(seed)
        self.draining: frozenset[str] = frozenset()
        self.retired: list[str] = []

    def snapshot(self):
        return Snapshot(
            fleet=self.spec,
            ready=self.ready.copy(),
            loading=self.loading.copy(),
            table=self.table,
            drained=self.seen,
            draining=self.draining,
        )

    def execute(self, actions):
        for action in actions:
            if isinstance(action, Publish):
                assert self.table is None or action.table.epoch == self.table.epoch + 1
                assert not (action.table.resident & ~self.ready).any()
                self.table = action.table
            elif isinstance(action, Load):
                g = self.spec.ids.index(action.group)
                self.loading[action.layer, action.expert, g] = True
                if action.source is not None:
                    source = self.spec.ids.index(action.source)
                    assert self.ready[action.layer, action.expert, source]
            elif isinstance(action, Drop):
                g = self.spec.ids.index(action.group)
                assert self.ready[action.layer, action.expert].sum() > 1, "the last ready replica"
                assert self.table is not None and self.seen >= self.table.epoch
                assert not self.table.resident[action.layer, action.expert, g], "still listed"
                self.ready[action.layer, action.expert, g] = False
            elif isinstance(action, Retire):
                self.retired.append(action.group)
        self.check()

    def check(self):
        assert self.ready.any(2).all(), "an expert has no ready replica"
        held = np.einsum("leg,l->g", self.ready | self.loading, self.spec.expert_bytes)
        memory = np.array([g.memory_bytes for g in self.spec.groups])
        assert (held <= memory).all(), "over the group's memory"
        if self.table is not None:
            assert (self.table.resident & self.ready).any(2).all(), "a listed replica is gone"

    def tick(self):
        """One load ends, or the clients move on to the newest table."""
        cells = np.argwhere(self.loading)
        if len(cells) and self.rng.uniform() < 0.7:
            cell = tuple(cells[self.rng.integers(len(cells))])
            self.loading[cell], self.ready[cell] = False, True
        elif self.table is not None:
            self.seen = self.table.epoch


def settle(world, converger, target, steps=3000):
    calm = 0
    for now in range(steps):
        actions = converger.step(world.snapshot(), target, float(now))
        world.execute(actions)
        world.tick()
        calm = 0 if actions or world.loading.any() else calm + 1
        if calm > 6:
            return
    raise AssertionError("did not come to rest")


def single(homes, groups):
    resident = np.zeros((*homes.shape, groups), bool)
    np.put_along_axis(resident, homes[:, :, None], True, 2)
    return resident


def placement(resident):
    return Placement(resident=resident, share=resident / resident.sum(2, keepdims=True))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 3), st.booleans())
def test_random_moves_are_safe_and_arrive(seed, spare, replicas):
    rng = np.random.default_rng(seed)
    groups, layers, experts = int(rng.integers(2, 5)), 2, int(rng.integers(2, 7))
    slots = -(-layers * experts // groups) + spare
    spec = fleet(groups=groups, layers=layers, slots=slots)

    def layout():
        places = rng.permutation(np.repeat(np.arange(groups), slots))[: layers * experts]
        resident = single(places.reshape(layers, experts), groups)
        if replicas:
            for layer, expert, group in rng.permutation(np.argwhere(~resident)):
                if resident[:, :, group].sum() < slots and rng.uniform() < 0.5:
                    resident[layer, expert, group] = True
        return resident

    world, converger = World(spec, layout(), seed), Converger(term=1)
    target = placement(layout())
    settle(world, converger, target)
    if not converger.given_up:
        np.testing.assert_array_equal(world.ready, target.resident)
    else:  # only memory full to the last byte excuses that
        assert spare == 0 or replicas


def test_two_full_groups_exchange_through_the_reserve():
    spec = fleet(groups=2, layers=1, slots=3, reserve_bytes=10)
    world = World(spec, single(np.array([[0, 0, 1, 1]]), 2))
    target = placement(single(np.array([[1, 0, 0, 1]]), 2))
    settle(world, Converger(term=1), target)
    np.testing.assert_array_equal(world.ready, target.resident)


def test_two_full_groups_exchange_over_a_third():
    spec = fleet(groups=3, layers=1, slots=2)
    world = World(spec, single(np.array([[0, 0, 1, 1, 2]]), 3))
    target = placement(single(np.array([[1, 0, 0, 1, 2]]), 3))
    settle(world, Converger(term=1), target)
    np.testing.assert_array_equal(world.ready, target.resident)


def test_two_full_groups_exchange_in_place_of_a_spare_replica():
    spec = fleet(groups=2, layers=1, slots=3)
    before = single(np.array([[0, 0, 1, 1]]), 2)
    before[0, 1, 1] = before[0, 2, 0] = True  # experts 1 and 2 on both
    after = before.copy()
    after[0, 0], after[0, 3] = [False, True], [True, False]
    world, converger = World(spec, before), Converger(term=1)
    settle(world, converger, placement(after))
    np.testing.assert_array_equal(world.ready, after)
    assert not converger.given_up


def test_full_to_the_last_byte_gives_up_and_says_so():
    spec = fleet(groups=2, layers=1, slots=2)
    before = single(np.array([[0, 0, 1, 1]]), 2)
    world, converger = World(spec, before), Converger(term=1)
    settle(world, converger, placement(single(np.array([[1, 0, 0, 1]]), 2)))
    np.testing.assert_array_equal(world.ready, before)
    assert converger.given_up


def test_the_same_snapshot_gives_the_same_actions():
    spec = fleet(groups=3, layers=2, slots=5)
    world = World(spec, single(np.array([[0, 1, 2], [0, 1, 2]]), 3))
    target = placement(single(np.array([[1, 2, 0], [0, 2, 1]]), 3))
    converger = Converger(term=1)
    for now in range(40):
        one = converger.step(world.snapshot(), target, float(now))
        two = converger.step(world.snapshot(), target, float(now))
        assert [a for a in one if not isinstance(a, Publish)] == [
            a for a in two if not isinstance(a, Publish)
        ]
        world.execute(one)
        world.execute([a for a in two if isinstance(a, Load)])  # repeating does no harm
        world.tick()
    np.testing.assert_array_equal(world.ready, target.resident)


def test_a_failed_load_is_tried_again_later_and_later():
    spec = fleet(groups=2, layers=1, slots=5)
    world = World(spec, single(np.array([[0, 0]]), 2))
    target = placement(single(np.array([[0, 1]]), 2))
    converger = Converger(term=1)
    asked = []
    for now in range(60):
        actions = converger.step(world.snapshot(), target, float(now))
        for action in actions:
            if isinstance(action, Load):
                asked.append(now)
                converger.load_failed((0, 1, "g1"), float(now))
            elif isinstance(action, Publish):
                world.table, world.seen = action.table, action.table.epoch
    assert asked == [0, 5, 15, 35]


def test_a_drained_group_retires_when_empty_and_not_before():
    spec = fleet(groups=2, layers=1, slots=5)
    world, converger = World(spec, single(np.array([[0, 1]]), 2)), Converger(term=1)
    world.draining = frozenset({"g1"})
    target = placement(single(np.array([[0, 0]]), 2))
    for now in range(60):
        world.execute(converger.step(world.snapshot(), target, float(now)))
        assert not world.retired or not world.ready[:, :, 1].any()
        world.tick()
    assert set(world.retired) == {"g1"}


def test_an_expert_nobody_serves_is_loaded_first_and_may_use_the_reserve():
    spec = fleet(groups=2, layers=1, slots=3, reserve_bytes=10)
    ready = single(np.array([[0, 0, 1, 1]]), 2)
    ready[0, 3] = False
    target = single(np.array([[0, 0, 1, 1]]), 2)
    target[0, 0, 1] = True
    small = replace(spec.groups[1], memory_bytes=20)
    spec = replace(spec, groups=(spec.groups[0], small))
    snapshot = Snapshot(fleet=spec, ready=ready, loading=np.zeros_like(ready))
    loads = [
        a for a in Converger(term=1).step(snapshot, placement(target), 0.0) if isinstance(a, Load)
    ]
    assert [(a.expert, a.group, a.source) for a in loads] == [(3, "g1", None)]


def test_a_new_table_when_speeds_change_but_not_for_noise():
    spec = fleet(groups=2, layers=1, slots=5)
    world = World(spec, single(np.array([[0, 1]]), 2))
    target = placement(world.ready)
    converger = Converger(term=1)
    settle(world, converger, target)
    for speed, publishes in ((1.02, 0), (0.7, 1)):
        world.spec = replace(spec, groups=(replace(spec.groups[0], speed=speed), spec.groups[1]))
        assert len(converger.step(world.snapshot(), target, 9.0)) == publishes


def test_what_others_serve_is_copied_after_what_nobody_does():
    spec = fleet(3, layers=1, slots=4)
    ready = np.zeros((1, 4, 3), np.bool_)
    ready[0, :2, 0] = True  # experts 2 and 3 have died with a group
    goal = ready.copy()
    goal[0, :, 1] = True
    goal[0, 1, 2] = True
    target = Placement(resident=goal, share=goal / np.maximum(goal.sum(2, keepdims=True), 1))
    converger = Converger(term=1)
    snapshot = Snapshot(
        fleet=spec, ready=ready, loading=np.zeros_like(ready), table=None, drained=0
    )

    def loads():
        return {
            (a.expert, a.group)
            for a in converger.step(snapshot, target, 0.0)
            if isinstance(a, Load)
        }

    first = {(2, spec.ids[1]), (3, spec.ids[1])}
    assert loads() == first
    snapshot.loading[0, 2:, 1] = True
    assert loads() == set(), "what is on its way is waited for"
    snapshot.loading[:] = False
    snapshot.ready[0, 2, 1] = True
    converger.load_failed((0, 3, spec.ids[1]), 0.0)
    assert loads() == {(0, spec.ids[1]), (1, spec.ids[1]), (1, spec.ids[2])}, (
        "until it is tried again"
    )
    snapshot.ready[0, 3, 1] = True
    assert loads() == {(0, spec.ids[1]), (1, spec.ids[1]), (1, spec.ids[2])}


def test_what_only_a_group_that_is_leaving_has_is_copied_before_what_others_serve():
    spec = fleet(3, layers=1, slots=8)
    ready = single(np.array([[2, 0, 0, 1]]), 3)
    goal = ready.copy()
    goal[0, :2, 1] = True  # expert 1 for gain, expert 0 as its node goes
    goal[0, 3, 2] = True
    snapshot = Snapshot(
        fleet=spec, ready=ready, loading=np.zeros_like(ready), leaving=frozenset({"g2"})
    )
    converger = Converger(term=1)

    def loads(seen):
        actions = converger.step(seen, placement(goal), 0.0)
        return [(a.expert, a.group) for a in actions if isinstance(a, Load)]

    assert loads(snapshot) == [(0, "g1")]
    snapshot.loading[0, 0, 1] = True
    assert loads(snapshot) == [], "and they are waited for"
    assert loads(replace(snapshot, leaving=frozenset())) == [(1, "g1"), (3, "g2")]
    snapshot.loading[:] = False
    converger.load_failed((0, 0, "g1"), 0.0)
    assert loads(snapshot) == [(1, "g1"), (3, "g2")], "until they fail: tried again later"
