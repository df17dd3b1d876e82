"""The controller's loop on a scripted cluster: each interleaving that matters, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.intent import Pin, drained, pinned, scaled
from actors.loop import TakenOver
from placement.dry_run import Question, dry_run
from placement.errors import DoesNotFit, PlacementError
from raymoe.config import load_config
from raymoe.errors import ConfigError
from tests.actors.fake_cluster import World
from tests.group.small_model import write_checkpoint


def world(tmp_path: Path, groups: Any = 2, slots: int = 8, **placement: Any) -> World:
    """7 experts in two layers; each group has room for `slots` of them."""
    spec = write_checkpoint(tmp_path)
    size = max(spec.expert_bytes)
    kinds = groups if isinstance(groups, list) else [{"count": groups}]
    settings = {
        "model": spec.path,
        "groups": [{"memory_bytes": slots * size, **kind} for kind in kinds],
        "placement": {"reserve_experts": 0, "restore_s": 5, **placement},
    }
    return World(load_config(None, settings), spec)


def scale(w: World, count: int) -> None:
    with w.loop.lock:
        cheapest = w.loop.wanted.cheapest_to_give_up()
        w.loop.wanted.ask(lambda i: scaled(w.config, i, count, None, cheapest))


def pin(w: World, layer: int, expert: int, group: str, keep: bool, undo: bool = False) -> None:
    wanted = Pin(layer=layer, expert=expert, group=group, keep=keep)
    with w.loop.lock:
        w.loop.wanted.ask(lambda i: pinned(i, wanted, w.spec.experts_of_layer, undo))


def drain(w: World, group: str, undo: bool = False) -> None:
    with w.loop.lock:
        w.loop.wanted.ask(lambda i: drained(i, group, undo))


def test_a_start_publishes_one_complete_table(tmp_path: Path) -> None:
    w = world(tmp_path)
    w.turns()
    assert w.served() and w.loop.complete()
    assert all(t.table.resident.any(2).sum() == 7 for t in w.control.tables)
    assert w.states() == {"g0": "ready", "g1": "ready"}
    before = len(w.control.tables)
    w.turns(200)
    assert len(w.control.tables) == before, "and then it rests"


def test_a_group_that_dies_is_left_out_at_once_and_comes_back(tmp_path: Path) -> None:
    w = world(tmp_path)
    w.turns()
    home = w.cluster.of("g1").resident.copy()
    w.cluster.of("g1").die()
    w.turns(2)
    assert not w.control.tables[-1].table.resident[:, :, 1].any()
    w.turns()
    assert w.served() and (w.cluster.of("g1").resident == home).all()


def test_experts_of_a_group_that_stays_away_are_lent_and_given_back(tmp_path: Path) -> None:
    w = world(tmp_path, live=False)
    w.turns()
    home = w.cluster.of("g0").resident.copy()
    w.cluster.full = True
    w.cluster.of("g1").die()
    w.turns(100)
    assert w.served(), "g0 serves all of them"
    assert w.states()["g1"] == "pending"
    assert "waits for resources" in w.loop.groups["g1"].last_error
    w.cluster.full = False
    w.cluster.of("g1").placed = True
    w.turns(60)
    assert w.served() and (w.cluster.of("g0").resident == home).all()


def test_further_copies_wait_for_a_group_to_be_back(tmp_path: Path) -> None:
    w = world(tmp_path, groups=3, copies=2, restore_s=0.5, return_s=20, live=False)
    w.turns()
    home = w.cluster.of("g1").resident.copy()
    others = [w.cluster.of(g) for g in ("g0", "g2")]
    before = [len(p.brought) for p in others]
    assert w.cluster.of("g1").told_speed == 0.0, "it measures itself"
    w.cluster.full = True
    w.cluster.of("g1").die()
    w.turns(40)  # 10 s
    assert w.served() and [len(p.brought) for p in others] == before, "nothing is copied meanwhile"
    w.cluster.full = False
    w.cluster.of("g1").placed = True
    w.turns(40)
    assert (w.cluster.of("g1").resident == home).all()
    assert [len(p.brought) for p in others] == before
    assert w.cluster.of("g1").told_speed == 1.0, "as its earlier life said: not measured again"
    assert w.cluster.of("g1").gentle and not w.cluster.of("g0").gentle


def test_further_copies_are_made_elsewhere_when_a_group_stays_away(tmp_path: Path) -> None:
    w = world(tmp_path, groups=3, copies=2, restore_s=0.5, return_s=20, live=False)
    w.turns()
    w.cluster.full = True
    w.cluster.of("g1").die()
    w.turns(120)  # 30 s
    living = [w.cluster.of(g).resident for g in ("g0", "g2")]
    assert int(sum(held.sum() for held in living)) == 2 * 7
    w.turns(400)
    assert w.loop.groups["g1"].given_up, "and it is not waited for again, now that all is served"


def test_the_loop_does_not_sleep_over_the_end_of_its_patience(tmp_path: Path) -> None:
    w = world(tmp_path, groups=3, restore_s=0.1, interval_s=30, live=False)
    w.turns(400)
    w.cluster.full = True
    w.cluster.of("g1").die()
    w.turns(10, step_s=0.05)
    assert w.served(), "long before the next look at the fleet"


def test_what_nobody_serves_is_not_waited_for(tmp_path: Path) -> None:
    w = world(tmp_path, groups=4, copies=2, restore_s=0.5, return_s=1000, live=False)
    w.turns()
    table = w.control.tables[-1].table
    pair = next(  # two groups that hold the only copies of some expert
        table.resident[la, e].nonzero()[0] for la, e in np.argwhere(table.resident.sum(2) == 2)
    )
    w.cluster.full = True
    for g in pair:
        w.cluster.of(table.group_ids[g]).die()
    w.turns(20)
    assert w.served(), "the rest has loaded them, from the checkpoint"


def test_what_survivors_cannot_hold_is_said_by_bytes_until_memory_is_back(tmp_path: Path) -> None:
    w = world(tmp_path, slots=4)
    w.turns()
    kept = w.cluster.of("g0").resident.copy()
    w.cluster.full = True
    w.cluster.of("g1").die()
    w.turns(100)
    size = max(w.spec.expert_bytes)
    assert not w.loop.complete() and not w.loop.failed, "it waits, and has not given up"
    assert f"needs {7 * size} bytes" in w.loop.problem
    assert f"{3 * size} bytes are missing; add a group" in w.loop.problem
    assert (w.cluster.of("g0").resident == kept).all(), "what is there serves on"
    table = w.control.tables[-1].table
    assert table.resident.any(2).sum() == 4
    assert not w.cluster.of("g1").gentle, "requests wait for it"
    w.cluster.full = False
    w.cluster.of("g1").placed = True
    w.turns(60)
    assert w.served() and w.loop.complete() and not w.loop.problem


def test_while_rays_head_is_away_experts_are_restored_and_groups_started_when_it_is_back(
    tmp_path: Path,
) -> None:
    w = world(tmp_path, groups=3)
    w.turns()
    w.cluster.head_away = True
    w.cluster.of("g1").die()
    w.turns(80)
    assert w.served(), "the others load what it held, and clients hear of it"
    assert set(w.cluster.living()) == {"g0", "g2"}
    assert "head does not answer" in w.loop.groups["g1"].last_error
    before = w.loop.wanted.intent
    with pytest.raises(ConnectionError):
        scale(w, 4)
    assert w.loop.wanted.intent == before, "an order that cannot be kept is refused"
    w.cluster.head_away = False
    w.turns(60)
    assert w.served() and w.states() == {"g0": "ready", "g1": "ready", "g2": "ready"}
    assert not w.loop.failed


def test_a_start_that_ray_refuses_fails(tmp_path: Path) -> None:
    w = world(tmp_path)
    for process in w.cluster.processes.values():
        process.die()
    w.cluster.head_away = True
    w.turns(120)
    assert w.loop.failed is not None and "head does not answer" in w.loop.failed


def test_a_start_goes_on_looking_while_the_head_is_away(tmp_path: Path) -> None:
    w = world(tmp_path)
    w.turns()
    w.cluster.full = True
    scale(w, 3)
    w.cluster.head_away = True
    w.turns(100)
    assert w.served() and w.states()["g2"] == "starting"
    w.cluster.head_away = False
    w.turns(80)
    assert w.states()["g2"] == "pending"


def test_a_drain_goes_on_when_rays_head_is_back(tmp_path: Path) -> None:
    w = world(tmp_path, groups=3)
    w.turns()
    w.cluster.full = True
    scale(w, 4)  # one that starts all the while
    scale(w, 2)
    w.cluster.head_away = True
    w.turns(80)
    assert w.served()
    w.cluster.head_away = False
    w.turns(40)
    assert len(w.states()) == 2 and w.served() and len(w.cluster.living()) == 2


def test_all_groups_at_once(tmp_path: Path) -> None:
    w = world(tmp_path, groups=3)
    w.turns()
    for group in ("g0", "g1", "g2"):
        w.cluster.of(group).die()
    w.turns(60)
    assert w.served()


def test_grow_and_shrink(tmp_path: Path) -> None:
    w = world(tmp_path)
    w.turns()
    scale(w, 4)
    w.turns(80)
    assert set(w.states().values()) == {"ready"} and len(w.states()) == 4
    assert all(w.cluster.of(g).resident.any() for g in ("g2", "g3")), "new groups get their part"
    assert [s for *_, s in w.cluster.of("g2").brought if s is not None], "copied from others"
    scale(w, 2)
    w.turns(80)
    assert len(w.states()) == 2 and len(w.cluster.living()) == 2
    assert w.served()


def test_too_small_a_rest_is_refused_with_the_bytes(tmp_path: Path) -> None:
    w = world(tmp_path, slots=4)
    w.turns()
    with pytest.raises(DoesNotFit, match="bytes"):
        drain(w, "g1")
    with pytest.raises(DoesNotFit, match="bytes"):
        scale(w, 1)
    assert not w.loop.wanted.intent.draining


def test_a_drain_that_needs_a_group_that_is_not_there_says_what_it_waits_for(
    tmp_path: Path,
) -> None:
    w = world(tmp_path, groups=3, slots=4, return_s=5)
    w.turns()
    w.cluster.full = True
    w.cluster.of("g2").die()
    w.turns(40)
    assert w.served() and not w.loop.problem
    drain(w, "g1")
    w.turns(40)
    size = max(w.spec.expert_bytes)
    assert w.states()["g1"] == "draining" and w.served() and w.loop.complete()
    assert w.loop.problem.startswith("the drain of g1 waits: ")
    assert f"{3 * size} bytes are missing" in w.loop.problem
    drain(w, "g1", undo=True)
    w.turns(8)
    assert not w.loop.problem
    drain(w, "g1")
    w.turns(8)
    assert w.loop.problem
    w.cluster.full = False
    w.cluster.of("g2").placed = True
    w.turns(60)
    assert w.states() == {"g0": "ready", "g1": "drained", "g2": "ready"}
    assert w.served() and not w.loop.problem


def test_drain_ends_the_group_and_undo_brings_it_back(tmp_path: Path) -> None:
    w = world(tmp_path)
    w.turns()
    drain(w, "g1")
    w.turns()
    assert w.states() == {"g0": "ready", "g1": "drained"}
    assert set(w.cluster.living()) == {"g0"} and w.served()
    w.controller()  # a restart does not start it
    w.turns()
    assert w.states()["g1"] == "drained" and set(w.cluster.living()) == {"g0"}
    drain(w, "g1", undo=True)
    w.turns(60)
    assert w.states() == {"g0": "ready", "g1": "ready"} and w.served()


def test_a_drain_in_the_middle_of_a_copy_that_is_taken_back(tmp_path: Path) -> None:
    w = world(tmp_path)
    w.turns()
    w.cluster.of("g0").slow_loads = True
    drain(w, "g1")
    w.turns(20)
    assert w.states()["g1"] == "draining" and w.served()
    drain(w, "g1", undo=True)
    w.turns(20)
    w.cluster.of("g0").slow_loads = False
    w.turns(60)
    assert w.served() and w.states() == {"g0": "ready", "g1": "ready"}
    total = sum(int(p.resident.sum()) for p in w.cluster.living().values())
    assert total >= 7


def test_the_target_of_a_copy_dies_in_its_middle(tmp_path: Path) -> None:
    w = world(tmp_path)
    w.turns()
    scale(w, 3)
    w.turns(2)
    w.cluster.of("g2").slow_loads = True
    w.turns(20)
    w.cluster.of("g2").die()
    w.turns(60)
    assert w.served() and w.cluster.of("g2").resident.any()


def test_a_source_that_breaks_copies_is_got_round(tmp_path: Path) -> None:
    w = world(tmp_path)
    w.turns()
    scale(w, 3)
    w.turns(1)
    w.cluster.of("g2").broken_sources = {"g0", "g1"}
    w.turns(60)
    assert w.served() and w.states()["g2"] == "ready"
    assert {s for *_, s in w.cluster.of("g2").brought} == {None}, "from the checkpoint"
    assert w.loop.executor.stats.failed > 0


def test_a_controller_that_is_killed_in_the_middle_of_growing(tmp_path: Path) -> None:
    w = world(tmp_path)
    w.turns()
    scale(w, 4)
    w.turns(2)
    lives = w.lives()
    epoch = w.control.tables[-1].order
    w.controller()
    w.turns(80)
    assert w.lives() == lives, "none was ended"
    assert w.served() and len(w.states()) == 4
    assert w.control.tables[-1].order > epoch and w.loop.term == 2


@pytest.mark.parametrize("undo", [False, True])
@pytest.mark.parametrize("answers", [0, 1, 3])
def test_a_controller_that_is_killed_in_the_middle_of_a_copy(
    tmp_path: Path, answers: int, undo: bool
) -> None:
    w = world(tmp_path, groups=3, slots=5, live=False)
    w.turns()
    for process in w.cluster.living().values():
        process.trickle = True
    drain(w, "g1")
    w.turns(answers)
    w.controller()
    for process in w.cluster.living().values():
        process.answer()  # says what it holds; what was begun arrives only then
    for process in w.cluster.living().values():
        process.answer()
    if undo:  # what arrives late is in no plan
        drain(w, "g1", undo=True)
    w.turns(80)
    for group_id, process in w.cluster.living().items():
        assert (w.loop.groups[group_id].resident == process.resident).all(), "none is unknown"
    assert w.served() and w.states()["g1"] == ("ready" if undo else "drained")
    assert w.loop.executor.stats.failed == 0


@pytest.mark.parametrize("undo", [False, True])
def test_a_controller_that_is_killed_in_the_middle_of_a_drain(tmp_path: Path, undo: bool) -> None:
    """Its copies are made and the table without the group is out, but a router still lags."""
    w = world(tmp_path, groups=3, live=False)
    w.turns()
    lives = w.lives()
    w.control.lagging = True
    drain(w, "g1")
    w.turns(20)
    assert w.states()["g1"] == "draining" and "g1" not in w.serving(), "it may still be asked"
    assert w.cluster.of("g1").resident.any()
    w.controller()
    w.turns(8)
    assert w.served() and w.lives() == lives and w.cluster.of("g1").resident.any()
    if undo:
        drain(w, "g1", undo=True)
    w.control.lagging = False
    w.turns(80)
    assert w.served() and w.states()["g1"] == ("ready" if undo else "drained")
    others = {group: life for group, life in lives.items() if group != "g1" or undo}
    assert w.lives() == others, "nothing else was ended"


def test_what_an_earlier_controller_had_dropped_late_is_not_taken_to_be_there(
    tmp_path: Path,
) -> None:
    w = world(tmp_path)
    w.turns()
    lost = w.cluster.of("g0")
    layer, expert = (int(i) for i in np.argwhere(lost.resident)[0])
    lost.resident[layer, expert] = False
    for _ in range(40):
        for process in w.cluster.living().values():
            process.answer()
        w.now += 0.25
        w.loop.turn(0.0)
    assert w.served() and w.loop.complete()
    w.check()


def test_controllers_come_and_go_and_each_is_answered(tmp_path: Path) -> None:
    w = world(tmp_path)
    w.turns()
    lives = w.lives()
    for _ in range(10):
        w.controller()
        w.turns(30)
        assert w.served() and w.lives() == lives and set(w.states().values()) == {"ready"}
    w.cluster.of("g0").die()
    w.turns(30)
    assert w.served() and w.lives()["g0"] > lives["g0"], "the newest hears of a death"


def test_the_older_of_two_controllers_has_no_say(tmp_path: Path) -> None:
    w = world(tmp_path)
    w.turns()
    old, old_calls = w.loop, w.cluster.calls
    w.controller()
    w.turns(60)
    newest = w.control.tables[-1].order
    lives = w.lives()
    # the old one wakes up, finds that nothing it knows has changed, and means to go on
    w.cluster.calls = old_calls
    old.publisher.publish(old.publisher.table, {}, {})  # type: ignore[arg-type]
    assert w.control.tables[-1].order == newest, "clients keep to the newer term"
    ref = w.cluster.of("g0").call("drop", ([(0, 0)], old.term))
    w.cluster.of("g0").answer()
    assert isinstance(ref.error, ConfigError) and "in charge" in str(ref.error)
    w.now += 10.0
    with pytest.raises(TakenOver):
        old.turn(0.0)
    assert w.lives() == lives, "what it takes for silent serves the new one"


def test_a_controller_that_stood_still_ends_no_group(tmp_path: Path) -> None:
    w = world(tmp_path, unreachable_s=10)
    w.turns()
    lives = w.lives()
    for _ in range(3):
        w.turns(8)
        w.now += 600.0  # it is stopped; answers that come meanwhile are not read
        w.loop.turn(0.0)
        assert w.lives() == lives
    w.cluster.of("g1").frozen = True
    w.turns(60)
    assert w.lives()["g0"] == lives["g0"] and w.lives()["g1"] > lives["g1"] and w.served()


def test_a_frozen_group_is_replaced(tmp_path: Path) -> None:
    w = world(tmp_path)
    w.turns()
    w.cluster.of("g0").frozen = True
    life = w.cluster.of("g0").incarnation
    w.turns(100)
    assert w.cluster.of("g0").incarnation > life and w.served()


@pytest.mark.parametrize("dies", [True, False])
def test_copies_that_nobody_waits_for_make_way_to_those_that_press(
    tmp_path: Path, dies: bool
) -> None:
    w = world(tmp_path, groups=3, restore_s=0.5)
    w.turns()
    for group_id in ("g0", "g2"):
        w.cluster.of(group_id).rests = True
    drain(w, "g1")
    w.turns(100)
    assert w.states()["g1"] == "draining" and w.served()
    if dies:
        w.cluster.of("g1").die()
    else:
        w.cluster.leaving = {w.cluster.of("g1").node}
    w.turns(30)
    assert w.served() and w.states()["g1"] == "drained", "loaded as fast as it goes"
    assert w.loop.executor.stats.failed == 0, "to make way is no failure"


def test_a_load_from_a_checkpoint_that_hangs_holds_nothing_up_for_ever(tmp_path: Path) -> None:
    w = world(tmp_path, groups=3, slots=7, restore_s=0.5, live=False)
    w.turns()
    w.cluster.full = True
    hung = w.cluster.of("g0")
    hung.slow_loads, hung.reading_s = True, 100.0
    w.cluster.of("g1").die()
    w.turns(40)
    assert w.loop.groups["g0"].bringing and not w.served(), "it may still come"
    hung.reading_s = 130.0
    w.turns(4)
    assert w.loop.executor.stats.failed > 0 and "was not read" in w.loop.groups["g0"].last_error
    hung.slow_loads, hung.reading_s = False, 0.0
    w.turns(100)
    assert w.served() and (w.loop.groups["g0"].resident == hung.resident).all()


def test_a_group_that_hangs_in_its_start_is_replaced(tmp_path: Path) -> None:
    w = world(tmp_path, load_timeout_s=60)
    w.turns()
    scale(w, 3)
    w.cluster.of("g2").frozen = True
    life = w.lives()["g2"]
    w.turns(200)  # 50 s
    assert w.lives()["g2"] == life and w.states()["g2"] == "starting", "some take long"
    w.turns(200)
    assert w.lives()["g2"] > life and w.states()["g2"] == "ready" and w.served()


def test_a_group_that_waits_for_its_place_is_not_taken_to_hang(tmp_path: Path) -> None:
    w = world(tmp_path, load_timeout_s=60)
    w.turns()
    w.cluster.full = True
    scale(w, 3)
    w.turns(1000)  # 250 s
    life = w.lives()["g2"]
    assert w.states()["g2"] == "pending"
    w.cluster.of("g2").placed = True
    w.cluster.of("g2").frozen = True
    w.turns(100)
    assert w.states()["g2"] == "starting" and w.lives()["g2"] == life
    w.cluster.of("g2").frozen = False
    w.turns(40)
    assert w.states()["g2"] == "ready" and w.lives()["g2"] == life


@pytest.mark.parametrize("how", ["frozen", "starting"])
def test_a_new_controller_finds_a_group_that_does_not_answer(tmp_path: Path, how: str) -> None:
    w = world(tmp_path, unreachable_s=10, load_timeout_s=60)
    w.turns()
    w.cluster.of("g1").frozen = True
    w.cluster.of("g1").created = how == "frozen"
    life = w.lives()["g1"]
    w.controller()
    w.turns(120)  # 30 s
    assert (w.lives()["g1"] > life) == (how == "frozen")
    w.turns(240)
    assert w.lives()["g1"] > life and w.states() == {"g0": "ready", "g1": "ready"} and w.served()


def test_a_new_controller_waits_for_a_group_that_is_slow_to_answer(tmp_path: Path) -> None:
    w = world(tmp_path, unreachable_s=10)
    w.turns()
    before = len(w.control.tables)
    w.cluster.of("g1").frozen = True  # its cores are busy
    w.controller()
    w.turns(30)  # 7.5 s
    w.cluster.of("g1").frozen = False
    w.turns(30)
    told = w.control.tables[before:]
    assert told and all(t.table.group_ids == ("g0", "g1") for t in told), "no link is closed"


@pytest.mark.parametrize("slots", [4, 3])
def test_a_group_that_dies_again_and_again_is_not_waited_for_by_a_new_controller(
    tmp_path: Path, slots: int
) -> None:
    w = world(tmp_path, groups=3, slots=slots, pending_s=5)
    w.controller()
    for _ in range(160):
        if "g1" in w.cluster.living():
            w.cluster.of("g1").die()
        w.turns(1)
    if slots == 4:
        assert w.served() and w.loop.complete()
    else:
        assert not w.loop.complete() and "g1 does not start" in w.loop.problem
        w.turns(80)
        assert w.served() and not w.loop.problem, "it is waited for after all"


def test_a_node_that_is_about_to_go_is_left_before_it_does(tmp_path: Path) -> None:
    w = world(tmp_path, slots=4)  # without another group the rest could not hold all
    w.turns()
    w.cluster.leaving = {w.cluster.of("g0").node}
    for _ in range(100):
        w.turns(1)
        assert w.served(), "never a moment without an expert"
    assert set(w.cluster.living()) == {"g1", "g2"}
    assert w.states() == {"g1": "ready", "g2": "ready"}


def test_copies_off_a_node_that_goes_are_not_held_back_others_are(tmp_path: Path) -> None:
    w = world(tmp_path, slots=8, copy_bytes_per_s=1.0, live=False)
    w.turns()
    w.cluster.leaving = {w.cluster.of("g0").node}
    w.turns(60)
    living = w.cluster.living()
    assert set(living) == {"g1", "g2"} and w.served()
    limits = [limit for process in living.values() for limit in process.limits if process.brought]
    assert limits and set(limits) == {None}
    drain(w, "g1")
    w.turns(60)
    assert w.states()["g1"] == "drained" and w.served()
    assert w.cluster.of("g2").limits[-1] == 1.0, "there is time for that"


def test_a_router_that_never_acknowledges_does_not_hold_up_a_drain_for_ever(
    tmp_path: Path,
) -> None:
    w = world(tmp_path, ack_limit_s=10)
    w.turns()
    w.control.lagging = True
    drain(w, "g1")
    w.turns(12)
    assert w.states()["g1"] == "draining", "its replicas may still be asked for"
    w.turns(200)
    assert w.states()["g1"] == "drained" and w.served()


def test_a_start_goes_on_without_groups_that_get_no_resources(tmp_path: Path) -> None:
    w = world(tmp_path, groups=1, pending_s=30)
    w.turns(1)
    w.cluster.full = True
    scale(w, 2)
    w.turns(100)
    assert w.served() and w.states() == {"g0": "ready", "g1": "pending"}
    fresh = world(tmp_path, pending_s=30)
    fresh.cluster.of("g1").placed = False
    fresh.turns(80)
    assert not fresh.control.tables, "it may still come"
    fresh.turns(120)
    assert fresh.served() and fresh.states()["g1"] == "pending"


def test_a_group_that_never_starts_fails_the_start(tmp_path: Path) -> None:
    w = world(tmp_path)
    for _ in range(120):
        for name, process in list(w.cluster.processes.items()):
            if ":g1:" in name:
                process.die()
        w.turns(1)
    assert w.loop.failed is not None and "g1 does not start" in w.loop.failed


def test_too_little_memory_is_said(tmp_path: Path) -> None:
    w = world(tmp_path, slots=2)
    w.turns()
    assert w.loop.failed is not None and "bytes" in w.loop.failed


AUTOSCALE = {"enabled": True, "up_after_s": 2, "down_after_s": 5, "cool_down_s": 2}


def scaling(tmp_path: Path, **more: Any) -> World:
    kinds = [{"count": 2, "min_count": 2, "max_count": 4, **more}]
    w = world(tmp_path, groups=kinds, autoscale=AUTOSCALE)
    w.turns()
    w.control.counts = np.full((2, 4), 100, np.int64)
    w.control.counts[1, 3] = 0
    return w


def test_autoscaling_within_the_bounds_of_the_kind(tmp_path: Path) -> None:
    w = scaling(tmp_path)
    w.work = 100.0  # far more than any number of groups can do
    w.turns(160)
    assert len(w.loop.wanted.intent.active("default")) == 4, w.states()
    assert w.served() and set(w.states().values()) == {"ready"}
    w.work = 0.1
    w.turns(400)
    assert len(w.states()) == 2 and w.served(), "and back to the fewest allowed"


def test_so_many_groups_as_the_measured_load_needs(tmp_path: Path) -> None:
    w = scaling(tmp_path)
    w.work = 1.7
    w.turns(300)
    assert len(w.states()) == 3, "1.7 groups' work at 0.6 each"
    before = w.loop.wanted.intent
    w.turns(800)
    assert w.loop.wanted.intent == before, "and then it rests"


def test_a_group_that_gets_slow_loses_load_and_no_group_is_added_for_it(tmp_path: Path) -> None:
    kinds = [{"count": 3, "min_count": 3, "max_count": 8}]
    near = {**AUTOSCALE, "high": 0.72}
    w = world(tmp_path, groups=kinds, slots=7, autoscale=near, plan_interval_s=5)
    w.turns()
    w.control.counts = np.full((2, 4), 300, np.int64)
    w.control.counts[1, 3] = 0
    w.work, w.timed = 1.6, True
    w.turns(120)
    assert len(w.states()) == 3 and max(g.busy for g in w.loop.groups.values()) < 0.7
    slow = w.cluster.of("g1")
    slow.slow = 3.0  # its part takes all of its time
    busiest = []
    for _ in range(480):  # 2 minutes
        w.turns(1)
        busiest.append(w.loop.groups["g1"].busy)
    assert sum(busy > 0.72 for busy in busiest) > 8, "it was too much for it, for over 2 s"
    assert w.loop.groups["g1"].speed < 0.5, "which is measured"
    assert len(w.states()) == 3 and w.served(), "and no reason for another group"
    assert w.loop.groups["g1"].busy < 0.72, "others have taken over"


def test_kinds_are_added_by_their_measured_speed_for_their_price(tmp_path: Path) -> None:
    kinds = [
        {"kind": "cheap", "count": 1, "min_count": 1, "max_count": 4, "price": 1.0},
        {"kind": "fast", "count": 1, "min_count": 1, "max_count": 4, "price": 2.0},
    ]
    w = world(tmp_path, groups=kinds, autoscale=AUTOSCALE)
    w.turns()
    w.cluster.of("cheap-0").slow = 5.0  # 5 times as slow for half the price
    w.control.counts = np.full((2, 4), 300, np.int64)
    w.control.counts[1, 3] = 0
    w.work, w.timed = 0.2, True
    w.turns(120)
    assert len(w.states()) == 2
    w.work = 1.5
    w.turns(240)
    assert len(w.loop.wanted.intent.active("fast")) > 1
    assert len(w.loop.wanted.intent.active("cheap")) == 1


def test_a_fleet_without_any_traffic_shrinks(tmp_path: Path) -> None:
    w = scaling(tmp_path)
    w.work = 1.7
    w.turns(300)
    w.work, w.control.counts = 0.0, None
    w.turns(200)
    assert len(w.states()) == 2 and w.served()


def test_a_fleet_whose_speeds_are_not_known_is_judged_by_how_busy_it_is(tmp_path: Path) -> None:
    w = scaling(tmp_path)
    w.work = 1.2  # no group has told any timing
    w.turns(300)
    assert len(w.states()) == 2 and not w.loop.wanted.intent.draining


def test_nothing_is_retired_while_a_group_is_on_its_way(tmp_path: Path) -> None:
    w = scaling(tmp_path)
    w.work = 1.7
    for _ in range(200):
        w.turns(1)
        if len(w.states()) > 2:
            break
    (new,) = set(w.states()) - {"g0", "g1"}
    w.cluster.of(new).frozen = True  # its process takes long to come up
    w.work = 0.1
    w.turns(120)
    assert not w.loop.wanted.intent.draining and w.states()[new] == "starting"
    w.cluster.of(new).frozen = False
    w.cluster.of(new).slow_loads = True
    w.turns(60)
    assert not w.loop.wanted.intent.draining and new not in w.serving(), "it loads"
    w.cluster.of(new).slow_loads = False
    w.turns(8)
    assert new in w.serving(), "it serves before anything is retired"
    w.turns(200)
    assert len(w.states()) == 2 and w.served()


def test_a_group_that_gets_no_place_is_the_first_to_go(tmp_path: Path) -> None:
    w = scaling(tmp_path)
    w.cluster.full = True
    w.work = 1.7
    w.turns(200)
    assert sorted(w.states().values()) == ["pending", "ready", "ready"], "no more are asked for"
    w.work = 0.1
    w.turns(200)
    assert w.states() == {"g0": "ready", "g1": "ready"}


def test_a_lost_group_is_not_made_up_for_by_another(tmp_path: Path) -> None:
    w = scaling(tmp_path)
    w.work = 1.2
    w.turns(100)
    for _ in range(3):  # each time the next start waits longer
        w.cluster.of("g1").die()
        w.turns(20)
    w.turns(100)
    assert w.states() == {"g0": "ready", "g1": "ready"} and w.served()


def test_a_kind_keeps_its_fewest_groups(tmp_path: Path) -> None:
    kinds = [
        {"kind": "big", "count": 2, "min_count": 2},
        {"kind": "small", "count": 2, "min_count": 0, "memory_bytes": 1 << 20},
    ]
    w = world(tmp_path, groups=kinds, autoscale=AUTOSCALE)
    w.turns(400)
    assert w.states() == {"big-0": "ready", "big-1": "ready"} and w.served()


def test_hot_experts_are_replicated_within_seconds_of_a_shift(tmp_path: Path) -> None:
    w = world(tmp_path, groups=3, slots=5, plan_interval_s=5)
    w.turns()
    counts = np.full((2, 4), 1000, np.int64)
    counts[1, 3] = 0
    for hot in ((0, 1), (1, 2)):
        counts_now = counts.copy()
        counts_now[hot] = 60_000
        w.control.counts = counts_now
        w.turns(80)
        table = w.control.tables[-1].table
        assert table.resident[hot].sum() > 1, f"{hot} is hot"
        records = w.loop.history.to_dict(w.loop.mind)["plans"]
        assert records[0]["reasons"] and records[0]["promised"] is not None
        assert w.served()
    assert "relieve" in " ".join(why for why in records[0]["reasons"])


def test_pins_and_evictions_hold_until_they_are_undone(tmp_path: Path) -> None:
    w = world(tmp_path, live=False)
    w.turns()
    (home,) = (g for g in ("g0", "g1") if w.cluster.of(g).resident[0, 2])
    other = "g1" if home == "g0" else "g0"
    pin(w, 0, 2, home, keep=False)
    w.turns(60)
    assert w.cluster.of(home).resident[0, 2], "the only replica stays"
    pin(w, 0, 2, other, keep=True)
    w.turns(60)
    assert w.cluster.of(other).resident[0, 2] and not w.cluster.of(home).resident[0, 2]
    assert w.served() and "pinned" in w.loop.history.why_of((0, 2, other))[1]
    w.controller()
    w.turns(60)
    assert w.cluster.of(other).resident[0, 2] and not w.cluster.of(home).resident[0, 2]
    pin(w, 0, 2, other, keep=True, undo=True)
    with pytest.raises(ConfigError, match="nothing is fixed"):
        pin(w, 0, 2, other, keep=True, undo=True)
    with pytest.raises(ConfigError, match="no MoE layer 2"):
        pin(w, 2, 0, "g0", keep=True)
    with pytest.raises(ConfigError, match="no expert 3: 0 to 2"):
        pin(w, 1, 3, "g0", keep=True)


def test_what_an_earlier_controller_did_not_come_to_end_is_ended(tmp_path: Path) -> None:
    w = world(tmp_path, groups=3)
    w.turns()
    stray = w.cluster.of("g2")
    w.memory.keep_intent(  # the last thing it did
        {**w.loop.wanted.intent.retired("g2").to_dict(), "configured": {"default": 3}}
    )
    w.controller()
    w.turns(60)
    assert not stray.alive and w.served()
    assert set(w.cluster.living()) == {"g0", "g1"} == set(w.states())


def test_an_idle_controller_steps_once_an_interval_also_while_a_copy_takes_long(
    tmp_path: Path,
) -> None:
    w = world(tmp_path)
    w.turns()
    steps = 0
    step = w.loop.mind.step

    def counted(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        return step(*arguments)

    w.loop.mind.step = counted  # type: ignore[method-assign]
    w.turns(1000, step_s=0.01)  # every ping that is answered wakes the loop
    assert steps <= 11
    w.cluster.of("g0").slow_loads = True
    drain(w, "g1")
    w.turns(4)
    steps = 0
    w.turns(1000, step_s=0.01)
    assert w.states()["g1"] == "draining" and steps <= 11
    pings = sum(1 for ref, _ in w.cluster.calls.pending if not ref.done)  # type: ignore[attr-defined]
    assert pings <= 2 * 3, "no calls pile up"


def test_a_dry_run_says_what_a_plan_would_bring_and_changes_nothing(tmp_path: Path) -> None:
    w = world(tmp_path, 3, plan_interval_s=1e6)  # the controller itself plans once
    assert w.loop.basis() is None, "nothing is placed yet"
    w.turns()
    basis = w.loop.basis()
    assert basis is not None
    idle = dry_run(basis)
    assert not idle["measured"] and not idle["helps"] and idle["gain"] is None
    layers, experts = w.spec.layers, w.spec.experts
    counts = np.zeros((layers, experts), np.int64)
    counts[:, 0] = 5000  # one expert has nearly all the load: copies of it pay
    counts[:, 1] = 100
    w.control.counts = counts
    w.turns(80)
    before = w.control.tables[-1].table
    basis = w.loop.basis()
    assert basis is not None
    answer = dry_run(basis, Question(margin=0.0))
    assert answer["helps"] and answer["answer"].startswith("yes")
    assert answer["gain"] > 0.2 and answer["loads"] >= len(answer["actions"]) > 0
    assert {a["expert"] for a in answer["actions"]} == {0} and answer["loaded_bytes"] > 0
    none = dry_run(basis, Question(interval_bytes=0))
    assert not none["helps"] and none["answer"].startswith("no") and none["loads"] == 0
    w.turns(20)
    assert w.control.tables[-1].table is before, "nothing has changed"


def test_a_dry_run_tells_what_doing_without_a_group_costs(tmp_path: Path) -> None:
    w = world(tmp_path, 3)
    w.turns()
    basis = w.loop.basis()
    assert basis is not None
    answer = dry_run(basis, Question(without=("g1",)))
    held = int(w.loop.groups["g1"].resident.sum())
    assert answer["owed"] > 0 and answer["drops"] == answer["loads"] == held
    assert answer["without"] == ["g1"] and "has to be" in answer["answer"]
    with pytest.raises(PlacementError, match="no group 'g7'"):
        dry_run(basis, Question(without=("g7",)))
    with pytest.raises(DoesNotFit):
        dry_run(basis, Question(without=("g0", "g1", "g2")))
