"""Clients that do not take tables: each is waited for, once, for so long."""

from __future__ import annotations

import logging

import pytest

from actors.traffic import Behind


def test_a_client_that_keeps_up_is_waited_for_at_each_table() -> None:
    behind = Behind(limit_s=30.0)
    for epoch in range(1, 20):
        now = 10.0 * epoch
        assert behind.drained((1, epoch), ("a",), now) == 0
        assert behind.drained((1, epoch), (), now + 1) == epoch


def test_a_stuck_client_holds_drops_up_once_though_tables_change_all_the_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    behind = Behind(limit_s=30.0)
    drained = []
    with caplog.at_level(logging.WARNING, logger="raymoe.controller"):
        for epoch in range(1, 13):  # a new table every 10 s, taken by the other client after 1 s
            now = 10.0 * epoch
            behind.drained((1, epoch), ("a", "stuck"), now)
            drained.append(behind.drained((1, epoch), ("stuck",), now + 2))
    assert drained == [0, 0, 0, *range(4, 13)]
    assert caplog.text.count("left behind") == 1
    # the other one is waited for all the same
    assert behind.drained((1, 13), ("a", "stuck"), 130.0) == 0
    # and it is waited for anew once it has kept up, or has come back under its name
    assert behind.drained((1, 13), (), 131.0) == 13
    assert behind.drained((1, 14), ("stuck",), 140.0) == 0
