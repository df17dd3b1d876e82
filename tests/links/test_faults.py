"""The faulty link does what it is told, over every transport, and nothing else."""

from __future__ import annotations

import time

import pytest

from raymoe.errors import LinkError
from raymoe.links.faults import Faults, FaultyLink
from tests.links import rig
from tests.links.rig import KINDS, message, round_trip

pytestmark = pytest.mark.parametrize("kind", KINDS)


def test_without_faults_nothing_changes(kind: str) -> None:
    with rig.group() as group:
        link = FaultyLink(rig.link_to(group, kind), Faults())
        for seed in range(3):
            round_trip(link, seed=seed)
        link.close()


def test_a_dropped_request_is_never_answered(kind: str) -> None:
    with rig.group() as group:
        link = FaultyLink(rig.link_to(group, kind), Faults(drop=frozenset({2})))
        round_trip(link)
        slot = link.acquire()
        assert slot is not None
        link.submit(slot, message(2).call)
        assert link.in_flight() == 1
        with pytest.raises(LinkError, match="in flight"):
            link.release(slot)
        round_trip(link)
        assert link.in_flight() == 1 and len(group.answered) >= 1
        link.close()


def test_a_delayed_reply_comes_later_and_right(kind: str) -> None:
    with rig.group() as group:
        link = FaultyLink(rig.link_to(group, kind), Faults(delay_s={1: 0.1}))
        began = time.monotonic()
        round_trip(link)
        assert time.monotonic() - began >= 0.1
        link.close()


def test_a_corrupt_request_ends_the_link(kind: str) -> None:
    with rig.group() as group:
        link = FaultyLink(rig.link_to(group, kind), Faults(corrupt=frozenset({1})))
        message(2).write(link)
        rig.lost(link)
        assert group.answered == []
        link.close()


def test_a_kill_loses_the_peer_at_that_message(kind: str) -> None:
    with rig.group() as group:
        link = FaultyLink(rig.link_to(group, kind), Faults(kill=frozenset({2})))
        round_trip(link)
        message(2).write(link)
        assert "killed at message 2" in str(rig.lost(link))
        link.close()
    with rig.group() as group:
        faults = Faults(kill=frozenset({1}), on_kill=group.server.stop)
        link = FaultyLink(rig.link_to(group, kind), faults)
        message(2).write(link)
        rig.lost(link)
        link.close()
