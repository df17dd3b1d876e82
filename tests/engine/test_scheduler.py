from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.engine.blocks import BlockPool
from raymoe.engine.scheduler import Scheduler, StepPlan
from raymoe.engine.sequence import Sequence, start_sequence
from tests.engine.support import request


def make(tokens: int, arrival: int = 0, priority: int = 0) -> Sequence:
    return start_sequence(
        request(str(arrival), tuple(range(tokens)), priority=priority, max_tokens=1000), arrival
    )


def scheduler(
    blocks: int = 100, batch: int = 8, chunk: int | None = 16, block_tokens: int = 4
) -> Scheduler:
    return Scheduler(BlockPool(blocks, block_tokens), max_batch=batch, chunk_tokens=chunk)


def commit(plan: StepPlan) -> None:
    """What the engine does after a forward: every complete sequence gets a token."""
    for one, tokens in chunks(plan):
        one.computed += tokens
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
        commit(plan)
    assert seen == [[(0, 16)], [(0, 16)], [(0, 8)], [(0, 1)]]


def test_decode_rows_are_in_every_step_while_a_long_prompt_comes_in() -> None:
    under = scheduler()
    under.add(make(3, 0))
    commit(under.plan())
    under.add(make(100, 1))
    for _ in range(6):
        plan = under.plan()
        assert rows(plan)[0] == (0, 1)
        assert sum(tokens for _, tokens in plan.prefill) <= 16
        commit(plan)


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


def test_planning_twice_gives_the_same_rows() -> None:
    under = scheduler()
    under.add(make(3, 0))
    commit(under.plan())
    under.add(make(30, 1))
    first = rows(under.plan())
    used = under.pool.used
    assert rows(under.plan()) == first
    assert under.pool.used == used


def test_the_youngest_makes_room() -> None:
    under = scheduler(blocks=6, chunk=None)  # 20 tokens
    under.add(make(7, 0))
    under.add(make(3, 1))
    commit(under.plan())
    young = under.running[1]
    while young in under.running:
        commit(under.plan())
    assert [one.arrival for one in under.running] == [0]
    assert under.preemptions == 1
    assert young.blocks == [] and young.computed == 0
    assert len(young.tokens) > 3  # what it made is kept


def test_a_preempted_sequence_does_not_come_straight_back() -> None:
    under = scheduler(blocks=6, chunk=None)
    under.add(make(7, 0))
    under.add(make(7, 1))
    for _ in range(12):
        commit(under.plan())
    assert under.preemptions <= 1


def test_cancelled_sequences_free_their_blocks() -> None:
    under = scheduler()
    first, second = make(9, 0), make(9, 1)
    under.add(first)
    commit(under.plan())
    under.add(second)
    under.remove(second)  # still waiting
    under.remove(first)
    assert under.pool.used == 0 and not under.plan()


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 16), st.integers(1, 12), st.integers(0, 1)),
        min_size=1,
        max_size=12,
    ),
    blocks=st.integers(9, 20),
    chunk=st.integers(1, 9),
)
def test_everything_ends_and_blocks_are_never_shared(
    arrivals: list[tuple[int, int, int, int]], blocks: int, chunk: int
) -> None:
    under = scheduler(blocks=blocks, batch=4, chunk=chunk)
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
        assert len(held) == len(set(held)) == under.pool.used
        assert 0 not in held
        for one, tokens in chunks(plan):
            assert len(one.blocks) * 4 >= one.computed + tokens
        assert len({id(one) for one, _ in chunks(plan)}) == len(chunks(plan))
        commit(plan)
        for one in [one for one in under.running if len(one.tokens) >= wanted[one]]:
            under.remove(one)
            done += 1
        if done == len(arrivals):
            break
    assert done == len(arrivals)
    assert under.pool.used == 0
