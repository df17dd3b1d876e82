"""Grammars: what may come next, against a plain check of the finished text."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
import torch

from raymoe.errors import RequestError
from raymoe.grammar.build import (
    call_grammar,
    call_opening,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from raymoe.grammar.state import GrammarStart, GrammarState, LateGrammars
from tests.gateway.tiny_tokenizer import tiny_tokenizer

VOCAB = 640  # wider than the tokenizer, as padded logits are
TOKENIZER = tiny_tokenizer()
END = TOKENIZER.encode("<|end|>")[0]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def start() -> GrammarStart:
    return TOKENIZER.grammar_start(VOCAB, [END])


def wander(state: GrammarState, seed: int, at_most: int = 400) -> list[int]:
    """Random allowed tokens until the grammar or the end of text ends it."""
    draw = random.Random(seed)
    tokens: list[int] = []
    while not state.ended and len(tokens) < at_most:
        allowed = torch.nonzero(state.allowed())[:, 0].tolist()
        assert allowed
        token = END if END in allowed else draw.choice(allowed)
        state.take((token,))
        assert state.error is None
        tokens.append(token)
    return tokens


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens)


def is_person(text: str) -> bool:
    value = json.loads(text)
    return (
        {"name", "age"} <= set(value) <= {"name", "age", "tags"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 9
        and value["age"] in range(121)
        and all(tag in ("a", "b") for tag in value.get("tags", []))
    )


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_drawn_the_text_follows_the_grammar(start: GrammarStart, seed: int) -> None:
    def drawn(grammar: str) -> str:
        return text_of(wander(start(grammar, ()), seed))

    assert is_person(drawn(json_schema_grammar(PERSON)))
    assert re.fullmatch(r"\d{3}/[ab]+x", drawn(regex_grammar(r"\d{3}/[ab]{1,4}x")))
    assert drawn(choice_grammar(['say "hi"', "a/b\\c", "zwölf\n"])) in (
        'say "hi"', "a/b\\c", "zwölf\n",
    )  # fmt: skip
    assert drawn(lark_grammar('start: "x" y\ny: "1" | "2"')) in ("x1", "x2")
    call = json.loads(drawn(call_grammar({"f": PERSON, 'g"': None})))
    assert call == {"name": 'g"', "arguments": {}} or is_person(json.dumps(call["arguments"]))


def test_an_output_made_elsewhere_goes_on_the_same(start: GrammarStart) -> None:
    grammar = json_schema_grammar(PERSON)
    tokens = wander(start(grammar, ()), 3)
    whole = start(grammar, ())
    for cut in range(len(tokens)):
        assert torch.equal(start(grammar, tokens[:cut]).allowed(), whole.allowed())
        whole.take(tokens[cut : cut + 1])
    assert start(grammar, tokens).ended


def test_what_it_does_not_allow_is_an_error(start: GrammarStart) -> None:
    state = start(regex_grammar("[0-9]{2}"), ())
    allowed = state.allowed()
    assert allowed.shape == (VOCAB,) and not allowed[END] and not allowed[TOKENIZER.encode("a")[0]]
    assert not allowed[512:].any()  # no token
    state.take(TOKENIZER.encode("a"))
    assert state.error is not None and state.ended
    with pytest.raises(RequestError, match="cannot be followed"):  # it has no end, so no beginning
        start(json_schema_grammar({"$ref": "#"}), ())
    with pytest.raises(RequestError, match="cannot be followed"):
        start(regex_grammar("[0-9]{2}"), TOKENIZER.encode("x"))


def test_whitespace_is_bounded(start: GrammarStart) -> None:
    def fits(text: str) -> bool:
        state = start(json_object_grammar(), ())
        state.take(TOKENIZER.encode(text))
        return state.error is None

    assert fits('{"a": 1,\n  "b": [1, 2]}') and fits('{"a":1}')
    assert fits("{" + " " * 32 + '"a":1}') and not fits("{" + " " * 33 + '"a":1}')
    assert not fits("[1]")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "wizard"}, "wizard"),
        ({"not": {}}, "not"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "#/nowhere"}, "nowhere"),
        ({"$ref": "http://example.com/schema.json"}, "example.com"),
        ({"type": "string", "pattern": "(?=x)"}, "look-around"),
        ({"enum": ["x" * 300_000]}, "at most"),
    ],
)
def test_schemas_that_cannot_be_followed_are_refused(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        json_schema_grammar(schema)
    with pytest.raises(RequestError, match=said):
        json_schema_grammar({**schema, "x-guidance": {"lenient": True}})


def test_other_bad_grammars_are_refused() -> None:
    for make, wrong in ((regex_grammar, "(a"), (regex_grammar, r"(a)\1"), (lark_grammar, "x")):
        with pytest.raises(RequestError, match="cannot be followed"):
            make(wrong)


def test_a_call_begins_as_said(start: GrammarStart) -> None:
    state = start(call_grammar({"weather": {"type": "object"}}), ())
    state.take(TOKENIZER.encode(call_opening("weather") + '{"city": "Bonn"}}'))
    assert state.error is None and state.ended


def test_a_tokenizer_that_cannot_be_used_is_said_to_everyone_who_asks() -> None:
    def broken() -> GrammarStart:
        raise ValueError("no such file")

    late = LateGrammars(broken)
    for _ in range(2):
        with pytest.raises(RequestError, match="no such file"):
            late(json_object_grammar(), ())
    assert (
        LateGrammars(lambda: TOKENIZER.grammar_start(VOCAB, [END]))(json_object_grammar(), ())
        .allowed()
        .any()
    )
