"""Groups that cannot load: others serve in their stead, nothing waits for them, and it is said."""

from __future__ import annotations

from pathlib import Path

from tests.actors.test_loop import drain, scale, world

ERROR = "the disk cannot be read"


def test_lost_experts_go_to_another_group_when_one_cannot_read_the_checkpoint(
    tmp_path: Path,
) -> None:
    w = world(tmp_path, groups=3, live=False)
    w.turns()
    kept = w.cluster.of("g1").resident.copy()
    w.cluster.of("g1").bad_disk = True
    w.cluster.full = True
    w.cluster.of("g0").die()
    w.turns(60)
    assert w.served() and w.loop.complete() and not w.loop.problem
    assert (w.cluster.of("g1").resident == kept).all(), "it serves what it has"
    assert w.loop.groups["g1"].last_error == ERROR, "and status says why it got no more"
    tried = w.loop.executor.stats.failed
    w.turns(100)
    assert w.loop.executor.stats.failed == tried
    w.cluster.full = False
    w.cluster.of("g0").placed = True
    w.turns(60)
    assert w.served() and w.states()["g0"] == "ready"


def test_a_start_goes_round_a_group_that_cannot_read_the_checkpoint(tmp_path: Path) -> None:
    w = world(tmp_path, groups=3)
    w.cluster.of("g1").bad_disk = True
    w.turns(60)
    assert w.served() and not w.loop.failed
    assert w.states() == {"g0": "ready", "g1": "ready", "g2": "ready"}
    assert w.loop.groups["g1"].last_error == ERROR and "g1" not in w.serving()


def test_a_grow_ends_although_the_new_group_fails_at_all_it_is_asked_for(tmp_path: Path) -> None:
    w = world(tmp_path)
    w.turns()
    scale(w, 3)
    w.turns(1)
    new = w.cluster.of("g2")
    new.bad_disk, new.broken_sources = True, {"g0", "g1"}
    w.turns(80)
    assert w.states() == {"g0": "ready", "g1": "ready", "g2": "ready"}
    assert not new.resident.any() and w.served() and not w.loop.problem
    assert w.loop.groups["g2"].last_error == ERROR
    target = w.loop.mind.target
    assert target is not None and not target.resident[:, :, 2].any()
    assert any("fail to load on g2" in event for event in w.loop.mind.events)
    tried = w.loop.executor.stats.failed
    drain(w, "g1")  # the rest gets on without it
    w.turns(40)
    assert w.states()["g1"] == "drained" and w.served()
    assert w.loop.executor.stats.failed == tried
    new.bad_disk, new.broken_sources = False, set()
    w.turns(400)
    assert new.resident.any(), "what has been mended is of use again"


def test_experts_that_nobody_else_has_room_for_are_said_with_the_error(tmp_path: Path) -> None:
    w = world(tmp_path, groups=2)
    w.turns()
    w.cluster.of("g1").bad_disk = True
    w.cluster.full = True
    w.cluster.of("g0").die()
    w.turns(200)
    assert not w.loop.complete() and not w.loop.failed
    assert "fail to load on g1" in w.loop.problem and f"g1: {ERROR}" in w.loop.problem
    w.cluster.of("g1").bad_disk = False
    w.turns(1400)
    assert w.served() and not w.loop.problem
