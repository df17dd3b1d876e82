from __future__ import annotations

import pytest
import torch

from raymoe.engine.lanes import Shelf
from raymoe.engine.ready import ReadyLanes, ShelfRows, attend_turned
from raymoe.engine.sequence import start_sequence
from raymoe.engine.softmax import attend_plain
from raymoe.engine.tables import additive
from tests.engine.support import request

CPU = torch.device("cpu")
CAPACITY, HEADS, KEY_HEADS, WIDTH = 12, 4, 2, 6


def shelf_rows(counts: list[int]) -> ShelfRows:
    keys = max(counts)
    mask = additive((torch.arange(keys) >= torch.tensor(counts)[:, None]).numpy(), CPU)
    lane_heads = torch.arange(len(counts) * KEY_HEADS).view(-1, KEY_HEADS)
    at = torch.tensor(counts)[:, None] - 1
    numbers = torch.arange(len(counts) * KEY_HEADS * WIDTH).view(len(counts), -1)
    members = [start_sequence(request(), 0) for _ in counts]
    return ShelfRows(
        shelf=Shelf(capacity=CAPACITY, members=members, rooms=8),
        first=0,
        last=len(counts),
        rows=(lane_heads * CAPACITY + at).reshape(-1),
        turned_rows=(numbers * CAPACITY + at).reshape(-1),
        keys=keys,
        mask=mask[:, None, None],
        mask_by_head=mask.repeat_interleave(KEY_HEADS, 0)[:, None],
        fills=[],
    )


@pytest.mark.parametrize("turned", [False, True])
def test_a_lane_holds_what_is_filled_and_written_and_nothing_older(turned: bool) -> None:
    torch.manual_seed(0)
    ready = ReadyLanes(KEY_HEADS, WIDTH, torch.float32, CPU, turned=turned)
    shelf = shelf_rows([5, 3])
    ready.of(shelf.shelf).fill_(torch.nan)  # a former member
    stored = [torch.randn(KEY_HEADS, tokens, WIDTH) for tokens in (4, 3)]
    for lane, each in enumerate(stored):
        ready.fill(shelf.shelf, lane, each)
    new = torch.randn(2, KEY_HEADS, WIDTH)
    lanes = ready.write(shelf, new)
    if turned:
        lanes = lanes.transpose(-1, -2)
    assert torch.equal(lanes[0, :, :4], stored[0]) and torch.equal(lanes[0, :, 4], new[0])
    assert torch.equal(lanes[1, :, :2], stored[1][:, :2]) and torch.equal(lanes[1, :, 2], new[1])
    assert not lanes[0, :, 5:].any() and not lanes[1, :, 3:].any()


def test_growing_keeps_lanes_and_dropped_shelves_free_memory() -> None:
    ready = ReadyLanes(KEY_HEADS, WIDTH, torch.float32, CPU, turned=True)
    shelf = shelf_rows([5, 3]).shelf
    ready.of(shelf)[1] = 7.0
    shelf.rooms = 16
    assert len(ready.of(shelf)) == 16
    assert (ready.of(shelf)[1] == 7.0).all()
    ready.keep({64})
    assert not ready.of(shelf).any()


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_turned_attention_equals_plain_operations(cap: float | None, sinks: bool) -> None:
    torch.manual_seed(0)
    shelf = shelf_rows([5, 12, 1])
    query = torch.randn(3, HEADS, WIDTH)
    keys = torch.randn(3, KEY_HEADS, CAPACITY, WIDTH)
    values = torch.randn(3, KEY_HEADS, CAPACITY, 3)
    sink = torch.randn(HEADS) if sinks else None
    found = attend_turned(
        query, keys.transpose(-1, -2).contiguous(), values, shelf, scale=0.4, cap=cap, sinks=sink
    )
    group = HEADS // KEY_HEADS
    truth = attend_plain(
        query.view(3, KEY_HEADS, group, WIDTH), keys, values, scale=0.4, causal=False,
        mask=shelf.mask, sinks=None if sink is None else sink.view(1, KEY_HEADS, group), cap=cap,
    )  # fmt: skip
    assert torch.allclose(found, truth.reshape(3, HEADS, 3), atol=1e-6)
