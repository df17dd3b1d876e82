"""What the controller asks of Ray holds its loop up no longer than `Head` lets it. Without Ray."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

import pytest
import ray

from actors.cluster import RayCluster
from actors.head import Head, HeadAway


class Away:
    """Ray's head: nothing is answered until `back` is set."""

    def __init__(self) -> None:
        self.back, self.killed = threading.Event(), threading.Event()
        self.asked: SimpleQueue[Any] = SimpleQueue()  # of other nodes

    def kill(self, actor: Any) -> None:
        self.back.wait()
        self.killed.set()

    def kill_on(self, *where: Any) -> None:
        self.back.wait()
        self.asked.put(where)

    def answer(self, *_: Any, **__: Any) -> Any:
        self.back.wait()


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Any:
    away = Away()
    monkeypatch.setattr(ray, "kill", away.kill)
    for name in ("names_alive", "find", "spawn", "place_of", "draining_nodes"):
        monkeypatch.setattr(f"actors.cluster.{name}", away.answer)
    monkeypatch.setattr("actors.cluster.kill_on", away.kill_on)
    yield away
    away.back.set()


def in_time(work: Callable[[], Any]) -> Any:
    """In a thread, so that a test of what would hang fails."""
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append(work())
        except HeadAway as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert ended, "it waits for Ray's head"
    return ended[0]


def limited() -> RayCluster:
    head = Head()
    head.limit_s = 0.02
    return RayCluster(head)


@pytest.mark.parametrize(
    "call",
    [
        lambda cluster: cluster.names_alive(),
        lambda cluster: cluster.find("a"),
        lambda cluster: cluster.start_group("a", {}, False),
        lambda cluster: cluster.place_of(None),
        lambda cluster: cluster.draining_nodes(),
    ],
)
def test_what_must_be_answered_is_given_up(away: Away, call: Callable[[RayCluster], Any]) -> None:
    cluster = limited()
    assert isinstance(in_time(lambda: call(cluster)), HeadAway)


def test_a_group_is_ended_when_the_head_is_back(away: Away) -> None:
    cluster = limited()
    in_time(lambda: cluster.kill(None))  # type: ignore[arg-type]
    assert not away.killed.is_set()
    away.back.set()
    assert away.killed.wait(60)


def test_a_frozen_group_of_this_node_ends_though_the_head_is_away(
    away: Away, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Here:
        def get_node_id(self) -> str:
            return "here"

    monkeypatch.setattr(ray, "get_runtime_context", Here)
    code = "import sys, time; time.sleep(600)"
    group = subprocess.Popen([sys.executable, "-c", code, "ray::ExpertGroup"])
    other = subprocess.Popen([sys.executable, "-c", code])
    try:
        cluster = limited()
        for node, process in (("elsewhere", group), ("here", other), ("here", group)):
            assert group.poll() is None
            in_time(partial(cluster.kill_frozen, None, node, process.pid))  # type: ignore[arg-type]
        assert group.wait(60) == -9
        assert other.poll() is None, "a process that has taken the number of a group"
        away.back.set()
        assert away.asked.get(timeout=60) == ("elsewhere", group.pid, "ExpertGroup")
        in_time(partial(cluster.kill_frozen, None, "", 0))  # type: ignore[arg-type]
        with pytest.raises(Empty):
            away.asked.get(timeout=0.1)
    finally:
        for process in (group, other):
            process.kill()
            process.wait()
