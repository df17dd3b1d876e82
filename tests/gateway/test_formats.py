"""Outputs of an asked-for form: what reaches the router, and how calls come back to clients."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import Any, get_type_hints

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params
from pydantic import BaseModel

from raymoe.gateway.calls import CallReader
from raymoe.gateway.schemas import ChatBody, CompletionBody
from raymoe.grammar.build import (
    call_grammar,
    call_opening,
    choice_grammar,
    json_object_grammar,
    json_schema_grammar,
    lark_grammar,
    regex_grammar,
)
from raymoe.requests import GenerationRequest
from tests.gateway.conftest import in_process, pool_of, routers_of, served
from tests.gateway.fakes import FakeRouter
from tests.gateway.test_options import ask
from tests.gateway.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CHAT = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]
NAMED = {"type": "function", "function": {"name": "weather"}}


def says(text: str) -> Any:
    return lambda request: [*TOKENIZER.encode(text), 0]


@pytest.mark.parametrize(
    ("asked", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, json_object_grammar()),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            json_schema_grammar(SCHEMA),
        ),
        ({"guided_json": SCHEMA}, json_schema_grammar(SCHEMA)),
        ({"guided_json": json.dumps(SCHEMA)}, json_schema_grammar(SCHEMA)),
        ({"guided_regex": "a+/\n"}, regex_grammar("a+/\n")),
        ({"guided_choice": ["yes", "no"]}, choice_grammar(["yes", "no"])),
        ({"guided_grammar": 'start: "a"'}, lark_grammar('start: "a"')),
        ({"structured_outputs": {"json": SCHEMA}}, json_schema_grammar(SCHEMA)),
        ({"structured_outputs": {"choice": ["a"]}}, choice_grammar(["a"])),
        ({"structured_outputs": {"json_object": True}}, json_object_grammar()),
        ({"structured_outputs": {}}, None),
        (
            {"tools": TOOLS, "tool_choice": "required"},
            call_grammar({"weather": SCHEMA, "stop": None}),
        ),
        ({"tools": TOOLS, "tool_choice": NAMED}, call_grammar({"weather": SCHEMA})),
        ({"tools": TOOLS, "tool_choice": "auto"}, None),
    ],
)
def test_the_grammar_reaches_the_router(asked: dict[str, Any], grammar: str | None) -> None:
    _, seen, _ = ask({"messages": [USER], "n": 2, **asked}, CHAT)
    assert [request.sampling.grammar for request in seen] == [grammar] * 2
    if "tools" not in asked:
        _, seen, _ = ask({"prompt": "x", **asked})
        assert seen[0].sampling.grammar == grammar


CALL = call_opening("weather") + '{"a": [{}, "}"]}'


@given(st.lists(st.integers(0, len(CALL) + 1), max_size=8), st.integers(0, len(CALL) + 1))
@settings(max_examples=60, deadline=None, database=None)
def test_a_call_is_taken_apart_however_it_comes(cuts: list[int], end: int) -> None:
    text = (CALL + "}")[:end]
    borders = sorted({0, *(min(cut, end) for cut in cuts), end})
    pieces = [text[a:b] for a, b in pairwise(borders)] or [""]
    reader = CallReader(["stop", "weather"])
    given = "".join(reader.push(piece, at == len(pieces) - 1) for at, piece in enumerate(pieces))
    opening = len(call_opening("weather"))
    assert reader.name == ("weather" if end >= opening else None)
    assert given == CALL[opening:end]


@pytest.mark.parametrize(("choice", "finish"), [("required", "tool_calls"), (NAMED, "stop")])
def test_a_forced_call_comes_back_as_one(choice: Any, finish: str) -> None:
    text = CALL + "}"
    body = {"messages": [USER], "tools": TOOLS, "tool_choice": choice, "logprobs": True}
    whole, _, _ = ask({**body, "n": 2}, CHAT, says(text))
    for output in whole["choices"]:
        assert output["finish_reason"] == finish
        assert output["message"]["content"] is None
        (call,) = output["message"]["tool_calls"]
        assert call["function"] == {"name": "weather", "arguments": '{"a": [{}, "}"]}'}
    streamed, _, _ = ask({**body, "n": 2, "stream": True}, CHAT, says(text))
    for index, output in enumerate(whole["choices"]):
        own = [c["choices"][0] for c in streamed["chunks"] if c["choices"][0]["index"] == index]
        calls = [c["delta"]["tool_calls"][0] for c in own if "tool_calls" in c["delta"]]
        assert all(not c["delta"].get("content") for c in own)
        assert calls[0]["id"] and calls[0]["function"]["name"] == "weather"
        assert all("name" not in call["function"] for call in calls[1:])
        arguments = "".join(call["function"]["arguments"] for call in calls)
        assert arguments == '{"a": [{}, "}"]}'
        assert own[-1]["finish_reason"] == finish
        spoken = [e for c in own for e in (c["logprobs"] or {"content": []})["content"]]
        assert spoken == output["logprobs"]["content"]


def test_a_call_cut_short_says_so() -> None:
    body = {"messages": [USER], "tools": TOOLS, "tool_choice": NAMED}
    for tokens, has_call in ((2, False), (len(TOKENIZER.encode(CALL)), True)):
        whole, _, _ = ask({**body, "max_tokens": tokens}, CHAT, says(CALL + "}"))
        (output,) = whole["choices"]
        assert output["finish_reason"] == "length"
        assert ("tool_calls" in output["message"]) == has_call


class Answer(BaseModel):
    a: int


def test_the_packages_own_parsing() -> None:
    """`.parse` with pydantic, forced tools, and the stream helper's events."""

    def script(request: GenerationRequest) -> list[int]:
        grammar = request.sampling.grammar or ""
        text = call_opening("weather") + '{"a": 7}}' if "lark" in grammar else '{"a": 5}'
        return [*TOKENIZER.encode(text), 0]

    router = FakeRouter(script, eos_ids=(0,), vocab=355, context_tokens=400)
    with (
        routers_of(router),
        served([router], TOKENIZER) as running,
        openai.OpenAI(base_url=running.url + "/v1", api_key="none") as client,
    ):
        messages: Any = [USER]
        parsed = client.chat.completions.parse(
            model="tiny", messages=messages, response_format=Answer
        )
        assert parsed.choices[0].message.parsed == Answer(a=5)
        with client.chat.completions.stream(
            model="tiny", messages=messages, response_format=Answer
        ) as stream:
            assert "content.done" in {event.type for event in stream}
            assert stream.get_final_completion().choices[0].message.parsed == Answer(a=5)
        tools: Any = [openai.pydantic_function_tool(Answer, name="weather")]
        called = client.chat.completions.parse(
            model="tiny", messages=messages, tools=tools, tool_choice="required"
        )
        (call,) = called.choices[0].message.tool_calls or []
        assert call.function.parsed_arguments == Answer(a=7)
        with client.chat.completions.stream(
            model="tiny", messages=messages, tools=tools, tool_choice="required"
        ) as stream:
            kinds = [event.type for event in stream]
            assert "tool_calls.function.arguments.done" in kinds
            (again,) = stream.get_final_completion().choices[0].message.tool_calls or []
            assert again.function.parsed_arguments == Answer(a=7)


# Fields of vLLM's requests that OpenAI's do not have (as of version 0.19).
VLLM = (
    *("top_k", "min_p", "repetition_penalty", "length_penalty", "use_beam_search"),
    *("stop_token_ids", "ignore_eos", "include_stop_str_in_output", "min_tokens"),
    *("skip_special_tokens", "truncate_prompt_tokens", "prompt_logprobs", "allowed_token_ids"),
    *("bad_words", "logits_processors", "structured_outputs", "priority", "add_special_tokens"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("guided_whitespace_pattern", "guided_decoding_backend"),
)
VLLM_CHAT = (
    *("add_generation_prompt", "continue_final_message", "documents", "chat_template"),
    "chat_template_kwargs",
)


def test_every_field_of_the_official_clients_is_known() -> None:
    """Supported, without effect, or refused for a reason: none is merely unknown."""
    chat = set(get_type_hints(chat_params.CompletionCreateParamsBase)) | {"stream"}
    plain = set(get_type_hints(completion_create_params.CompletionCreateParamsBase)) | {"stream"}
    assert chat | {*VLLM, *VLLM_CHAT} <= set(ChatBody.model_fields)
    assert plain | {*VLLM} <= set(CompletionBody.model_fields)


def test_a_retry_after_429_succeeds() -> None:
    """The package waits as long as Retry-After says, and its second try is answered."""
    router = FakeRouter(says("later"), eos_ids=(0,), vocab=355, context_tokens=200)

    async def main() -> None:
        pool = pool_of([router], max_in_flight=1)
        async with in_process(pool, TOKENIZER) as http:
            router.pause(True)
            first = asyncio.create_task(http.post("/v1/completions", json={"prompt": "a"}))
            while not router.running:
                await asyncio.sleep(0.005)
            refused = await http.post("/v1/completions", json={"prompt": "b"})
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1

            async def free(request: httpx.Request) -> None:
                router.pause(False)

            http.event_hooks["response"] = [lambda response: free(response.request)]
            async with openai.AsyncOpenAI(
                base_url="http://t/v1", api_key="none", max_retries=3, http_client=http
            ) as client:
                answer = await client.completions.with_raw_response.create(model="tiny", prompt="c")
                assert answer.retries_taken >= 1
                assert answer.headers["x-request-id"] == answer.parse().id
                assert answer.parse().choices[0].text == "later"
            assert (await first).status_code == 200

    with routers_of(router):
        asyncio.run(main())
