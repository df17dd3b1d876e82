"""Rows set aside over the real client: a group dies in mid layer, and comes back."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from raymoe.client import ClientConfig, ExpertClient
from raymoe.engine.aside import SettingAside
from tests.client.scripted_group import (
    HIDDEN,
    SECRET,
    Fleet,
    ScriptedGroup,
    answer,
    die_silently,
    identity,
    reference,
)

IDS = torch.tensor([[0, 1], [1, 2], [1, 0], [0, 1]])
OWNERS = [0, 1, 1, 2]  # the second request has two rows, and one of them needs expert 2


def wait_for(happened: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_rows_that_need_a_lost_group_are_set_aside_until_it_is_back() -> None:
    left = ScriptedGroup("a", {(0, 0), (0, 1)})
    right = ScriptedGroup("b", {(0, 2), (0, 3)})
    fleet = Fleet([left, right], 1, 4)
    config = ClientConfig(stall_limit_s=0.05, retry_s=0.01, reconnect_s=(0.01, 0.02))
    client = ExpertClient(identity(), SECRET, "n", config, dial=fleet.dial)
    experts = SettingAside(client)
    torch.manual_seed(0)
    hidden, weights = torch.randn(4, HIDDEN), torch.rand(4, 2)
    expected = reference(0, hidden, IDS, weights)

    def step() -> torch.Tensor:
        experts.begin(OWNERS)
        try:
            return experts.combine(experts.dispatch(0, hidden, IDS, weights)).double()
        finally:
            experts.end()

    try:
        client.set_table(fleet.table(1))
        wait_for(lambda: client.connected() == ("a", "b"))
        wait_for(lambda: client.absent(0) is None)
        torch.testing.assert_close(step(), expected, rtol=1e-5, atol=1e-5)
        assert experts.lost == {}

        right.policy, right.reachable = die_silently, False
        for _ in range(3):  # found out in mid layer, then known
            found = step()
            assert set(experts.lost) == {1}
            assert not found[1:3].any()
            torch.testing.assert_close(found[[0, 3]], expected[[0, 3]], rtol=1e-5, atol=1e-5)
            wait_for(lambda: client.absent(0) == [2, 3])
            assert not experts.back(experts.lost[1])

        error = experts.lost[1]
        right.policy, right.reachable = answer, True
        wait_for(lambda: experts.back(error))
        torch.testing.assert_close(step(), expected, rtol=1e-5, atol=1e-5)
        assert experts.lost == {}
    finally:
        client.close()
