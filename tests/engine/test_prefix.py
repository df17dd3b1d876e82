"""KV blocks shared among requests that begin with the same tokens."""

from __future__ import annotations

from typing import Any

import pytest

from raymoe.engine.engine import Engine
from raymoe.engine.prefix import PrefixChain
from raymoe.engine.sequence import start_sequence
from raymoe.requests import GenerationRequest
from tests.engine.support import generate, prompt, request, run, stock_engine, stock_model


def keys(tokens: tuple[int, ...], chain: PrefixChain) -> list[bytes]:
    return chain.keys(start_sequence(request("a", tokens), 0), len(tokens) // 4)


def test_a_name_says_all_tokens_up_to_the_end_of_its_block() -> None:
    chain = PrefixChain(4)
    ids = prompt(12)
    names = keys(ids, chain)
    assert len(set(names)) == 3
    assert keys(ids, chain) == names
    assert keys(ids, PrefixChain(4)) != names
    for at in range(12):
        other = keys((*ids[:at], 501, *ids[at + 1 :]), chain)
        same = [a == b for a, b in zip(names, other, strict=True)]
        assert same == [block < at // 4 for block in range(3)]
    one = start_sequence(request("a", ids[:6]), 0)
    assert chain.key_at(one, 3) == names[0] and chain.key_at(one, 5) is None


def branches(fields: dict[str, Any]) -> list[GenerationRequest]:
    """Requests that begin alike, and part inside a block, at its border, or never."""
    whole = prompt(45)
    return [
        request(str(n), (*whole[:shared], *prompt(6, n + 1)), max_tokens=4, seed=n, **fields)
        for n, shared in enumerate((45, 44, 43, 40, 3, 0))
    ]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_shared_beginning_changes_no_token(family: str) -> None:
    """Full attention, sliding windows with sinks, latent attention."""
    requests = branches({})
    expected = {n: one.tokens for n, one in run(stock_engine(family), requests).items()}
    engine = stock_engine(family, prefix_cache=False)
    assert {n: one.tokens for n, one in run(engine, requests).items()} == expected
    assert engine.stats.prefix_reused_tokens == 0
    engine = stock_engine(family)
    found = {each.request_id: run(engine, [each])[each.request_id] for each in requests}
    assert {n: one.tokens for n, one in found.items()} == expected
    assert [found[str(n)].cached_tokens for n in range(6)] == [0, 44, 40, 40, 0, 0]


def test_conversations_reuse_what_was_generated() -> None:
    truth: Any = stock_model()
    engine = stock_engine()
    said, before = prompt(10), 0
    for turn in range(4):
        found = run(engine, [request("a", said, max_tokens=9)])["a"]
        assert found.tokens == generate(truth, said, 9)[0]
        # The last token of an answer has no keys and values yet.
        assert found.cached_tokens == before // 4 * 4
        before = len(said) + 9 - 1
        said = (*said, *found.tokens, *prompt(5, turn + 2))


def test_many_outputs_of_one_prompt_compute_it_once() -> None:
    engine = stock_engine(chunk_tokens=256, max_batch=8)
    requests = [
        request(str(n), prompt(50), max_tokens=4, temperature=1.0, choice=n) for n in range(6)
    ]
    found = run(engine, requests)
    assert [found[str(n)].cached_tokens for n in range(6)] == [0] + [48] * 5
    assert engine.stats.prefill_tokens == 50 + 5 * 2
    assert run(stock_engine(prefix_cache=False), requests) == found


def test_prompt_log_probabilities_are_complete_whatever_is_cached() -> None:
    engine = stock_engine()
    fields: dict[str, Any] = {"max_tokens": 3, "prompt_logprobs": 2}
    first = run(engine, [request("a", prompt(30), **fields)])["a"]
    again = run(engine, [request("a", prompt(30), **fields)])["a"]
    assert len(again.prompt_logprobs) == 29
    for a, b in zip(first.prompt_logprobs, again.prompt_logprobs, strict=True):
        assert a.token == pytest.approx(b.token, abs=1e-4)
    plain = run(engine, [request("a", prompt(30), max_tokens=3)])["a"]
    assert (again.cached_tokens, plain.cached_tokens) == (0, 28)
    assert again.tokens == plain.tokens


def test_few_blocks_are_reused_where_they_can_be() -> None:
    """Preemption, eviction and reuse at once; memory stays what it was."""
    scarce = stock_engine(kv_bytes=70_000, lanes_share=0.0)
    assert scarce.pool.capacity_tokens < 100
    requests = branches({"temperature": 1.0})
    expected = run(stock_engine(prefix_cache=False), requests)
    for _ in range(2):
        assert run(scarce, requests) == expected
        assert scarce.pool.published < scarce.pool.blocks
    assert scarce.stats.prefix_reused_tokens > 0


def test_slow_families_share_nothing() -> None:
    engine = stock_engine("qwen3_next")
    assert not engine.packed
    for _ in range(2):
        found = run(engine, [request("a", prompt(30), max_tokens=3)])["a"]
    assert found.cached_tokens == 0
    assert engine.pool.published == 0


def test_it_can_be_turned_off() -> None:
    engine: Engine = stock_engine(prefix_cache=False)
    for _ in range(2):
        found = run(engine, [request("a", prompt(30), max_tokens=3)])["a"]
    assert (found.cached_tokens, engine.stats.prefix_queried_tokens) == (0, 30 * 2)
    assert engine.stats.prefix_reused_tokens == 0
