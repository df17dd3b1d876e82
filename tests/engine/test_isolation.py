"""No request reads what another one stored, and no engine another engine's state."""

from __future__ import annotations

import threading
from typing import Any

import torch

from raymoe.engine.engine import Engine
from raymoe.engine.paged import PagedModel
from tests.engine.support import Outcome, finish, prompt, request, run, stock_engine


def poison(engine: Engine, keep: list[int]) -> None:
    """Make every block but those in `keep` (and the padding block) not-a-number."""
    paged = engine._model
    assert isinstance(paged, PagedModel)
    others = [block for block in range(1, engine.pool.blocks) if block not in keep]
    for layer in paged._cache.layers.values():
        layer._key_blocks[others] = torch.nan
        layer._value_blocks[others] = torch.nan


def test_only_its_own_blocks_are_read() -> None:
    requests = [request(name, prompt(11, ord(name)), max_tokens=12) for name in "ab"]
    engine = stock_engine()
    expected = run(engine, requests)
    outcomes = {name: Outcome() for name in "ab"}
    for each in requests:
        engine.add(each)
    step = 0
    while engine.has_work:
        for event in engine.step():
            outcomes[event.request_id].take(event)
        sequence = engine._sequences.get("a")
        step += 1
        if sequence is not None and step > 2:
            poison(engine, keep=sequence.blocks)
    assert outcomes["a"].tokens == expected["a"].tokens
    assert outcomes["b"].tokens != expected["b"].tokens  # so the poison does harm its reader


def test_freed_blocks_are_clean_for_their_next_owner() -> None:
    each = request("a", prompt(11), max_tokens=12)
    engine = stock_engine()
    expected = run(engine, [each])["a"].tokens
    poison(engine, keep=[])
    assert run(engine, [each])["a"].tokens == expected


def test_company_does_not_change_tokens() -> None:
    engine = stock_engine(max_batch=16)
    requests = [request(str(n), prompt(3 + 5 * n, n), max_tokens=10) for n in range(8)]
    alone = {each.request_id: run(engine, [each])[each.request_id].tokens for each in requests}
    together = run(engine, requests)
    assert {name: one.tokens for name, one in together.items()} == alone


def test_two_engines_in_two_threads() -> None:
    engines: list[Any] = [stock_engine("qwen3_moe"), stock_engine("gpt_oss")]
    requests = [request(str(n), prompt(5 + 7 * n, n), max_tokens=15) for n in range(5)]
    expected = [run(engine, requests) for engine in engines]
    found: list[dict[str, Outcome]] = [{}, {}]

    def serve(at: int) -> None:
        found[at] = run(engines[at], requests)

    threads = [threading.Thread(target=serve, args=(at,)) for at in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == expected


def test_two_engines_stepped_in_turns_over_one_model() -> None:
    first = stock_engine()
    second = Engine(first._model._model, None, first.config)  # type: ignore[attr-defined]
    requests = [request(str(n), prompt(5 + 7 * n, n), max_tokens=9) for n in range(3)]
    expected = run(first, requests)
    outcomes = [{str(n): Outcome() for n in range(3)} for _ in range(2)]
    for each in requests:
        first.add(each)
    first.step()
    for each in requests:
        second.add(each)
    while second.has_work:
        for engine, found in zip((first, second), outcomes, strict=True):
            for event in engine.step():
                found[event.request_id].take(event)
    finish(first, outcomes[0])
    assert {name: one.tokens for name, one in outcomes[1].items()} == {
        name: one.tokens for name, one in expected.items()
    }
