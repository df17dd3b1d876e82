"""A request continued elsewhere, or after a preemption, goes on as if nothing had happened."""

from __future__ import annotations

from typing import Any

import pytest

from raymoe.engine.engine import Engine
from tests.engine.support import prompt, request, run, stock_engine

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.1, "seed": 5},
    "filters": {"temperature": 1.4, "top_p": 0.9, "top_k": 300, "min_p": 0.001, "seed": 6},
    "typical": {"temperature": 1.2, "typical_p": 0.8, "seed": 7, "choice": 3},
    "penalties": {
        "temperature": 0.9, "seed": 8, "frequency_penalty": 0.7, "presence_penalty": 0.4,
        "repetition_penalty": 1.3, "logit_bias": ((9, 2.0),), "min_tokens": 6,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def engines() -> tuple[Engine, Engine]:
    return stock_engine(), stock_engine(block_tokens=8, chunk_tokens=5)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_at_every_position(engines: tuple[Engine, Engine], kind: str) -> None:
    fields = {**KINDS[kind], "max_tokens": 10, "logprobs": 2}
    first, second = engines
    whole = run(first, [request("a", prompt(13), **fields)])["a"]
    assert len(whole.tokens) == 10
    cuts = [request(str(cut), prompt(13), tuple(whole.tokens[:cut]), **fields) for cut in range(10)]
    found = run(second, cuts)
    for cut in range(10):
        assert found[str(cut)].tokens == whole.tokens[cut:]
        assert found[str(cut)].finish == whole.finish
        assert len(found[str(cut)].logprobs) == 10 - cut


def test_a_request_whose_last_token_was_lost_on_the_way_just_ends(
    engines: tuple[Engine, Engine],
) -> None:
    engine = engines[0]
    by_length = run(engine, [request("a", prompt(5), (7, 8, 9), max_tokens=3)])["a"]
    assert (by_length.tokens, by_length.finish) == ([], "length")
    by_stop = run(engine, [request("a", prompt(5), (7, 2), max_tokens=9, ignore_eos=False)])["a"]
    assert (by_stop.tokens, by_stop.finish) == ([], "stop")


SCARCE: list[dict[str, Any]] = [
    {"kv_bytes": 40_000, "lanes_share": 0.0},
    {"kv_bytes": 1_340_000, "lanes_share": 0.97, "compiled": False},
    {"kv_bytes": 40_000, "lanes_share": 0.0, "compiled": False},
]
"""13 blocks of 4 tokens each: attention in C, lanes, gathered blocks."""


@pytest.mark.parametrize("config", SCARCE, ids=["compiled", "lanes", "gathered"])
@pytest.mark.parametrize("kind", ["greedy", "filters", "penalties"])
def test_preempted_requests_give_the_same_tokens(kind: str, config: dict[str, Any]) -> None:
    fields = {**KINDS[kind], "max_tokens": 30}
    requests = [request(str(n), prompt(6 + n, n), **fields) for n in range(4)]
    plenty = stock_engine()
    scarce = stock_engine(**config)
    assert scarce.pool.capacity_tokens < 4 * 36
    expected = run(plenty, requests)
    found = run(scarce, requests)
    assert plenty.preemptions == 0
    assert scarce.preemptions > 0
    assert {n: one.tokens for n, one in found.items()} == {
        n: one.tokens for n, one in expected.items()
    }


def test_prompt_logprobs_survive_a_preemption() -> None:
    scarce = stock_engine(**SCARCE[0])
    requests = [request(str(n), prompt(20, n), max_tokens=14, prompt_logprobs=1) for n in range(3)]
    found = run(scarce, requests)
    assert scarce.preemptions > 0
    assert {len(one.prompt_logprobs) for one in found.values()} == {19}
