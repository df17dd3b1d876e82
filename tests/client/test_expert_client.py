"""The client never loses, repeats or corrupts a pair, whatever the groups do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymoe.client import ClientConfig, ExpertClient
from raymoe.errors import ConfigError, ExpertsUnavailable
from raymoe.links.link import Slot
from raymoe.links.protocol import Call, Wire
from tests.client.scripted_group import (
    HIDDEN,
    POLICIES,
    SECRET,
    Fleet,
    Policy,
    ScriptedGroup,
    ScriptedLink,
    answer,
    complain,
    die_in_reply,
    die_silently,
    hang,
    identity,
    once,
    reference,
    refuse_to_send,
)

QUICK = {
    "stall_limit_s": 5.0,
    "retry_s": 0.005,
    "deadline_floor_s": 0.01,
    "first_deadline_s": 0.01,
    "reconnect_s": (0.001, 0.01),
}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)


def make_client(fleet: Fleet, **config: Any) -> ExpertClient:
    return ExpertClient(
        identity(fleet.wire.dtype),
        SECRET,
        "n",
        ClientConfig(**{**QUICK, **config}),
        dial=fleet.dial,
    )


def draw_batch(
    rng: np.random.Generator, tokens: int, top_k: int, experts: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.from_numpy(rng.standard_normal((tokens, HIDDEN), dtype=np.float32))
    skew = rng.dirichlet(np.full(experts, 0.3))
    ids = rng.choice(experts, size=(tokens, top_k), p=skew)
    weights = rng.random((tokens, top_k), dtype=np.float32)
    return hidden, torch.from_numpy(ids), torch.from_numpy(weights)


def check(client: ExpertClient, layer: int, batch: tuple[torch.Tensor, ...]) -> None:
    out = client.combine(client.dispatch(layer, *batch))
    assert out.dtype == batch[0].dtype
    torch.testing.assert_close(
        out.double(), reference(layer, *batch), rtol=1e-4, atol=1e-4, check_dtype=False
    )


def random_fleet(
    rng: np.random.Generator, layers: int, experts: int, groups: int, policies: list[Policy]
) -> Fleet:
    resident = rng.random((layers, experts, groups)) < 0.4
    resident[..., 0] |= ~resident.any(2)
    held = [
        {(int(i), int(e)) for i, e in zip(*np.nonzero(resident[:, :, g]), strict=True)}
        for g in range(groups)
    ]
    made = [
        ScriptedGroup(
            f"g{g}",
            held[g],
            policies[g],
            slots=int(rng.integers(1, 5)),
            slot_bytes=int(rng.choice([2304, 4096, 65536])),
        )
        for g in range(groups)
    ]
    return Fleet(made, layers, experts)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.sampled_from([1, 2, 5, 33, 70]),
    top_k=st.integers(1, 4),
    experts=st.integers(1, 10),
    groups=st.integers(1, 4),
    mode=st.sampled_from(["partial", "rows"]),
    bad=st.lists(st.tuples(st.sampled_from(POLICIES), st.integers(0, 3)), min_size=4, max_size=4),
)
def test_sums_are_right_whatever_fails_once(
    seed: int,
    tokens: int,
    top_k: int,
    experts: int,
    groups: int,
    mode: str,
    bad: list[tuple[Policy, int]],
) -> None:
    rng = np.random.default_rng(seed)
    policies = [once(policy, after) for policy, after in bad]
    fleet = random_fleet(rng, 2, experts, groups, policies)
    claimed = fleet.table(1)
    if rng.random() < 0.3:  # groups lack some of what the table says, another replica has it
        for group in list(fleet.groups.values())[1:]:
            lost = {k for k in group.resident if k in fleet.groups["g0"].resident}
            group.resident -= set(sorted(lost)[:2])
    client = make_client(fleet, mode=mode)
    try:
        assert client.set_table(claimed)
        total = np.zeros((2, experts), np.int64)
        for step in range(4):
            layer = step % 2
            batch = draw_batch(rng, tokens, top_k, experts)
            check(client, layer, batch)
            total[layer] += np.bincount(batch[1].reshape(-1), minlength=experts)
        assert (client.take_counts() == total).all()
        assert not client.take_counts().any()
    finally:
        client.close()


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1), mode=st.sampled_from(["partial", "rows"]))
def test_tables_change_between_dispatch_and_combine_and_between_layers(
    seed: int, mode: str
) -> None:
    rng = np.random.default_rng(seed)
    experts, groups = 6, 3
    fleet = random_fleet(rng, 2, experts, groups, [once(die_silently, 5), answer, answer])
    client = make_client(fleet, mode=mode)
    everything = {(layer, e) for layer in range(2) for e in range(experts)}
    try:
        client.set_table(fleet.table(1))
        for step in range(8):
            batch = draw_batch(rng, int(rng.integers(1, 40)), 2, experts)
            pending = client.dispatch(step % 2, *batch)
            # experts move: groups drop what the new table does not list, but every expert stays
            for group in fleet.groups.values():
                group.resident = {k for k in everything if rng.random() < 0.4}
            held = set().union(*(g.resident for g in fleet.groups.values()))
            fleet.groups["g1"].resident |= everything - held
            if rng.random() < 0.3:  # a group is started anew
                fleet.groups["g2"].incarnation += 1
            assert client.set_table(fleet.table(2 + step))
            out = client.combine(pending)
            torch.testing.assert_close(
                out.double(), reference(step % 2, *batch), rtol=1e-4, atol=1e-4
            )
    finally:
        client.close()
    assert all(link.closed for group in fleet.groups.values() for link in group.links)


@pytest.mark.parametrize("bad", [refuse_to_send, die_silently, die_in_reply, hang, complain])
def test_the_other_replica_answers(bad: Policy) -> None:
    experts = {(0, e) for e in range(4)}
    fleet = Fleet(
        [ScriptedGroup("a", experts, once(bad)), ScriptedGroup("b", experts, once(bad))], 1, 4
    )
    client = make_client(fleet)
    try:
        client.set_table(fleet.table(1))
        for _ in range(3):
            check(client, 0, draw_batch(np.random.default_rng(0), 7, 2, 4))
        assert client.stats.retried_pairs > 0
    finally:
        client.close()


def test_late_reply_of_an_abandoned_attempt_changes_nothing() -> None:
    def wake_up_late(group: ScriptedGroup, link: ScriptedLink, slot: Slot, call: Call) -> None:
        old = group.links[0]
        if link is old:
            return hang(group, link, slot, call)
        assert old.closed
        [(old_slot, old_call)] = old.held
        old_slot.reply_memory[:] = 255  # written into memory that is nobody's by now
        old.answer(old_slot, old_call)
        return answer(group, link, slot, call)

    group = ScriptedGroup("a", {(0, e) for e in range(4)}, wake_up_late)
    fleet = Fleet([group], 1, 4)
    client = make_client(fleet)
    try:
        client.set_table(fleet.table(1))
        wait_until(lambda: client.connected() == ("a",))
        check(client, 0, draw_batch(np.random.default_rng(0), 5, 2, 4))
        assert client.stats.deadlines == 1
        assert group.requests == 2
    finally:
        client.close()


@pytest.mark.parametrize("progress", [True, False])
def test_a_slow_group_gets_more_time_and_a_hung_one_does_not(progress: bool) -> None:
    """Both answer heartbeats; only the slow one gets work done meanwhile."""
    group = ScriptedGroup("a", {(0, e) for e in range(4)}, once(hang))
    fleet = Fleet([group], 1, 4)
    stall_limit_s = 0.05 if progress else 5.0  # of what has no replica: it has one, a slow one
    client = make_client(
        fleet, deadline_floor_s=0.3, first_deadline_s=0.3, stall_limit_s=stall_limit_s
    )
    ended = threading.Event()

    def work_for_others() -> None:
        for _ in range(50):
            if ended.wait(0.02):
                return
            group.progress += progress
        [(slot, call)] = group.links[0].held
        with client._lock:
            group.links[0].answer(slot, call)

    worker = threading.Thread(target=work_for_others)
    try:
        client.set_table(fleet.table(1))
        wait_until(lambda: client.connected() == ("a",))
        worker.start()
        check(client, 0, draw_batch(np.random.default_rng(0), 5, 2, 4))
        assert (client.stats.slow > 0) == progress
        assert client.stats.links_lost == (0 if progress else 1)
    finally:
        ended.set()
        worker.join()
        client.close()


def test_a_group_that_dies_at_every_request_is_not_dialed_without_end() -> None:
    group = ScriptedGroup("a", {(0, 0)}, die_silently)
    fleet = Fleet([group], 1, 1)
    client = make_client(fleet, stall_limit_s=0.5, reconnect_s=(0.02, 1.0))
    try:
        client.set_table(fleet.table(1))
        with pytest.raises(ExpertsUnavailable):
            check(client, 0, (torch.ones(1, HIDDEN), torch.tensor([[0]]), torch.ones(1, 1)))
        assert 2 <= len(group.links) <= 10
    finally:
        client.close()


def test_idle_links_are_pinged_and_a_lost_one_is_replaced() -> None:
    group = ScriptedGroup("a", {(0, 0)})
    fleet = Fleet([group], 1, 1)
    client = make_client(fleet)
    try:
        client.set_table(fleet.table(1))
        wait_until(lambda: bool(group.links) and group.links[0].pings > 0)
        group.links[0].fail("killed while idle")
        wait_until(lambda: len(group.links) == 2 and client.connected() == ("a",))
        check(client, 0, (torch.ones(1, HIDDEN), torch.tensor([[0]]), torch.ones(1, 1)))
    finally:
        client.close()


def test_what_no_live_link_leads_to_is_counted_until_it_is_reached() -> None:
    near, far = ScriptedGroup("near", {(0, 0), (0, 1)}), ScriptedGroup("far", {(0, 1), (0, 2)})
    fleet = Fleet([near, far], layers=1, experts=4)  # expert 3 is lost: of that the table tells
    table = fleet.table(1)
    client = make_client(fleet)
    try:
        assert client.out_of_reach() is None
        far.reachable = False
        client.set_table(table)
        wait_until(lambda: client.connected() == ("near",))
        wait_until(lambda: client.out_of_reach() == 1)
        far.reachable = True
        wait_until(lambda: client.out_of_reach() == 0)
        assert client.absent(0) == [3]
    finally:
        client.close()


def test_nack_lists_what_is_missing_and_the_rest_stays_on_its_group() -> None:
    a = ScriptedGroup("a", {(0, 0), (0, 1)})
    b = ScriptedGroup("b", {(0, 0)})
    fleet = Fleet([a, b], 1, 2)
    table = fleet.table(1)
    a.resident = {(0, 1)}
    client = make_client(fleet)
    try:
        client.set_table(table)
        ids = torch.tensor([[0, 1], [1, 0]])
        check(client, 0, (torch.ones(2, HIDDEN), ids, torch.ones(2, 2)))
    finally:
        client.close()


def test_experts_without_a_replica_wait_for_a_newer_table() -> None:
    fleet = Fleet([ScriptedGroup("a", {(0, 0)}), ScriptedGroup("b", set())], 1, 2)
    client = make_client(fleet)
    client.set_table(fleet.table(1))

    def restore() -> None:
        time.sleep(0.1)
        fleet.groups["b"].resident.add((0, 1))
        client.set_table(fleet.table(2))

    restorer = threading.Thread(target=restore)
    restorer.start()
    try:
        batch = (torch.ones(1, HIDDEN), torch.tensor([[0, 1]]), torch.ones(1, 2))
        check(client, 0, batch)
    finally:
        restorer.join()
        client.close()


@pytest.mark.parametrize("policy", [answer, complain, die_silently])
def test_stall_limit_names_layer_and_experts(policy: Policy) -> None:
    fleet = Fleet([ScriptedGroup("a", {(1, 0)}, policy)], 2, 3)
    client = make_client(fleet, stall_limit_s=0.15)
    try:
        client.set_table(fleet.table(1))
        batch = (torch.ones(1, HIDDEN), torch.tensor([[0, 2]]), torch.ones(1, 2))
        pending = client.dispatch(1, *batch)
        with pytest.raises(ExpertsUnavailable) as caught:
            client.combine(pending)
        assert caught.value.layer == 1
        assert 2 in caught.value.experts
        assert 0.1 < caught.value.waited_s < 5
        # the engine goes on: other batches are served
        if policy is answer:
            check(client, 1, (torch.ones(1, HIDDEN), torch.tensor([[0]]), torch.ones(1, 1)))
    finally:
        client.close()


def test_a_batch_given_up_can_be_tried_again_until_its_expert_is_back() -> None:
    group = ScriptedGroup("a", {(0, 0)})
    fleet = Fleet([group], 1, 2)
    client = make_client(fleet, stall_limit_s=0.1, deadline_floor_s=5.0, first_deadline_s=5.0)
    batch = draw_batch(np.random.default_rng(0), 9, 2, 2)
    try:
        client.set_table(fleet.table(1))
        wait_until(lambda: client.connected() == ("a",))
        for _ in range(3):
            with pytest.raises(ExpertsUnavailable, match="layer 0"):
                check(client, 0, batch)
        group.resident.add((0, 1))
        client.set_table(fleet.table(2))
        check(client, 0, batch)
    finally:
        client.close()


def test_without_any_table_dispatch_gives_up_after_the_stall_limit() -> None:
    fleet = Fleet([], 1, 1)
    client = make_client(fleet, stall_limit_s=0.05)
    try:
        with pytest.raises(ExpertsUnavailable):
            client.dispatch(0, torch.ones(1, HIDDEN), torch.tensor([[0]]), torch.ones(1, 1))
    finally:
        client.close()


def test_older_tables_and_other_shapes_are_refused() -> None:
    fleet = Fleet([ScriptedGroup("a", {(0, 0)})], 1, 1)
    client = make_client(fleet)
    try:
        assert client.set_table(fleet.table(5, term=2))
        assert not client.set_table(fleet.table(9, term=1))
        assert not client.set_table(fleet.table(5, term=2))
        assert client.set_table(fleet.table(1, term=3))
        assert client.epoch == (3, 1)
        with pytest.raises(ConfigError, match="cannot replace"):
            client.set_table(Fleet([ScriptedGroup("a", {(0, 0)})], 1, 2).table(2, term=3))
    finally:
        client.close()


def test_two_batches_in_flight_settle_each_other() -> None:
    experts = {(0, e) for e in range(4)}
    fleet = Fleet([ScriptedGroup("a", experts, slots=1), ScriptedGroup("b", experts)], 1, 4)
    client = make_client(fleet)
    rng = np.random.default_rng(3)
    try:
        client.set_table(fleet.table(1))
        first, second = draw_batch(rng, 30, 2, 4), draw_batch(rng, 9, 2, 4)
        pending = [client.dispatch(0, *first), client.dispatch(0, *second)]
        for batch, waiting in ((second, pending[1]), (first, pending[0])):
            torch.testing.assert_close(
                client.combine(waiting).double(), reference(0, *batch), rtol=1e-4, atol=1e-4
            )
    finally:
        client.close()


def test_a_batch_that_waits_for_a_slot_behind_a_hung_one_is_freed() -> None:
    group = ScriptedGroup("a", {(0, e) for e in range(4)}, once(hang), slots=1)
    fleet = Fleet([group], 1, 4)
    client = make_client(fleet)
    rng = np.random.default_rng(4)
    try:
        client.set_table(fleet.table(1))
        wait_until(lambda: client.connected() == ("a",))
        first, second = draw_batch(rng, 3, 2, 4), draw_batch(rng, 4, 2, 4)
        pending = [client.dispatch(0, *first), client.dispatch(0, *second)]
        for batch, waiting in ((second, pending[1]), (first, pending[0])):
            torch.testing.assert_close(
                client.combine(waiting).double(), reference(0, *batch), rtol=1e-4, atol=1e-4
            )
    finally:
        client.close()


@pytest.mark.parametrize("mode", ["partial", "rows"])
@pytest.mark.parametrize("wire", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(mode: str, wire: str, dtype: torch.dtype) -> None:
    fleet = Fleet([ScriptedGroup("a", {(0, 0), (0, 1)}), ScriptedGroup("b", {(0, 2)})], 1, 3)
    fleet.wire = Wire(hidden=HIDDEN, dtype=wire)
    client = make_client(fleet, mode=mode)
    try:
        client.set_table(fleet.table(1))
        hidden, ids, weights = draw_batch(np.random.default_rng(1), 6, 2, 3)
        hidden, weights = hidden.to(dtype), weights.to(dtype)
        out = client.combine(client.dispatch(0, hidden, ids, weights))
        assert out.dtype == dtype
        tolerance = 1e-4 if wire == "float32" and dtype == torch.float32 else 3e-2
        torch.testing.assert_close(
            out.double(), reference(0, hidden, ids, weights), rtol=tolerance, atol=tolerance
        )
    finally:
        client.close()


def test_empty_batch() -> None:
    fleet = Fleet([ScriptedGroup("a", {(0, 0)})], 1, 1)
    client = make_client(fleet)
    try:
        client.set_table(fleet.table(1))
        ids = torch.zeros((0, 2), dtype=torch.int64)
        out = client.combine(client.dispatch(0, torch.zeros(0, HIDDEN), ids, torch.zeros(0, 2)))
        assert out.shape == (0, HIDDEN)
    finally:
        client.close()


def test_until_a_new_home_is_reached_the_old_one_serves() -> None:
    a, b = ScriptedGroup("a", {(0, 0), (0, 1)}), ScriptedGroup("b", {(0, 0)})
    fleet = Fleet([a, b], 1, 2)
    client = make_client(fleet, stall_limit_s=0.2)
    moved = np.zeros((1, 2, 2), np.bool_)
    moved[0, 0, 1] = moved[0, 1, 0] = True  # expert 0 moves to b
    try:
        client.set_table(fleet.table(1))
        wait_until(lambda: client.connected() == ("a", "b"))
        b.reachable = False
        b.links[0].fail("the network is gone")
        wait_until(lambda: client.connected() == ("a",))
        client.set_table(fleet.table(2, resident=moved))
        batch = (torch.ones(2, HIDDEN), torch.tensor([[0, 1], [1, 0]]), torch.ones(2, 2))
        check(client, 0, batch)
        a.resident = {(0, 1)}  # and once it is dropped there, the new home must be reached
        with pytest.raises(ExpertsUnavailable, match="layer 0"):
            check(client, 0, batch)
        b.reachable = True
        client.set_table(fleet.table(3, resident=moved))
        check(client, 0, batch)
    finally:
        client.close()


def test_links_of_removed_groups_close_and_new_incarnations_get_new_links() -> None:
    a, b = ScriptedGroup("a", {(0, 0)}), ScriptedGroup("b", {(0, 0)})
    fleet = Fleet([a, b], 1, 1)
    client = make_client(fleet)
    batch = (torch.ones(1, HIDDEN), torch.tensor([[0]]), torch.ones(1, 1))
    try:
        client.set_table(fleet.table(1))
        check(client, 0, batch)
        wait_until(lambda: client.connected() == ("a", "b"))
        del fleet.groups["b"]
        a.incarnation = 2
        client.set_table(fleet.table(2))
        check(client, 0, batch)
        assert b.links[0].closed
        assert a.links[0].closed
        assert not a.links[1].closed
        assert client.connected() == ("a",)
    finally:
        client.close()


def test_timings_are_handed_over_once() -> None:
    fleet = Fleet([ScriptedGroup("a", {(0, 0), (0, 1)})], 1, 2)
    client = make_client(fleet)
    try:
        client.set_table(fleet.table(1))
        ids = torch.tensor([[0, 1], [0, 1], [1, 0]])
        check(client, 0, (torch.ones(3, HIDDEN), ids, torch.ones(3, 2)))
        assert client.take_timings() == {"a": [(6, 2, pytest.approx(1e-6))]}
        assert client.take_timings() == {"a": []}
    finally:
        client.close()


def wait_until(condition: Any, limit_s: float = 30.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    wait_until(lambda: not {t for t in threading.enumerate() if t.is_alive()} - before)
