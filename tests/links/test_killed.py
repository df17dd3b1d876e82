"""Peers that are SIGKILLed in the middle of a request and of a reply. Real processes."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from tests.links import peers, rig
from tests.links.rig import message, round_trip

# one process imports torch, the others are forked from it
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.links.peers"])


@pytest.mark.parametrize("kind", ["shm", "tcp"])
@pytest.mark.parametrize("when", ["request", "reply"])
def test_a_killed_client_hurts_nobody(kind: str, when: str) -> None:
    with rig.group() as group:
        other = rig.link_to(group, kind)
        round_trip(other)
        if when == "reply":
            group.gate.clear()  # it dies while its first request is being computed
        args = (group.endpoint(kind), when)
        process = PROCESSES.Process(target=peers.client_that_dies, args=args, daemon=True)
        process.start()
        if when == "reply":
            assert group.holding.wait(20)
        process.join(20)
        assert process.exitcode == -9
        rig.eventually(lambda: len(group.server.peers()) == 1)
        group.gate.set()
        round_trip(other)
        if when == "reply":
            rig.eventually(lambda: len(group.answered) == 3)
            assert group.answered[1] is False  # computed for nobody; the others were forgotten
        assert group.server.queued() == (0, 0)
        other.close()


@pytest.mark.parametrize("kind", ["shm", "tcp"])
@pytest.mark.parametrize("when", ["request", "reply"])
def test_a_killed_group_is_noticed_and_leaves_nothing(kind: str, when: str) -> None:
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=peers.server_that_dies, args=(theirs, when), daemon=True)
    process.start()
    assert ours.poll(20)
    endpoints = ours.recv()
    endpoint = next(e for e in endpoints if e.kind == kind)
    link = rig.connect(endpoint, rig.identity(), rig.SECRET, node=rig.NODE)
    shared = Path("/dev/shm")
    before = set(shared.iterdir()) if shared.exists() else set()
    round_trip(link)
    message(300).write(link)
    began = time.monotonic()
    with pytest.raises(rig.PeerLost):  # and no half reply is taken for a whole one
        rig.completions(link, 1)
    assert time.monotonic() - began < 5
    process.join(20)
    assert process.exitcode == -9
    names = Path("/proc/net/unix").read_text()
    assert not any(e.address in names for e in endpoints if e.kind == "shm")
    assert (set(shared.iterdir()) if shared.exists() else set()) <= before
    link.close()
