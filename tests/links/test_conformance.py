"""What every transport must do, on every transport."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from raymoe.errors import FrameError, HandshakeRefused, LinkError, PeerLost
from raymoe.links.connect import connect
from raymoe.links.link import SlotTerms
from raymoe.links.poller import LinkPoller
from raymoe.links.protocol import ERROR, NACK, PARTIAL, REPLY, ROWS, WIRE_DTYPES, Call
from tests.links import rig
from tests.links.rig import KINDS, NODE, SECRET, Group, completions, link_to, message, round_trip

pytestmark = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def group(kind: str) -> Iterator[Group]:
    with rig.group() as running:
        yield running


@pytest.mark.parametrize("dtype", WIRE_DTYPES)
def test_every_size_and_dtype_comes_back_right(kind: str, dtype: str) -> None:
    with rig.group(dtype) as running:
        link = link_to(running, kind, dtype)
        for seed, (tokens, mode) in enumerate(
            (tokens, mode) for tokens in (1, 2, 3, 17, 64, 300) for mode in (PARTIAL, ROWS)
        ):
            sent = message(tokens, seed, mode)
            sent.write(link)
            (done,) = completions(link, 1)
            assert done.header.kind == REPLY and done.header.busy_ns == 7
            assert done.header.epoch == 11 and done.header.incarnation == 7
            sent.check(done)
            link.release(done.slot)
        link.close()


def test_more_than_a_whole_link_of_slots(kind: str, group: Group) -> None:
    """Twenty messages through four slots, answered in whatever order, all right."""
    link = link_to(group, kind)
    messages = {}
    waiting = [message(200, seed, layer=seed % 3) for seed in range(20)]
    done = 0
    while done < 20:
        while waiting and link.in_flight() < 4:
            sent = waiting.pop()
            messages[sent.write(link)] = sent
        assert link.acquire() is None or not waiting
        for completion in completions(link, 1):
            messages.pop(completion.header.seq).check(completion)
            link.release(completion.slot)
            done += 1
    link.close()


def test_what_does_not_fit_a_slot_is_refused_before_it_is_sent(kind: str, group: Group) -> None:
    link = link_to(group, kind)
    slot = link.acquire()
    assert slot is not None
    too_long = Call(0, PARTIAL, 2000, 1, 2000)
    assert not slot.fits(too_long)
    with pytest.raises(FrameError, match="slots hold 65536"):
        link.submit(slot, too_long)
    many_rows = Call(0, ROWS, 100, 1, 5000)  # the request would fit, its reply not
    assert link.wire.request_bytes(many_rows) < 65536 and not slot.fits(many_rows)
    with pytest.raises(FrameError):
        link.submit(slot, many_rows)
    link.release(slot)
    round_trip(link)
    link.close()


def test_slots_are_kept_in_order(kind: str, group: Group) -> None:
    link = link_to(group, kind)
    taken = [link.acquire() for _ in range(4)]
    assert link.acquire() is None
    for slot in taken:
        assert slot is not None
        link.release(slot)
    with pytest.raises(LinkError, match="released already"):
        link.release(taken[0])  # type: ignore[arg-type]
    group.gate.clear()
    message(2).write(link)
    in_flight = next(slot for slot in link.slots if slot.seq >= 0)
    with pytest.raises(LinkError, match="in flight"):
        link.release(in_flight)
    with pytest.raises(LinkError, match="in flight"):
        link.submit(in_flight, message(2).call)
    group.gate.set()
    completions(link, 1)
    link.close()


def test_nack_and_error(kind: str) -> None:
    with rig.group() as running:
        running.close()  # this test answers by itself
    server = rig.Server(
        rig.identity(), SECRET, layers=4, experts=8, incarnation=7, node=NODE, config=rig.config()
    )
    endpoint = next(e for e in server.endpoints() if e.kind == kind)
    link = connect(endpoint, rig.identity(), SECRET, node=NODE)
    for answer in ({"missing": [1, 5]}, {"error": "boom: " + "x" * 5000}):
        message(9).write(link)
        (request,) = server.poll(5)
        server.reply(request, **answer)  # type: ignore[arg-type]
        (done,) = completions(link, 1)
        if "missing" in answer:
            assert done.header.kind == NACK and done.missing() == [1, 5]
        else:
            assert done.header.kind == ERROR and done.text().startswith("boom: xxx")
        link.release(done.slot)
    link.close()
    server.stop()


def test_a_slow_reader_holds_nobody_up(kind: str, group: Group) -> None:
    """Somebody sends four large requests and reads no reply; others are served meanwhile."""
    slow, quick = link_to(group, kind), link_to(group, kind)
    sent = [message(700, seed) for seed in range(4)]
    by_seq = {m.write(slow): m for m in sent}
    for seed in range(5):
        round_trip(quick, seed=seed)
    rig.eventually(lambda: len(group.answered) == 9)
    for done in completions(slow, 4):  # and gets them all in the end
        by_seq.pop(done.header.seq).check(done)
    slow.close()
    quick.close()


def test_heartbeats_are_answered_while_computing(kind: str, group: Group) -> None:
    link = link_to(group, kind)
    round_trip(link)
    group.gate.clear()
    message(2).write(link)
    assert group.holding.wait(5)
    group.server.progress = 41
    before = link.last_heard_s
    pinger = threading.Thread(target=link.ping)  # from any thread
    pinger.start()
    pinger.join()

    def heard() -> bool:
        assert link.poll() == []
        return link.last_heard_s > before and link.progress == 41

    rig.eventually(heard)
    group.gate.set()
    completions(link, 1)
    link.close()


def test_unanswered_pings_are_few(kind: str, group: Group) -> None:
    link = link_to(group, kind)
    for _ in range(1000):
        link.ping()
    round_trip(link)
    link.close()


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("deployment", "other", "deployment differs: ours is 'demo', the peer's is 'other'"),
        ("fingerprint", "beef", "model fingerprint differs: ours is 'f00d'"),
        ("wire_dtype", "float16", "wire dtype differs"),
        ("hidden", 32, "hidden size differs: ours is 16, the peer's is 32"),
        ("protocol", 99, "protocol version differs"),
    ],
)
def test_mismatches_are_refused_by_name(
    kind: str, group: Group, field: str, value: Any, named: str
) -> None:
    theirs: Any = replace(rig.identity(), **{field: value})
    with pytest.raises(HandshakeRefused, match=named):
        connect(group.endpoint(kind), theirs, SECRET, node=NODE)
    link = link_to(group, kind)
    round_trip(link)
    link.close()


def test_wrong_secret_and_incarnation_are_refused(kind: str, group: Group) -> None:
    endpoint = group.endpoint(kind)
    with pytest.raises(HandshakeRefused, match="wrong secret"):
        connect(endpoint, rig.identity(), b"another secret, long enough", node=NODE)
    with pytest.raises(HandshakeRefused, match="incarnation differs: expected 8"):
        connect(endpoint, rig.identity(), SECRET, node=NODE, incarnation=8)
    link = connect(endpoint, rig.identity(), SECRET, node=NODE, incarnation=7)
    round_trip(link)
    link.close()


def test_terms_are_granted_up_to_the_limit(kind: str, group: Group) -> None:
    asked = SlotTerms(slots=2, request_bytes=8192, reply_bytes=1 << 40)
    link = connect(group.endpoint(kind), rig.identity(), SECRET, node=NODE, terms=asked)
    assert len(link.slots) == 2 and link.slot_bytes == 8192
    assert link.slots[0].reply.nbytes == 64 << 10
    round_trip(link)
    link.close()


def test_an_abandoned_request_cannot_answer_a_later_one(kind: str, group: Group) -> None:
    group.gate.clear()
    first = link_to(group, kind)
    message(300, 1).write(first)
    assert group.holding.wait(5)
    kept = first.slots[0].reply  # a view outlives the link, and its memory with it
    first.close()
    with pytest.raises(PeerLost, match="closed here"):
        first.poll()
    second = link_to(group, kind)
    sent = message(300, 2)
    sent.write(second)
    group.gate.set()
    (done,) = completions(second, 1)
    sent.check(done)
    kept.zero_()
    sent.check(done)
    second.close()


def test_peers_come_and_go_singly(kind: str, group: Group) -> None:
    stays = link_to(group, kind)
    for seed in range(8):
        link = link_to(group, kind)
        round_trip(link, seed=seed)
        message(5).write(link)
        link.close()
        round_trip(stays, seed=seed)
    rig.eventually(lambda: len(group.server.peers()) == 1)
    stays.close()


def test_the_end_of_the_server_is_noticed(kind: str) -> None:
    with rig.group() as running:
        link = link_to(running, kind)
        round_trip(link)
    assert rig.lost(link).peer == "group-0"
    with pytest.raises(PeerLost):
        link.submit(rig_slot(link), message(2).call)
    link.close()


def rig_slot(link: Any) -> Any:
    from raymoe.links.link import Slot
    from raymoe.links.protocol import Wire

    memory = np.zeros(65536, np.uint8)
    return Slot(0, Wire(hidden=rig.HIDDEN, dtype="float32"), memory, memory)


def test_a_silent_link_is_closed_after_its_lease(kind: str) -> None:
    with rig.group(lease_s=0.3) as running:
        silent, speaks = link_to(running, kind), link_to(running, kind)
        until = time.monotonic() + 0.6
        while time.monotonic() < until:
            speaks.ping()
            speaks.poll()
            time.sleep(0.05)
        rig.lost(silent)
        round_trip(speaks)
        speaks.close()


def test_wake_and_time_out(kind: str) -> None:
    server = rig.Server(rig.identity(), SECRET, layers=1, experts=1, node=NODE, config=rig.config())
    started = time.monotonic()
    assert server.poll(0.05) == [] and time.monotonic() - started >= 0.05
    threading.Timer(0.1, server.wake).start()
    assert server.poll(30) == [] and time.monotonic() - started < 10
    server.wake()  # before poll(): not forgotten, whoever saw it
    time.sleep(0.2)
    assert server.poll(30) == [] and time.monotonic() - started < 10
    threading.Timer(0.1, server.stop).start()
    assert server.poll(30) == [] and time.monotonic() - started < 10
    server.stop()


def test_more_links_than_allowed_are_refused_by_name(kind: str) -> None:
    with rig.group(max_links=1) as running:
        link = link_to(running, kind)
        with pytest.raises(HandshakeRefused, match="1 links are open, which is the limit"):
            link_to(running, kind)
        link.close()
        rig.eventually(lambda: not running.server.peers())
        link_to(running, kind).close()


def test_same_layer_requests_that_wait_come_out_together(kind: str, group: Group) -> None:
    links = [link_to(group, kind) for _ in range(3)]
    group.gate.clear()
    message(1, 0).write(links[0])
    assert group.holding.wait(5)
    sent = [message(2, seed, layer=2) for seed in range(3)]
    for m, link in zip(sent, links, strict=True):
        m.write(link)
    time.sleep(0.1)  # the second thread reads them while the first computes
    group.gate.set()
    done = completions(links[0], 2)
    sent[0].check(next(d for d in done if d.call.layer == 2))
    for m, link in zip(sent[1:], links[1:], strict=True):
        m.check(completions(link, 1)[0])
    assert group.batches == [1, 3]
    for link in links:
        link.close()


def test_one_poll_over_many_links(kind: str, group: Group) -> None:
    links = [link_to(group, kind) for _ in range(3)]
    poller = LinkPoller(spin_s=0.001)
    for link in links:
        poller.add(link)
    sent = {id(link): message(4, seed) for seed, link in enumerate(links)}
    for link in links:
        sent[id(link)].write(link)
    got = 0
    while got < 3:
        for link, done in poller.poll(5)[0]:
            sent[id(link)].check(done)
            got += 1
    threading.Timer(0.05, poller.wake).start()
    assert poller.poll(30) == ([], [])
    links[0].close()
    for link in links:
        poller.discard(link)
        link.close()
    poller.close()


def test_nothing_is_left_open(kind: str) -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with rig.group() as running:
        link_to(running, kind).close()
    before = descriptors()
    for _ in range(3):
        with rig.group() as running:
            link = link_to(running, kind)
            round_trip(link)
            message(300).write(link)
            link.close()
            with pytest.raises(HandshakeRefused):
                connect(running.endpoint(kind), rig.identity(), b"wrong" * 8, node=NODE)
        del link
    assert descriptors() <= before
