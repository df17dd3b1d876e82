"""No request reads what another one stored, and no engine another engine's state."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from raymoe.engine.engine import Engine
from raymoe.engine.paged import PagedModel
from raymoe.engine.sequence import Sequence
from tests.engine.support import Outcome, finish, prompt, request, run, stock_engine


def poison(engine: Engine, owner: Sequence | None) -> None:
    """Make not-a-number of all blocks and lanes but those of `owner` (and the padding block)."""
    paged = engine._model
    assert isinstance(paged, PagedModel)
    keep = owner.blocks if owner is not None else []
    others = [block for block in range(1, engine.pool.blocks) if block not in keep]
    homes = {
        (shelf.capacity, lane)
        for shelf in paged._shelves
        for lane, member in enumerate(shelf.members)
        if member is owner
    }
    for layer in paged._cache.layers.values():
        for side in (layer.keys, layer.values):
            side.blocks[others] = torch.nan
        for ready in (layer.ready_keys, layer.ready_values):
            for capacity, lanes in ready._lanes.items():
                for lane in range(len(lanes)):
                    if (capacity, lane) not in homes:
                        lanes[lane] = torch.nan


@pytest.mark.parametrize(("lanes_share", "compiled"), [(0.0, False), (0.3, False), (0.0, True)])
def test_only_its_own_memory_is_read(lanes_share: float, compiled: bool) -> None:
    requests = [request(name, prompt(11, ord(name)), max_tokens=12) for name in "abc"]
    engine = stock_engine(lanes_share=lanes_share, prefix_cache=False, compiled=compiled)
    expected = run(engine, requests)
    for reader in "abc":
        outcomes = {name: Outcome() for name in "abc"}
        for each in requests:
            engine.add(each)
        step = 0
        while engine.has_work:
            for event in engine.step():
                outcomes[event.request_id].take(event)
            step += 1
            if step > 3 and engine.has_work:
                poison(engine, engine._sequences.get(reader))
        for name in "abc":
            # The poison does harm those that it is meant for.
            assert (outcomes[name].tokens == expected[name].tokens) == (name == reader)


def test_freed_blocks_are_clean_for_their_next_owner() -> None:
    each = request("a", prompt(11), max_tokens=12)
    engine = stock_engine(prefix_cache=False)
    expected = run(engine, [each])["a"].tokens
    poison(engine, None)
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
