"""Requests whose output follows a grammar: every option, continued, preempted, broken off."""

from __future__ import annotations

import json
from typing import Any

import pytest

from raymoe.engine.config import EngineConfig
from raymoe.engine.engine import Engine
from raymoe.errors import RequestError
from raymoe.grammar.build import json_schema_grammar, regex_grammar
from raymoe.grammar.state import GrammarStart, GrammarState
from tests.engine.support import SMALL, prompt, request, run, stock_model
from tests.gateway.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = 2
SCHEMA = json_schema_grammar(
    {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a"],
        "additionalProperties": False,
    }
)
FOUR_DIGITS = regex_grammar("[0-9]{4}")
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "hot": {"temperature": 2.0, "seed": 3},
    "filters": {"temperature": 1.5, "top_p": 0.9, "top_k": 300, "typical_p": 0.9, "seed": 4},
    "penalties": {"temperature": 1.0, "repetition_penalty": 1.4, "logit_bias": ((9, 50.0),)},
}


def engine(**config: Any) -> Engine:
    model = stock_model()
    start: GrammarStart = TOKENIZER.grammar_start(model.config.vocab_size, [END])
    return Engine(model, None, EngineConfig(**{**SMALL, **config}), grammars=start)


@pytest.fixture(scope="module")
def shared() -> Engine:
    return engine()


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_follows_it_and_ends_with_it(shared: Engine, kind: str) -> None:
    fields = {"max_tokens": 150, "ignore_eos": False, **KINDS[kind]}
    beside = run(shared, [request("plain", prompt(9), **{**fields, "max_tokens": 9})])["plain"]
    found = run(
        shared,
        [
            request("json", prompt(5), grammar=SCHEMA, **fields),
            request("plain", prompt(9), **{**fields, "max_tokens": 9}),
            request("digits", prompt(7), grammar=FOUR_DIGITS, min_tokens=20, **fields),
        ],
    )
    value = json.loads(TOKENIZER.decode(found["json"].tokens))
    assert set(value) == {"a"} and value["a"] in range(100)
    assert TOKENIZER.decode(found["digits"].tokens).isdigit()
    assert found["json"].finish == found["digits"].finish == "stop"
    assert found["plain"].tokens == beside.tokens  # its neighbours' grammars are not its own


def test_cut_at_every_position(shared: Engine) -> None:
    fields = {**KINDS["hot"], "max_tokens": 150, "grammar": SCHEMA, "logprobs": 1}
    whole = run(shared, [request("a", prompt(5), **fields)])["a"]
    cuts = range(len(whole.tokens) + 1)
    found = run(
        shared, [request(str(n), prompt(5), tuple(whole.tokens[:n]), **fields) for n in cuts]
    )
    for cut in cuts:
        assert found[str(cut)].tokens == whole.tokens[cut:]
        assert found[str(cut)].finish == "stop"


def test_a_preemption_changes_nothing(shared: Engine) -> None:
    digits = regex_grammar("[0-9]{25,30}")
    requests = [
        request(str(n), prompt(6 + n, n), grammar=digits, max_tokens=30, **KINDS["hot"])
        for n in range(4)
    ]
    scarce = engine(kv_bytes=40_000, lanes_share=0.0)
    expected, found = run(shared, requests), run(scarce, requests)
    assert scarce.preemptions > 0
    assert {n: one.tokens for n, one in found.items()} == {
        n: one.tokens for n, one in expected.items()
    }


def test_refused_where_it_cannot_be_followed(shared: Engine) -> None:
    with pytest.raises(RequestError, match="cannot be followed"):
        shared.add(request("a", (5,), (9,), grammar=regex_grammar("[0-9]{4}")))
    with pytest.raises(RequestError, match="cannot be followed"):
        shared.add(request("a", (5,), grammar="{}"))
    without = Engine(stock_model(), None, EngineConfig(**SMALL))
    with pytest.raises(RequestError, match="no grammars"):
        without.add(request("a", (5,), grammar=SCHEMA))
    assert not shared.has_work and not without.has_work


def test_a_library_that_fails_ends_one_request(shared: Engine, monkeypatch: Any) -> None:
    """In the middle of a step, with a neighbour beside it."""

    class Broken:
        def is_error(self) -> bool:
            return False

        def is_stopped(self) -> bool:
            return False

        def compute_bitmask(self) -> bytes:
            raise MemoryError("no more")

    monkeypatch.setattr(
        shared._intake, "_grammars", lambda grammar, ids: GrammarState(Broken(), 512)
    )
    found = run(
        shared, [request("bad", prompt(5), grammar="x"), request("good", prompt(5), max_tokens=4)]
    )
    assert found["bad"].finish == "error" and "no more" in str(found["bad"].error)
    assert found["good"].finish == "length" and len(found["good"].tokens) == 4
