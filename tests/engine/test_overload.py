"""Far more is asked for than can be done: what is let in keeps its latency, the rest is refused.

Time is counted in steps, so that nothing depends on how fast this machine is.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from raymoe.config import DeploymentConfig, RoutersConfig
from raymoe.errors import Overloaded
from tests.engine.support import Outcome, finish, prompt, request, run, stock_engine
from tests.engine.test_aside import make
from tests.zoo import tiny_checkpoint

BATCH, TOKENS, PROMPT = 4, 8, 6
OFFERED = 3  # requests a step; so many steps serve about half a request
STEPS = 240


def test_accepted_requests_wait_for_one_batch_at_most_and_memory_is_bounded() -> None:
    engine = stock_engine(max_batch=BATCH, max_waiting=BATCH, prefix_cache=False)
    asked: dict[str, int] = {}  # at which step
    first: dict[str, int] = {}
    ended: dict[str, int] = {}
    refused = most = blocks = 0
    alone = steps_alone()
    step = 0
    while step < STEPS or engine.has_work:
        for n in range(OFFERED if step < STEPS else 0):
            name = f"{step}.{n}"
            try:
                engine.add(request(name, prompt(PROMPT, step * OFFERED + n), max_tokens=TOKENS))
                asked[name] = step
            except Overloaded:
                refused += 1
        for event in engine.step():
            if event.token_ids:
                first.setdefault(event.request_id, step)
            if event.finish:
                assert event.finish == "length"
                ended[event.request_id] = step
        running, waiting = engine.load()
        most, blocks = max(most, running + waiting), max(blocks, engine.pool.used)
        step += 1
    assert refused > len(asked), "it was an overload"
    assert len(asked) > STEPS * BATCH / (2 * alone), "and still most of what can be done was done"
    assert ended.keys() == first.keys() == asked.keys(), "nobody who was let in failed"
    assert most == 2 * BATCH
    each = engine.pool.blocks_of(PROMPT + TOKENS)
    assert blocks <= BATCH * each, "those who wait hold no blocks"
    assert engine.pool.used == 0
    # Ahead of the last in the queue are one batch's turn in all (those that run and end one after
    # the other), and prompts of a batch share the prefill budget of a step: twice one's own time.
    slowest = max(first[name] - at for name, at in asked.items())
    assert slowest <= 2 * (alone + BATCH), (slowest, alone)


def steps_alone() -> int:
    """How many steps one request takes when there is no other."""
    engine = stock_engine(max_batch=BATCH, prefix_cache=False)
    engine.add(request("a", prompt(PROMPT), max_tokens=TOKENS))
    steps = 0
    while engine.has_work:
        engine.step()
        steps += 1
    return steps


def test_while_experts_are_missing_new_requests_are_refused_and_those_let_in_wait(
    tmp_path: Path,
) -> None:
    """Those set aside keep their places."""
    lossy, engine = make(tiny_checkpoint("qwen3_moe", tmp_path), max_batch=2, max_waiting=1)
    names = ("a", "b", "c")
    asked = {name: request(name, prompt(PROMPT, n), max_tokens=4) for n, name in enumerate(names)}
    alone = {}
    for each in asked.values():
        alone.update(run(engine, [each]))
    lossy.away = lossy.asked
    lossy.asked = set()
    outcomes = {name: Outcome() for name in names}
    for name in names:
        engine.add(asked[name])
        for _ in range(3):
            assert engine.step() == []
        assert engine.load()[0] <= 2
    for n in range(20):
        with pytest.raises(Overloaded):
            engine.add(request(f"more {n}"))
    lossy.away = set()
    finish(engine, outcomes)
    assert outcomes == alone


def test_a_request_that_goes_on_from_another_router_is_let_in_beyond_the_limit() -> None:
    engine = stock_engine(max_batch=1, max_waiting=0)
    engine.add(request("a", max_tokens=4))
    with pytest.raises(Overloaded):
        engine.add(request("b", max_tokens=4))
    engine.add(request("c", max_tokens=4, output_ids=(9, 9)))
    ended = set()
    while engine.has_work:
        ended |= {event.request_id for event in engine.step() if event.finish == "length"}
    assert ended == {"a", "c"}


def test_the_default_queue_is_as_long_as_the_batch() -> None:
    assert RoutersConfig(max_batch=48).max_requests == 96
    assert RoutersConfig(max_batch=48, max_waiting=0).max_requests == 48
    assert DeploymentConfig(model="m").routers.max_requests == 128
