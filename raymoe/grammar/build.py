"""What clients ask for, as the text of a grammar of the llguidance library.

A grammar's text is all that a router needs: it travels with the request, so that another router
can go on with it. Each function raises RequestError, its field unset, for what cannot be followed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from raymoe.errors import RequestError

MAX_GRAMMAR_BYTES = 256 << 10
"""Compiling takes time and memory that grow with the text; schemas in use are far below this."""
_WHITESPACE = r"[ \n\t]{0,32}"
"""Between JSON's tokens. Bounded: a model must not fill its answer with blanks."""
_OPTIONS = {"whitespace_pattern": _WHITESPACE, "coerce_one_of": True, "lenient": False}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def json_schema_grammar(schema: Mapping[str, Any]) -> str:
    """JSON that satisfies `schema`; its `oneOf` is taken as `anyOf`."""
    grammar = {"grammars": [{"json_schema": _with_options(schema)}]}
    return checked(json.dumps(grammar, ensure_ascii=False))


def json_object_grammar() -> str:
    """Any JSON object."""
    return json_schema_grammar({"type": "object"})


def regex_grammar(pattern: str) -> str:
    """The whole output matches `pattern` (Rust's syntax: no look-around, no back-references)."""
    return checked(json.dumps({"grammars": [{"lark_grammar": f"start: /{_slashed(pattern)}/"}]}))


def choice_grammar(choices: Sequence[str]) -> str:
    """The output is one of `choices`."""
    return lark_grammar("start: " + " | ".join(json.dumps(one) for one in choices))


def lark_grammar(text: str) -> str:
    """A grammar in llguidance's own variant of Lark's syntax."""
    return checked(json.dumps({"grammars": [{"lark_grammar": text}]}, ensure_ascii=False))


def call_grammar(functions: Mapping[str, Mapping[str, Any] | None]) -> str:
    """One call of one of `functions` (name -> schema of its arguments, None: it has none).

    The output is `call_opening(name)`, the arguments' JSON, and `}`.
    """
    ways = []
    for name, schema in functions.items():
        arguments = _with_options(_NO_ARGUMENTS if schema is None else schema)
        ways.append(f'{json.dumps(call_opening(name))} %json {json.dumps(arguments)} "}}"')
    return lark_grammar("start: " + " | ".join(ways))


def call_opening(name: str) -> str:
    """What a call's JSON begins with, up to its arguments."""
    return f'{{"name": {json.dumps(name)}, "arguments": '


def checked(grammar: str) -> str:
    """The grammar itself. Raises RequestError when it is too long or cannot be followed."""
    if len(grammar) > MAX_GRAMMAR_BYTES:
        raise RequestError(
            f"the schema or grammar has {len(grammar)} characters; at most {MAX_GRAMMAR_BYTES} "
            "are allowed"
        )
    from llguidance import LLMatcher

    wrong, messages = LLMatcher.validate_grammar_with_warnings(grammar)
    if wrong:
        raise RequestError(f"it cannot be followed: {_first_lines(messages)}")
    return grammar


def _with_options(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with our options; a client's own `x-guidance` does not count."""
    return {**schema, "x-guidance": _OPTIONS}


def _slashed(pattern: str) -> str:
    """For between two slashes: those inside escaped, line ends written out."""
    parts, escaped = [], False
    for character in pattern:
        if character == "/" and not escaped:
            parts.append("\\")
        if character == "\n":
            parts.append("n" if escaped else "\\n")
        else:
            parts.append(character)
        escaped = character == "\\" and not escaped
    return "".join(parts)


def _first_lines(messages: Sequence[str]) -> str:
    """The library's sentence without its picture of the place."""
    text = " ".join(messages)
    return " ".join(line.strip() for line in text.splitlines()[:6] if line.strip(" ^|"))[:400]
