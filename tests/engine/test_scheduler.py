from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.engine.blocks import BlockPool
from raymoe.engine.prefix import PrefixChain
from raymoe.engine.scheduler import Scheduler, StepPlan
from raymoe.engine.sequence import Sequence, start_sequence
from tests.engine.support import request


def make(tokens: int, arrival: int = 0, priority: int = 0) -> Sequence:
    return start_sequence(
        request(str(arrival), tuple(range(tokens)), priority=priority, max_tokens=1000), arrival
    )


def scheduler(
    blocks: int = 100,
    batch: int = 8,
    chunk: int | None = 16,
    block_tokens: int = 4,
    shared: bool = False,
) -> Scheduler:
    return Scheduler(
        BlockPool(blocks, block_tokens),
        max_batch=batch,
        chunk_tokens=chunk,
        chain=PrefixChain(block_tokens) if shared else None,
    )


def commit(under: Scheduler, plan: StepPlan) -> None:
    """What the engine does after a forward: every complete sequence gets a token."""
    for one, tokens in chunks(plan):
        under.commit(one, tokens)
        if one.pending == 0:
            one.tokens.append(0)


def chunks(plan: StepPlan) -> list[tuple[Sequence, int]]:
    return [(one, 1) for one in plan.decode] + plan.prefill


def rows(plan: StepPlan) -> list[tuple[int, int]]:
    return [(one.arrival, tokens) for one, tokens in chunks(plan)]


def test_a_prompt_is_cut_to_the_chunk_budget() -> None:
    under = scheduler()
    under.add(make(40))
    seen = []
    for _ in range(4):
        plan = under.plan()
        seen.append(rows(plan))
        commit(under, plan)
    assert seen == [[(0, 16)], [(0, 16)], [(0, 8)], [(0, 1)]]


def test_decode_rows_are_in_every_step_while_a_long_prompt_comes_in() -> None:
    under = scheduler()
    under.add(make(3, 0))
    commit(under, under.plan())
    under.add(make(100, 1))
    for _ in range(6):
        plan = under.plan()
        assert rows(plan)[0] == (0, 1)
        assert sum(tokens for _, tokens in plan.prefill) <= 16
        commit(under, plan)


def test_whole_prompts_without_a_budget() -> None:
    under = scheduler(chunk=None)
    under.add(make(40, 0))
    under.add(make(30, 1))
    assert rows(under.plan()) == [(0, 40), (1, 30)]


def test_order_is_priority_then_arrival() -> None:
    under = scheduler(batch=2)
    for arrival, priority in ((0, 1), (1, 0), (2, 0)):
        under.add(make(4, arrival, priority))
    assert rows(under.plan()) == [(1, 4), (2, 4)]


def test_a_long_prompt_holds_up_neither_short_ones_nor_is_held_up_by_them() -> None:
    under = scheduler(blocks=1000, batch=99, chunk=16, block_tokens=64)
    under.add(long := make(400, 0))
    commit(under, under.plan())
    first_token = {}
    for step in range(60):
        if step < 40:
            under.add(make(8, step + 1))  # one more short prompt a step, half of the budget
        commit(under, under.plan())
        for one in under.running:
            if one.output_tokens == 1:
                first_token[one.arrival] = step
    assert all(first_token[arrival] == arrival - 1 for arrival in range(1, 41))
    assert long.output_tokens > 0  # in its half and what was left: 16 + 40 * 8 + 4 * 16


def test_prompts_of_one_length_are_first_come_first_served() -> None:
    under = scheduler(chunk=16)
    for arrival in range(3):
        under.add(make(12, arrival))
    assert rows(under.plan()) == [(0, 12), (1, 4)]


def test_the_prompt_of_a_lower_priority_number_is_read_first() -> None:
    under = scheduler(chunk=16)
    under.add(make(4, 0, priority=1))
    under.add(make(40, 1, priority=0))
    assert rows(under.plan()) == [(1, 16)]


def test_a_request_that_comes_first_takes_the_place_of_one_that_comes_last() -> None:
    full = scheduler(batch=2)
    for arrival, priority in ((0, 0), (1, 5), (2, 5)):
        full.add(make(4, arrival, priority))
    commit(full, full.plan())
    assert [one.arrival for one in full.running] == [0, 1]
    full.add(make(4, 3, priority=5))
    full.add(make(4, 4, priority=-1))
    full.plan()
    assert [one.arrival for one in full.running] == [4, 0]
    assert [one.arrival for one in full.waiting] == [1, 2, 3]
    assert full.preemptions == 1
    for _ in range(5):
        commit(full, full.plan())
    assert full.preemptions == 1


def test_nothing_is_preempted_when_it_would_not_make_enough_room() -> None:
    under = scheduler(blocks=12, chunk=None)
    under.add(make(20, 0, priority=0))
    under.add(make(8, 1, priority=9))
    commit(under, under.plan())
    under.add(make(30, 2, priority=3))
    commit(under, under.plan())
    assert [one.arrival for one in under.running] == [0, 1]
    under.add(make(9, 3, priority=2))
    under.plan()
    assert [one.arrival for one in under.running] == [0, 3]


def test_planning_twice_gives_the_same_rows() -> None:
    under = scheduler()
    under.add(make(3, 0))
    commit(under, under.plan())
    under.add(make(30, 1))
    first = rows(under.plan())
    used = under.pool.used
    assert rows(under.plan()) == first
    assert under.pool.used == used


def test_the_youngest_makes_room() -> None:
    under = scheduler(blocks=6, chunk=None)  # 20 tokens
    under.add(make(7, 0))
    under.add(make(3, 1))
    commit(under, under.plan())
    young = under.running[1]
    while young in under.running:
        commit(under, under.plan())
    assert [one.arrival for one in under.running] == [0]
    assert under.preemptions == 1
    assert young.blocks == [] and young.computed == 0
    assert len(young.tokens) > 3  # what it made is kept


def test_a_preempted_sequence_does_not_come_straight_back() -> None:
    under = scheduler(blocks=6, chunk=None)
    under.add(make(7, 0))
    under.add(make(7, 1))
    for _ in range(12):
        commit(under, under.plan())
    assert under.preemptions <= 1


def test_cancelled_sequences_free_their_blocks() -> None:
    under = scheduler()
    first, second = make(9, 0), make(9, 1)
    under.add(first)
    commit(under, under.plan())
    under.add(second)
    under.remove(second)  # still waiting
    under.remove(first)
    assert under.pool.used == 0 and not under.plan()


def test_a_prompt_that_others_have_computed_is_not_computed_again() -> None:
    under = scheduler(shared=True)
    under.add(make(14, 0))
    commit(under, under.plan())
    under.add(later := make(14, 1))
    plan = under.plan()
    assert rows(plan) == [(0, 1), (1, 2)]  # 12 of 14 are in full blocks
    assert later.cached_tokens == 12
    assert later.blocks[:3] == under.running[0].blocks[:3]
    assert under.pool.used == 4 + 1
    assert rows(under.plan()) == rows(plan)
    assert (under.queried_tokens, under.reused_tokens) == (28, 12)


def test_alike_prompts_that_come_at_once_are_computed_once() -> None:
    under = scheduler(shared=True, chunk=64)
    for arrival in range(4):
        under.add(make(22, arrival))
    seen = []
    for _ in range(3):
        plan = under.plan()
        seen.append(rows(plan))
        commit(under, plan)
    assert seen[0] == [(0, 22)]
    assert seen[1] == [(0, 1), (1, 2), (2, 2), (3, 2)]
    assert seen[2] == [(n, 1) for n in range(4)]


def test_blocks_are_shown_to_others_only_when_their_step_is_committed() -> None:
    under = scheduler(shared=True, chunk=8)
    under.add(make(30, 0))
    under.plan()  # never committed: the forward failed
    assert under.pool.published == 0
    commit(under, under.plan())
    assert under.pool.published == 2


def test_blocks_of_ended_sequences_stay_until_their_place_is_needed() -> None:
    under = scheduler(blocks=11, chunk=None, shared=True)
    under.add(first := make(17, 0))
    commit(under, under.plan())
    under.remove(first)
    assert (under.pool.used, under.pool.free, under.pool.published) == (0, 10, 4)
    under.add(second := make(17, 1))
    under.plan()
    assert second.cached_tokens == 16
    under.remove(second)
    other = start_sequence(request("2", tuple(range(100, 130))), 2)
    under.add(other)
    commit(under, under.plan())
    under.remove(other)
    # 8 blocks were needed and 6 were empty: the ends of the older prefix went, not its beginning.
    under.add(third := make(17, 3))
    under.plan()
    assert third.cached_tokens == 8


def test_prompt_tokens_whose_log_probabilities_are_wanted_are_computed() -> None:
    under = scheduler(shared=True)
    under.add(make(14, 0))
    commit(under, under.plan())
    under.add(start_sequence(request("1", tuple(range(14)), prompt_logprobs=1), 1))
    assert rows(under.plan()) == [(0, 1), (1, 14)]


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 16), st.integers(1, 12), st.integers(0, 2)),
        min_size=1,
        max_size=12,
    ),
    blocks=st.integers(9, 20),
    chunk=st.integers(1, 9),
    shared=st.booleans(),
)
def test_everything_ends_and_nobody_writes_what_others_hold(
    arrivals: list[tuple[int, int, int, int]], blocks: int, chunk: int, shared: bool
) -> None:
    under = scheduler(blocks=blocks, batch=4, chunk=chunk, shared=shared)
    wanted = {}
    done = 0
    for now in range(3000):
        for arrival, (when, tokens, new, priority) in enumerate(arrivals):
            if when == now:
                one = make(tokens, arrival, priority)
                wanted[one] = tokens + new
                under.add(one)
        plan = under.plan()
        held = [block for one in under.running for block in one.blocks]
        assert len(set(held)) == under.pool.used
        assert shared or len(held) == len(set(held))
        assert 0 not in held and under.pool.published < blocks
        holders = Counter(held)
        for one, tokens in chunks(plan):
            assert len(one.blocks) * 4 >= one.computed + tokens
            written = one.blocks[one.computed // 4 : (one.computed + tokens - 1) // 4 + 1]
            assert all(holders[block] == 1 for block in written)
        assert len({id(one) for one, _ in chunks(plan)}) == len(chunks(plan))
        commit(under, plan)
        for one in [one for one in under.running if len(one.tokens) >= wanted[one]]:
            under.remove(one)
            done += 1
        if done == len(arrivals):
            break
    assert done == len(arrivals)
    assert under.pool.used == 0
