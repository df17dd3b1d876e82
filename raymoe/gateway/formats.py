"""Which form an output is to have: what a checked body asks for, as a grammar."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from raymoe.errors import RequestError
from raymoe.gateway.calls import ForcedCalls
from raymoe.gateway.fields import NamedChoice
from raymoe.gateway.schemas import ChatBody, SamplingBody
from raymoe.gateway.tokenizer import GatewayTokenizer
from raymoe.grammar.build import (
    call_grammar,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)

Make = Callable[[], str]


async def output_grammar(body: SamplingBody, tokenizer: GatewayTokenizer) -> str | None:
    """The grammar, None for free text. Raises RequestError naming the field."""
    asked = {field: make for field, make in _asked(body).items() if make is not None}
    if not asked:
        return None
    if len(asked) > 1:
        first, second, *_ = asked
        raise RequestError(f"'{first}' and '{second}' exclude each other", second)
    field, make = next(iter(asked.items()))
    if not tokenizer.follows_grammars:
        raise RequestError("this model's tokenizer cannot follow a grammar", field)
    try:
        return await asyncio.to_thread(make)  # a large schema takes a while
    except RequestError as error:
        raise RequestError(f"invalid value for '{field}': {error.message}", field) from None


def forced_calls(body: ChatBody) -> ForcedCalls | None:
    """How the text becomes a tool call, when `tool_choice` forces one."""
    names = list(_forced(body))
    if not names:
        return None
    # As OpenAI has it: a call that the client named ends like any text.
    return ForcedCalls(names, "tool_calls" if body.tool_choice == "required" else "stop")


def _asked(body: SamplingBody) -> dict[str, Make | None]:
    """Field -> how to make its grammar; None: it asks for nothing."""
    asked: dict[str, Make | None] = {
        "guided_json": _json(body.guided_json),
        "guided_regex": _of(regex_grammar, body.guided_regex),
        "guided_choice": _of(choice_grammar, body.guided_choice),
        "guided_grammar": _of(lark_grammar, body.guided_grammar),
    }
    form = body.response_format
    if form is not None and form.type == "json_object":
        asked["response_format"] = json_object_grammar
    elif form is not None and form.type == "json_schema":
        if form.json_schema is None:
            raise RequestError(
                "Missing field 'response_format.json_schema'.", "response_format.json_schema"
            )
        asked["response_format.json_schema.schema"] = _json(form.json_schema.schema_)
    more = body.structured_outputs
    if more is not None:
        asked["structured_outputs.json"] = _json(more.json_)
        asked["structured_outputs.regex"] = _of(regex_grammar, more.regex)
        asked["structured_outputs.choice"] = _of(choice_grammar, more.choice)
        asked["structured_outputs.grammar"] = _of(lark_grammar, more.grammar)
        asked["structured_outputs.json_object"] = json_object_grammar if more.json_object else None
    if isinstance(body, ChatBody):
        functions = _forced(body)
        asked["tool_choice"] = _of(call_grammar, functions or None)
    return asked


def _of(make: Callable[[Any], str], value: Any) -> Make | None:
    return None if value is None else lambda: make(value)


def _json(schema: dict[str, Any] | str | None) -> Make | None:
    return _of(json_schema_grammar, schema)


def _forced(body: ChatBody) -> dict[str, dict[str, Any] | None]:
    """The functions one of which must be called, with the schemas of their arguments."""
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return {}
    if not body.tools:
        raise RequestError("'tool_choice' forces a call, but there are no 'tools'", "tool_choice")
    functions = {tool.function.name: tool.function.parameters for tool in body.tools}
    if len(functions) < len(body.tools):
        raise RequestError("two tools have the same name", "tools")
    if not isinstance(choice, NamedChoice):
        return functions
    if choice.name not in functions:
        raise RequestError(f"there is no tool named {choice.name!r}", "tool_choice")
    return {choice.name: functions[choice.name]}
