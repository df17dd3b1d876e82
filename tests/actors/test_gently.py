"""Work at low priority: its results and errors arrive, and nobody else's priority changes."""

from __future__ import annotations

import os
import threading

import pytest

from actors.gently import gently


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_only_the_work_has_a_low_priority() -> None:
    before = niceness()
    assert gently(niceness) == max(before, 10)
    assert niceness() == before
    beside: list[int] = []
    thread = threading.Thread(target=lambda: beside.append(niceness()))
    thread.start()
    thread.join()
    assert beside == [before]


def test_errors_arrive() -> None:
    with pytest.raises(ZeroDivisionError):
        gently(lambda: 1 // 0)
