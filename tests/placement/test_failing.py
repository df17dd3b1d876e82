"""Loads that fail on a group: tried again, then elsewhere; nothing waits for them for ever."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from placement.actions import Action, Load
from placement.around import around
from placement.failing import Failing
from placement.fake import FakeFleet
from placement.plan import PlanConfig
from placement.reconcile import ReconcileConfig, Reconciler
from placement.types import Fleet, GroupSpec, Placement, bytes_by_group
from tests.placement.fleets import fleet

IDS = ("g0", "g1")
ONE, TWO, THREE = ((0, expert, "g1") for expert in range(3))


def bars(failing: Failing, now: float, served: bool = True) -> list[list[int]]:
    """Experts of a layer of four barred from each group."""
    ready = np.zeros((1, 4, 2), np.bool_)
    ready[0, :, 0] = served
    barred = failing.bars(IDS, ready, now)
    return [np.flatnonzero(barred[0, :, g]).tolist() for g in range(2)]


def test_what_others_serve_is_barred_after_two_failures_what_nobody_does_after_one():
    failing = Failing()
    failing.failed(ONE, 0.0)
    assert bars(failing, 0.0) == [[], []] and bars(failing, 0.0, served=False) == [[], [0]]
    failing = Failing()
    failing.failed(ONE, 0.0)
    failing.failed(ONE, 5.0)
    assert bars(failing, 5.0) == [[], [0]]


def test_a_bar_ends_and_is_longer_the_next_time():
    failing, lasted = Failing(bar_s=60.0), []
    now = 0.0
    for _ in range(6):
        failing.failed(ONE, now)
        began = now
        while bars(failing, now, served=False)[1]:
            now += 1.0
        lasted.append(now - began)
    assert lasted == [60.0, 120.0, 240.0, 480.0, 480.0, 480.0]


def test_a_group_on_which_nothing_comes_in_takes_nothing_new():
    failing = Failing()
    failing.failed(ONE, 0.0)
    failing.failed(TWO, 0.0)
    assert bars(failing, 1.0) == [[], [0, 1, 2, 3]]
    assert bars(failing, 100.0) == [[], []]
    failing.failed(THREE, 100.0)
    assert bars(failing, 101.0)[1] == [0, 1, 2, 3], "and again, as nothing has come in since"
    failing.came(THREE)
    assert bars(failing, 102.0) == [[], []] and failing.troubled("g1")
    failing.only(frozenset({"g0"}))
    assert not failing.troubled("g1"), "a new life of the group starts with a clean slate"


def test_a_group_that_cannot_read_the_checkpoint_may_still_copy_from_others():
    failing = Failing()
    failing.failed(ONE, 0.0)
    failing.failed(TWO, 0.0)
    assert bars(failing, 1.0, served=False) == [[], [0, 1, 2, 3]]
    assert bars(failing, 1.0) == [[], [0, 1]], "what others serve by then is another matter"


def test_one_expert_that_fails_again_and_again_does_not_bar_the_others():
    failing = Failing()
    for now in (0.0, 5.0, 15.0):
        failing.failed(ONE, now)
    assert bars(failing, 16.0) == [[], [0]]
    assert not failing.may_try(ONE, 20.0) and failing.may_try(ONE, 36.0)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000))
def test_around_keeps_every_expert_within_the_budgets_and_off_what_is_barred(seed):
    rng = np.random.default_rng(seed)
    groups, layers, experts = int(rng.integers(2, 5)), 2, int(rng.integers(2, 8))
    slots = -(-layers * experts // (groups - 1)) + int(rng.integers(0, 3))
    spec = fleet(groups=groups, layers=layers, slots=slots, reserve_bytes=0)
    resident = np.zeros((layers, experts, groups), bool)
    for layer, expert in np.ndindex(layers, experts):
        room = spec.budget_bytes - bytes_by_group(resident, spec.expert_bytes)
        hosts = np.flatnonzero(room >= 10)
        resident[layer, expert, rng.permutation(hosts)[: rng.integers(1, 3)]] = True
    resident[~resident.any(2), int(rng.integers(groups))] = True
    before = Placement(resident=resident, share=resident / resident.sum(2, keepdims=True))
    over = bytes_by_group(resident, spec.expert_bytes) > spec.budget_bytes
    barred = np.zeros_like(resident)
    barred[:, :, int(rng.integers(groups))] = True  # that takes nothing
    ready = resident & ~barred & (rng.uniform(size=resident.shape) < 0.7)
    staying = np.ones(groups, bool)
    after = around(before, spec, barred, ready, rng.uniform(size=(layers, experts)), staying)
    assert after.resident.any(2).all()
    held = bytes_by_group(after.resident, spec.expert_bytes)
    assert (held <= np.maximum(spec.budget_bytes, np.where(over, held, 0))).all()
    np.testing.assert_allclose(after.share.sum(2), 1.0)
    left = after.resident & barred
    assert not (left & (after.resident.sum(2, keepdims=True) > 1)).any(), "others have it"
    if left.any():  # as nobody else could take it
        free = spec.budget_bytes - held
        assert (free < 10)[~barred.any((0, 1))].all()


class Faulty(FakeFleet):
    """Groups in `bad` fail every load: at once from the checkpoint, or from anywhere."""

    def __init__(self, spec: Fleet, layers: int, experts: int) -> None:
        super().__init__(spec, layers, experts)
        self.bad: set[str] = set()
        self.disk_only = True
        self.tried: list[tuple[float, str]] = []
        self.mind: Reconciler | None = None

    def _load(self, action: Load, group: int, now: float) -> None:
        if action.group in self.bad and (action.source is None or not self.disk_only):
            self.tried.append((now, action.group))
            assert self.mind is not None
            self.mind.converger.load_failed((action.layer, action.expert, action.group), now)
        else:
            before = len(self.ends)
            super()._load(action, group, now)
            if len(self.ends) > before and self.mind is not None:
                self.mind.converger.load_done((action.layer, action.expert, action.group))


def made(spec: Fleet, experts: int = 8) -> tuple[Faulty, Reconciler]:
    fake = Faulty(spec, spec.layers, experts)
    mind = Reconciler(config=ReconcileConfig(plan=PlanConfig(horizon_s=1e4), plan_every_s=10.0))
    fake.mind = mind
    return fake, mind


def run(fake: Faulty, mind: Reconciler, since: float, seconds: int, counts=None) -> list[Action]:
    done: list[Action] = []
    for now in np.arange(since, since + seconds, 1.0).tolist():
        actions = mind.step(fake.snapshot(counts, 1.0 if counts is not None else 0.0), now)
        fake.execute(actions, now)
        fake.advance(now + 0.9)
        done += actions
    return done


def test_what_nobody_serves_goes_to_another_group_at_the_first_failure():
    fake, mind = made(fleet(groups=3, layers=2, slots=12))
    run(fake, mind, 0.0, 30)
    fake.bad = {"g1"}
    fake.lose("g0")
    run(fake, mind, 30.0, 5)
    assert fake.ready.any(2).all(), "all are served again"
    assert fake.tried, "it was asked"
    assert mind.missing == "" and any("fail to load on g1" in e for e in mind.events)
    tried = len(fake.tried)
    run(fake, mind, 35.0, 50)
    assert len(fake.tried) == tried, "and it is left alone for a while"


def test_a_group_that_cannot_read_takes_over_what_it_can_copy_so_that_others_have_room():
    fake, mind = made(fleet(groups=3, layers=2, slots=8))
    run(fake, mind, 0.0, 30)
    fake.bad = {"g1"}
    fake.lose("g0")
    run(fake, mind, 30.0, 30)
    assert fake.ready.any(2).all(), "all 16 on the two that are left, though one cannot read"
    assert fake.ready[:, :, 0].sum() == 8 == fake.ready[:, :, 1].sum() and mind.missing == ""


def test_where_no_other_group_has_room_it_is_tried_again_and_said():
    fake, mind = made(fleet(groups=3, layers=2, slots=8))
    run(fake, mind, 0.0, 30)
    fake.bad, fake.disk_only = {"g1"}, False
    fake.lose("g0")
    run(fake, mind, 30.0, 200)
    assert not fake.ready.any(2).all()
    assert "fail to load on g1" in mind.missing and "no other group has room" in mind.missing
    assert len({at for at, _ in fake.tried}) >= 4, "again and again"
    assert fake.ready[:, :, 1].sum() == 8, "the other has taken in what it can hold"
    fake.bad = set()
    run(fake, mind, 230.0, 330)
    assert fake.ready.any(2).all() and mind.missing == ""


def test_a_new_group_that_fails_everything_holds_nothing_up_and_is_used_when_it_is_mended():
    fake, mind = made(fleet(groups=2, layers=2, slots=12))
    counts = np.full((2, 8), 500.0)
    run(fake, mind, 0.0, 30, counts)
    fake.bad, fake.disk_only = {"new"}, False
    fake.join(GroupSpec(id="new", node="n9", memory_bytes=120))
    run(fake, mind, 30.0, 20, counts)
    assert fake.tried
    assert not mind.target.resident[:, :, 2].any() and not mind.awaited[:, :, 2].any()
    at, tried = 50.0, len(fake.tried)
    hot = counts.copy()
    hot[0, 5] = 20_000.0
    plans = len(mind.records)
    run(fake, mind, at, 30, hot)
    assert len(mind.records) > plans, "plans for gain go on"
    assert fake.ready[0, 5].sum() == 2, "copied to the other group"
    assert len(fake.tried) == tried
    fake.bad = set()
    run(fake, mind, 80.0, 300, hot)
    assert fake.ready[:, :, 2].any(), "a while later it is tried again"


def test_a_drain_goes_on_when_a_group_fails_everything():
    fake, mind = made(fleet(groups=3, layers=2, slots=18))
    run(fake, mind, 0.0, 30)
    fake.bad, fake.disk_only = {"g1"}, False
    fake.draining = frozenset({"g0"})
    run(fake, mind, 30.0, 60)
    assert fake.fleet.ids == ("g1", "g2") and fake.ready.any(2).all()
