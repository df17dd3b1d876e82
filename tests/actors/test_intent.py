"""What operators may ask for, and what it makes of the groups. No Ray."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest

from actors.intent import Intent, drained, kind_of, replaced, scaled
from actors.lease import Lease
from actors.traffic import Behind, Traffic
from raymoe.config import DeploymentConfig, load_config
from raymoe.control import ClientReport
from raymoe.errors import ConfigError


def settings(groups: object = 2) -> DeploymentConfig:
    return load_config(None, {"model": "m", "groups": groups})


def ids(intent: Intent) -> list[tuple[str, str]]:
    return [(m.id, m.draining) for m in intent.members]


def test_grow_and_shrink() -> None:
    config = settings()
    intent = scaled(config, Intent.of(config), 4, None, [])
    assert ids(intent) == [("g0", ""), ("g1", ""), ("g2", ""), ("g3", "")]
    small = scaled(config, intent, 2, None, ["g1", "g3", "g0", "g2"])
    assert small.draining == {"g1", "g3"}
    assert ids(small.retired("g1").retired("g3")) == [("g0", ""), ("g2", "")]
    back = scaled(config, small, 3, None, [])
    assert back.draining == {"g3"}, "a group on its way out comes back before a new one starts"
    again = scaled(config, small.retired("g1"), 4, None, [])
    assert [m.id for m in again.members if not m.draining] == ["g0", "g2", "g3", "g1"]
    assert Intent.from_dict(again.to_dict()) == again


def test_drain_undo_and_what_is_kept() -> None:
    config = settings(3)
    intent = drained(Intent.of(config), "g1", undo=False)
    assert intent.draining == {"g1"}
    assert intent.retired("g1") == intent, "an operator may want it back"
    assert drained(intent, "g1", undo=True) == Intent.of(config)
    two = drained(intent, "g0", undo=False)
    with pytest.raises(ConfigError, match="last one"):
        drained(two, "g2", undo=False)
    with pytest.raises(ConfigError, match=r"g7.*there are g0, g1, g2"):
        drained(intent, "g7", undo=False)
    with pytest.raises(ConfigError, match="not draining"):
        drained(intent, "g0", undo=True)


def test_a_group_whose_node_goes_is_replaced() -> None:
    config = settings()
    intent = replaced(config, Intent.of(config), "g0")
    assert ids(intent) == [("g0", "node"), ("g1", ""), ("g2", "")]
    assert replaced(config, intent, "g0") == intent
    assert ids(intent.retired("g0")) == [("g1", ""), ("g2", "")]


def test_bounds_of_kinds() -> None:
    config = settings(
        (
            {"kind": "small", "count": 2, "min_count": 1, "max_count": 3},
            {"kind": "big", "count": 1, "min_count": 0},
        )
    )
    intent = Intent.of(config)
    with pytest.raises(ConfigError, match="say which kind"):
        scaled(config, intent, 2, None, [])
    with pytest.raises(ConfigError, match="1 to 3 are allowed"):
        scaled(config, intent, 4, "small", [])
    with pytest.raises(ConfigError, match="no kind 'huge'"):
        kind_of(config, "huge")
    assert scaled(config, intent, 0, "big", []).draining == {"big-0"}
    with pytest.raises(ConfigError, match="max_count"):
        settings(({"count": 4, "max_count": 3},))


def test_windows_of_traffic() -> None:
    traffic = Traffic(1, 2, window_s=2.0, now=0.0)
    report = ClientReport(name="r", counts=np.array([[3, 1]]))
    traffic.add([report, report], 1.0)
    assert traffic.window(1.0) == (None, 0.0)
    traffic.add([report], 2.0)
    counts, seconds = traffic.window(2.0)
    assert counts is not None and counts.tolist() == [[9.0, 3.0]] and seconds == 2.0
    traffic.add([], 5.0)
    assert traffic.window(5.0) == (None, 0.0), "a quiet time is no window"
    assert 0 < traffic.load[0, 1] < traffic.load[0, 0]


def test_a_router_that_never_acknowledges_is_left_behind() -> None:
    behind = Behind(limit_s=10.0)
    assert behind.drained((1, 5), ("r1",), 0.0) == 0
    assert behind.drained((1, 5), ("r1",), 9.9) == 0
    assert behind.drained((1, 5), ("r1",), 10.0) == 5
    assert behind.drained((1, 6), ("r1",), 10.1) == 6, "one that is stuck is waited for once"
    assert behind.drained((1, 6), (), 10.2) == 6


def test_a_lease_ends_what_nobody_renews() -> None:
    ended = threading.Event()
    lease = Lease(0.05, ended.set)
    assert ended.wait(30)
    lease.close()
    kept = threading.Event()
    other = Lease(3600.0, kept.set)
    other.renew()
    other.close()
    assert not kept.is_set()


def test_a_lease_goes_on_while_there_is_use() -> None:
    uses, ended = itertools.count(), threading.Event()
    stopped = threading.Event()

    def used() -> float:
        return 0.0 if stopped.is_set() else float(next(uses))

    lease = Lease(0.02, ended.set, used)
    assert not ended.wait(0.3)
    stopped.set()
    assert ended.wait(30)
    lease.close()
