from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.engine.lanes import ROOM_STEP, Lanes, Shelf, capacity_for
from raymoe.engine.sequence import Sequence, start_sequence
from tests.engine.support import request


def decoding(keys: int) -> Sequence:
    one = start_sequence(request(prompt_ids=(0,) * keys), 0)
    one.computed = keys - 1
    return one


def test_capacities_waste_at_most_half() -> None:
    found = [capacity_for(keys) for keys in (1, 63, 64, 95, 96, 127, 128, 191, 192, 300, 400)]
    assert found == [64, 64, 96, 96, 128, 128, 192, 192, 256, 384, 512]


def test_a_lane_is_filled_once_and_kept_while_the_sequence_decodes() -> None:
    lanes = Lanes(budget_tokens=10_000, split_tokens=50)
    decode = [decoding(10), decoding(12)]
    (shelf,) = lanes.place(decode)
    assert (shelf.members, shelf.fresh) == (decode, {0, 1})
    (shelf,) = lanes.place(decode)
    assert (shelf.members, shelf.fresh) == (decode, set())


def test_the_last_lane_closes_a_gap() -> None:
    lanes = Lanes(budget_tokens=10_000, split_tokens=50)
    decode = [decoding(10) for _ in range(4)]
    lanes.place(decode)
    (shelf,) = lanes.place([decode[0], decode[2], decode[3]])
    assert shelf.members == [decode[0], decode[3], decode[2]]
    assert shelf.fresh == {1}
    assert lanes.place([]) == []


def test_an_outgrown_lane_is_changed_for_a_longer_one() -> None:
    lanes = Lanes(budget_tokens=10_000, split_tokens=50)
    one = decoding(64)
    assert lanes.place([one])[0].capacity == 96
    one.computed = 96
    (shelf,) = lanes.place([one])
    assert (shelf.capacity, shelf.fresh) == (128, {0})


def test_few_sequences_share_a_shelf_and_many_do_not() -> None:
    few = Lanes(budget_tokens=100_000, split_tokens=192)
    assert len(few.place([decoding(100), decoding(30)])) == 1
    many = Lanes(budget_tokens=100_000, split_tokens=192)
    shelves = many.place([decoding(100) for _ in range(8)] + [decoding(30) for _ in range(8)])
    assert sorted(shelf.capacity for shelf in shelves) == [64, 128]


def test_no_budget_no_lanes() -> None:
    assert Lanes(budget_tokens=0, split_tokens=50).place([decoding(9)]) == []


@settings(max_examples=80, deadline=None)
@given(
    joins=st.lists(st.lists(st.integers(1, 300), max_size=5), min_size=1, max_size=30),
    stay=st.integers(1, 40),
    budget=st.integers(0, 20_000),
    split=st.integers(0, 500),
)
def test_lanes_are_dense_within_budget_and_fresh_when_they_moved(
    joins: list[list[int]], stay: int, budget: int, split: int
) -> None:
    lanes = Lanes(budget_tokens=budget, split_tokens=split)
    decode: list[Sequence] = []
    born: dict[Sequence, int] = {}
    where: dict[Sequence, tuple[int, int]] = {}
    for step, lengths in enumerate(joins):
        decode = [one for one in decode if step - born[one] < stay]
        for length in lengths:
            decode.append(decoding(length))
            born[decode[-1]] = step
        shelves = lanes.place(decode)
        now = {
            one: (shelf.capacity, lane)
            for shelf in shelves
            for lane, one in enumerate(shelf.members)
        }
        assert len(now) == sum(len(shelf.members) for shelf in shelves)
        assert now.keys() <= set(decode)
        assert sum(shelf.rooms * shelf.capacity for shelf in shelves) <= budget
        for shelf in shelves:
            check(shelf, where, now)
        where = now
        for one in decode:
            one.tokens.append(0)
            one.computed += 1


def check(
    shelf: Shelf, before: dict[Sequence, tuple[int, int]], now: dict[Sequence, tuple[int, int]]
) -> None:
    assert 0 < len(shelf.members) <= shelf.rooms
    assert shelf.rooms % ROOM_STEP == 0
    assert all(one.computed < shelf.capacity for one in shelf.members)
    for lane, one in enumerate(shelf.members):
        assert (lane in shelf.fresh) or before.get(one) == now[one]
    assert all(lane < len(shelf.members) for lane in shelf.fresh)
