"""The executor on groups that do as told: what fails is tried elsewhere; nothing wedges a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.executor import Executor, Failed, Pairs
from placement.actions import Drop, Load, Publish, Snapshot
from placement.fake import FakeFleet
from placement.plan import PlanConfig
from placement.reconcile import ReconcileConfig, Reconciler
from placement.types import Placement
from tests.placement.fleets import fleet

Asked = tuple[str, Pairs, str | None, float | None, Callable[[Pairs, Failed], None]]


class ScriptedGroups:
    """Keeps what was asked for until the test answers it."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.dropped: list[tuple[str, Pairs]] = []
        self.busy: set[str] = set()
        self.mute: set[str] = set()  # cannot be copied from

    def can_bring(self, group_id: str) -> bool:
        return group_id not in self.busy

    def can_drop(self, group_id: str) -> bool:
        return True

    def can_give(self, group_id: str) -> bool:
        return group_id not in self.mute

    def bring(
        self,
        group_id: str,
        pairs: Pairs,
        source: str | None,
        limit_bytes_per_s: float | None,
        done: Callable[[Pairs, Failed], None],
    ) -> None:
        self.busy.add(group_id)

        def answered(ready: Pairs, failed: Failed) -> None:
            self.busy.discard(group_id)
            done(ready, failed)

        self.asked.append((group_id, pairs, source, limit_bytes_per_s, answered))

    def drop(self, group_id: str, pairs: Pairs) -> None:
        self.dropped.append((group_id, pairs))


class Heard:
    """What the reconciler would hear."""

    def __init__(self) -> None:
        self.done: list[tuple[int, int, str]] = []
        self.failed: list[tuple[int, int, str]] = []

    def load_done(self, cell: tuple[int, int, str]) -> None:
        self.done.append(cell)

    def load_failed(self, cell: tuple[int, int, str], now: float) -> None:
        self.failed.append(cell)


def made(limit: float | None = 1e6) -> tuple[Executor, ScriptedGroups, Heard]:
    groups, heard = ScriptedGroups(), Heard()
    return Executor(groups, heard, lambda: 0.0, limit_bytes_per_s=limit), groups, heard


def snapshot(hosts: list[list[int]], groups: int = 3) -> Snapshot:
    """One layer; hosts of each expert."""
    ready = np.zeros((1, len(hosts), groups), np.bool_)
    for expert, at in enumerate(hosts):
        ready[0, expert, at] = True
    spec = fleet(groups=groups, layers=1, slots=20)
    return Snapshot(fleet=spec, ready=ready, loading=np.zeros_like(ready))


def load(expert: int, group: str, source: str | None) -> Load:
    return Load(layer=0, expert=expert, group=group, source=source, why="because")


def test_one_call_a_group_and_source() -> None:
    executor, groups, _ = made()
    seen = snapshot([[0], [0], [1], [0]])
    executor.execute(
        [load(0, "g2", "g0"), load(1, "g2", "g0"), load(2, "g2", "g1"), load(3, "g1", "g0")], seen
    )
    assert [(a[0], a[1], a[2]) for a in groups.asked] == [
        ("g2", [(0, 0), (0, 1)], "g0"),
        ("g1", [(0, 3)], "g0"),
    ]
    executor.execute([load(2, "g2", "g1")], seen)
    assert len(groups.asked) == 2, "g2 is busy: the rest is asked for again later"
    groups.asked[0][4]([(0, 0), (0, 1)], [])
    executor.execute([load(2, "g2", "g1")], seen)
    assert groups.asked[2][:3] == ("g2", [(0, 2)], "g1")


def test_a_failed_copy_goes_to_the_next_replica_then_to_the_checkpoint_then_waits() -> None:
    executor, groups, heard = made()
    seen = snapshot([[0, 1]])
    sources = []
    for _ in range(3):
        executor.execute([load(0, "g2", "g0")], seen)
        sources.append(groups.asked[-1][2])
        groups.asked[-1][4]([], [(0, 0, "broken")])
    assert sources == ["g0", "g1", None]
    assert heard.failed == [(0, 0, "g2")], "only when the checkpoint fails too"
    executor.execute([load(0, "g2", "g0")], seen)
    assert groups.asked[-1][2] == "g0", "after that all over again"
    groups.asked[-1][4]([(0, 0)], [])
    assert heard.done == [(0, 0, "g2")]
    assert executor.stats.failed == 3 and executor.stats.copied == 1
    assert "broken" in executor.stats.last_error


def test_a_source_that_is_gone_is_not_asked() -> None:
    executor, groups, _ = made()
    groups.mute = {"g0"}
    executor.execute([load(0, "g2", "g0")], snapshot([[0, 1]]))
    assert groups.asked[0][2] == "g1"
    groups.mute = {"g0", "g1"}
    executor.execute([load(0, "g1", "g0")], snapshot([[0]]))
    assert groups.asked[1][2] is None


def test_half_a_call_that_failed_counts_half() -> None:
    executor, groups, heard = made()
    executor.execute([load(0, "g2", "g0"), load(1, "g2", "g0")], snapshot([[0], [0]]))
    groups.asked[0][4]([(0, 0)], [(0, 1, "refused")])
    assert heard.done == [(0, 0, "g2")] and not heard.failed
    assert executor.stats.copied_bytes == 10


def test_copies_are_held_back_but_not_what_requests_wait_for() -> None:
    executor, groups, _ = made(limit=7.0)
    executor.execute([load(0, "g1", "g0"), load(1, "g2", None)], snapshot([[0], []]))
    assert [(a[0], a[3]) for a in groups.asked] == [("g1", 7.0), ("g2", None)]


def test_copies_off_a_node_that_goes_are_not_held_back() -> None:
    executor, groups, _ = made(limit=7.0)
    seen = replace(snapshot([[0], [0, 1], [1]]), leaving=frozenset({"g0"}))
    executor.execute([load(0, "g2", "g0"), load(1, "g1", "g0"), load(2, "g0", "g1")], seen)
    assert [(a[0], a[3]) for a in groups.asked] == [("g2", None), ("g1", 7.0), ("g0", 7.0)]


def test_drops_go_out_together() -> None:
    executor, groups, _ = made()
    drops = [Drop(layer=0, expert=e, group="g0", why="") for e in range(3)]
    executor.execute(drops, snapshot([[0, 1]] * 3))
    assert groups.dropped == [("g0", [(0, 0), (0, 1), (0, 2)])]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_plans_end_whatever_copies_fail(seed: int) -> None:
    """Reconciler and executor together, half of all copies broken, a group cut off for a while:
    nothing is asked of it, no expert loses its last replica, and the plan is reached."""
    rng = np.random.default_rng(seed)
    spec = fleet(groups=3, layers=2, slots=16)
    world = FakeFleet(spec, 2, 8)
    groups = ScriptedGroups()
    mind = Reconciler(config=ReconcileConfig(plan=PlanConfig(), live=False))
    clock = [0.0]
    executor = Executor(groups, mind.converger, lambda: clock[0], limit_bytes_per_s=None)
    target = rng.integers(0, 3, (2, 8))
    for layer, expert in np.ndindex(2, 8):
        world.ready[layer, expert, rng.integers(0, 3)] = True
    away: frozenset[str] = frozenset()

    def turn(broken: float) -> None:
        seen = world.snapshot()
        ready = seen.ready.copy()
        ready[:, :, [g for g, name in enumerate(world.fleet.ids) if name in away]] = False
        seen = replace(seen, ready=ready, away=away)
        actions = mind.step(seen, clock[0])
        assert not [a for a in actions if getattr(a, "group", None) in away]
        for action in actions:
            if isinstance(action, Publish):
                world.table = action.table
        executor.execute(actions, seen)
        for group_id, pairs, source, _, done in groups.asked:
            g = world.fleet.ids.index(group_id)
            failed = [(*p, "broken") for p in pairs if source and rng.uniform() < broken]
            lost = {(la, e) for la, e, _ in failed}
            for layer, expert in pairs:
                world.ready[layer, expert, g] |= (layer, expert) not in lost
            done([p for p in pairs if p not in lost], failed)
        for group_id, pairs in groups.dropped:
            for layer, expert in pairs:
                world.ready[layer, expert, world.fleet.ids.index(group_id)] = False
        groups.asked, groups.dropped = [], []
        assert world.ready.any(2).all(), "an expert has no replica"
        clock[0] += 1.0

    turn(0.5)
    wanted = np.zeros_like(world.ready)
    for layer, expert in np.ndindex(2, 8):
        wanted[layer, expert, target[layer, expert]] = True
    mind.adopt(Placement(resident=wanted, share=wanted.astype(float)), world.fleet)
    for n in range(60):
        away = frozenset({"g1"}) if 5 <= n < 15 else frozenset()
        turn(0.5 if n < 30 else 0.0)
    np.testing.assert_array_equal(world.ready, wanted)
