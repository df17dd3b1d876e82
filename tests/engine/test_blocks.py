from __future__ import annotations

import pytest

from raymoe.engine.blocks import BlockPool


def test_counts_what_is_taken_and_given_back() -> None:
    pool = BlockPool(5, 4)
    assert (pool.free, pool.used, pool.capacity_tokens) == (4, 0, 16)
    taken = pool.take(3)
    assert 0 not in taken and len(set(taken)) == 3
    assert (pool.free, pool.used) == (1, 3)
    assert not pool.can_take(2)
    pool.give_back(taken)
    assert (pool.free, pool.used) == (4, 0)


def test_neighbours_stay_together() -> None:
    pool = BlockPool(9, 4)
    first = pool.take(4)
    assert first == [1, 2, 3, 4]
    pool.give_back(first)
    assert pool.take(4) == first


def test_taking_too_much_or_giving_back_twice_is_a_bug() -> None:
    pool = BlockPool(3, 4)
    with pytest.raises(AssertionError):
        pool.take(3)
    taken = pool.take(2)
    pool.give_back(taken)
    with pytest.raises(AssertionError):
        pool.give_back(taken)


def test_fresh_blocks_are_named_once() -> None:
    pool = BlockPool(5, 4)
    first = pool.take(2)
    assert pool.drain_fresh() == first
    assert pool.drain_fresh() == []


def test_blocks_of_a_sequence_round_up_and_count_its_state() -> None:
    assert [BlockPool(9, 4).blocks_of(tokens) for tokens in (1, 4, 5)] == [1, 1, 2]
    pool = BlockPool(9, 4, extra_blocks=3)
    assert pool.blocks_of(5) == 5
    assert pool.capacity_tokens == 20
