"""Everything a client can get wrong: the status, the field's name, OpenAI's error body."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from raymoe.gateway import GatewayTokenizer
from tests.gateway.conftest import in_process, pool_of, routers_of
from tests.gateway.fakes import FakeRouter
from tests.gateway.tiny_tokenizer import tiny_tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}
FUNCTION = {"type": "function", "function": {"name": "f"}}
BAD_FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "x"}}}


def _called(arguments: str) -> dict[str, Any]:
    """An assistant's message that calls a tool."""
    call = {"function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


# (field named, changes to a good body); status 400
COMPLETION: list[tuple[str, dict[str, Any]]] = [
    ("prompt", {"prompt": None}),
    ("prompt", {"prompt": 7}),
    ("prompt", {"prompt": {}}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [[]]}),
    ("prompt", {"prompt": ["a", 1]}),
    ("prompt", {"prompt": [1, "a"]}),
    ("prompt", {"prompt": [True]}),
    ("prompt", {"prompt": [1.5]}),
    ("prompt", {"prompt": [[1], "a"]}),
    ("prompt", {"prompt": ""}),
    ("prompt[1]", {"prompt": ["a", ""]}),
    ("prompt", {"prompt": [-1]}),
    ("prompt", {"prompt": [355]}),
    ("prompt[2]", {"prompt": [[1], [2], [9999]]}),
    ("prompt", {"prompt": [1] * 64}),
    ("prompt", {"prompt": ["a"] * 300}),
    ("max_tokens", {"max_tokens": -1}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": "5"}),
    ("max_tokens", {"max_tokens": 5.5}),
    ("max_tokens", {"max_tokens": True}),
    ("max_tokens", {"max_tokens": 64}),
    ("max_tokens", {"max_tokens": 10**30}),
    ("max_completion_tokens", {"max_completion_tokens": 0}),
    ("max_completion_tokens", {"max_completion_tokens": 1000}),
    ("max_completion_tokens", {"max_completion_tokens": 3, "max_tokens": 4}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": 2.1}),
    ("temperature", {"temperature": "hot"}),
    ("temperature", {"temperature": [1]}),
    ("temperature", {"temperature": True}),
    ("top_p", {"top_p": 0}),
    ("top_p", {"top_p": 1.01}),
    ("top_k", {"top_k": -2}),
    ("top_k", {"top_k": 0.5}),
    ("min_p", {"min_p": 1.5}),
    ("typical_p", {"typical_p": 0}),
    ("presence_penalty", {"presence_penalty": 2.5}),
    ("frequency_penalty", {"frequency_penalty": -3}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("logit_bias", {"logit_bias": [1]}),
    ("logit_bias", {"logit_bias": {"x": 1}}),
    ("logit_bias", {"logit_bias": {"-1": 1}}),
    ("logit_bias", {"logit_bias": {"1": 101}}),
    ("logit_bias", {"logit_bias": {"1": "a"}}),
    ("logit_bias", {"logit_bias": {"9999": 1}}),
    ("stop", {"stop": 3}),
    ("stop", {"stop": ""}),
    ("stop", {"stop": ["a", 1]}),
    ("stop", {"stop": ["a"] * 17}),
    ("stop", {"stop": "a" * 300}),
    ("stop_token_ids", {"stop_token_ids": 5}),
    ("stop_token_ids[0]", {"stop_token_ids": [-5]}),
    ("stop_token_ids", {"stop_token_ids": [5000]}),
    ("min_tokens", {"min_tokens": -1}),
    ("min_tokens", {"min_tokens": 9, "max_tokens": 5}),
    ("ignore_eos", {"ignore_eos": "yes"}),
    ("n", {"n": 0}),
    ("n", {"n": 129}),
    ("n", {"n": "2"}),
    ("best_of", {"best_of": 1, "n": 2}),
    ("best_of", {"best_of": 3, "stream": True}),
    ("logprobs", {"logprobs": -1}),
    ("logprobs", {"logprobs": 21}),
    ("logprobs", {"logprobs": True}),
    ("echo", {"echo": 1}),
    ("suffix", {"suffix": "end"}),
    ("seed", {"seed": 1.5}),
    ("seed", {"seed": 2**63}),
    ("priority", {"priority": 2**40}),
    ("stream", {"stream": "true"}),
    ("stream_options", {"stream_options": {}}),
    ("stream_options", {"stream_options": {"include_usage": True}, "stream": False}),
    ("stream_options.include_usage", {"stream_options": {"include_usage": 1}, "stream": True}),
    ("stream_options.usage", {"stream_options": {"usage": True}, "stream": True}),
    ("response_format.type", {"response_format": {"type": "structural_tag"}}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    (
        "response_format.json_schema.schema",
        {"response_format": {"type": "json_schema", "json_schema": {}}},
    ),
    (
        "response_format.json_schema.schema",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}},
    ),
    (
        "response_format.json_schema.schema",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
    ),
    ("response_format", {"response_format": "text"}),
    ("guided_json", {"guided_json": "{"}),
    ("guided_json", {"guided_json": "[" * 9_000}),
    ("guided_json", {"guided_json": '{"a":' * 9_000}),
    ("guided_json", {"guided_json": '{"enum": ["\\ud800"]}'}),
    ("guided_json", {"guided_json": '{"minimum": NaN}'}),
    ("guided_json", {"guided_json": [1]}),
    ("guided_json", {"guided_json": {"$ref": "#/no"}}),
    ("guided_regex", {"guided_regex": "(?=a)"}),
    ("guided_regex", {"guided_regex": "["}),
    ("guided_choice", {"guided_choice": []}),
    ("guided_choice[1]", {"guided_choice": ["a", ""]}),
    ("guided_grammar", {"guided_grammar": "?"}),
    ("guided_regex", {"guided_regex": "a", "guided_json": {}}),
    ("response_format", {"guided_regex": "a", "response_format": {"type": "json_object"}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": "("}}),
    ("structured_outputs.structural_tag", {"structured_outputs": {"structural_tag": "x"}}),
    ("guided_whitespace_pattern", {"guided_whitespace_pattern": " "}),
    ("allowed_token_ids", {"allowed_token_ids": [1]}),
    ("truncate_prompt_tokens", {"truncate_prompt_tokens": 4}),
    ("temprature", {"temprature": 1}),
    ("messages", {"messages": [USER]}),
    ("tools", {"tools": []}),
    ("model", {"model": 5}),
]
CHATS: list[tuple[str, dict[str, Any]]] = [
    ("messages", {"messages": None}),
    ("messages", {"messages": []}),
    ("messages", {"messages": "hi"}),
    ("messages[0]", {"messages": ["hi"]}),
    ("messages[0].role", {"messages": [{"content": "x"}]}),
    ("messages[0].role", {"messages": [{"role": "wizard", "content": "x"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": ["x"]}]}),
    (
        "messages[1].content",
        {"messages": [USER, {"role": "user", "content": [{"type": "image_url"}]}]},
    ),
    (
        "messages[0].content",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
    ),
    ("messages[0].mood", {"messages": [{"role": "user", "content": "x", "mood": "good"}]}),
    (
        "messages[0].tool_calls[0].function",
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "function"}]}]},
    ),
    (
        "messages[].tool_calls",
        {"messages": [_called("{")]},
    ),
    ("messages[].tool_calls", {"messages": [_called("[" * 9_000)]}),
    ("messages[].tool_calls", {"messages": [_called('{"a": "\\ud800"}')]}),
    ("messages[].tool_calls", {"messages": [_called('{"a": NaN}')]}),
    ("messages", {"messages": [{"role": "tool", "content": "no id"}]}),
    ("messages", {"messages": [{"role": "user", "content": "word " * 100}]}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": 64}),
    ("max_completion_tokens", {"max_completion_tokens": 64}),
    ("logprobs", {"logprobs": 1}),
    ("top_logprobs", {"top_logprobs": 3}),
    ("top_logprobs", {"top_logprobs": 21, "logprobs": True}),
    ("top_logprobs", {"top_logprobs": 3, "logprobs": False}),
    ("tools[0].function", {"tools": [{"type": "function"}]}),
    ("tools[0].function.name", {"tools": [{"type": "function", "function": {"name": ""}}]}),
    ("tools[0].type", {"tools": [{"type": "retrieval", "function": {"name": "f"}}]}),
    ("tool_choice", {"tools": [FUNCTION], "tool_choice": "always"}),
    ("tool_choice", {"tool_choice": "required"}),
    (
        "tool_choice",
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "g"}}},
    ),
    (
        "tool_choice",
        {"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}},
    ),
    ("tools", {"tools": [FUNCTION, FUNCTION], "tool_choice": "required"}),
    ("tool_choice", {"tools": [FUNCTION], "tool_choice": "required", "guided_regex": "a"}),
    ("tool_choice", {"tools": [BAD_FUNCTION], "tool_choice": "required"}),
    ("verbosity", {"verbosity": "low"}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("function_call", {"function_call": "auto"}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("audio", {"audio": {"voice": "x"}}),
    ("prediction", {"prediction": {"type": "content", "content": "x"}}),
    ("web_search_options", {"web_search_options": {}}),
    ("reasoning_effort", {"reasoning_effort": "extreme"}),
    ("chat_template", {"chat_template": "{{ messages }}"}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"tokenize": True}}),
    ("chat_template_kwargs", {"chat_template_kwargs": {"add_generation_prompt": False}}),
    ("continue_final_message", {"continue_final_message": True, "add_generation_prompt": True}),
    ("best_of", {"best_of": 2}),
    ("prompt", {"prompt": "x"}),
    ("echo", {"echo": True}),
]
OTHERS: list[tuple[str, str, str | None, dict[str, Any]]] = [
    ("/tokenize", "prompt", None, {}),
    ("/tokenize", "prompt", None, {"prompt": "a", "messages": [USER]}),
    ("/tokenize", "prompt", None, {"prompt": 5}),
    ("/tokenize", "text", None, {"text": "a"}),
    ("/detokenize", "tokens", None, {}),
    ("/detokenize", "tokens[1]", None, {"tokens": [1, 355]}),
    ("/detokenize", "tokens[0]", None, {"tokens": [-1]}),
    ("/v1/embeddings", "model", None, {"input": "a"}),
]


async def _ask(calls: list[tuple[str, bytes]], tokenizer: GatewayTokenizer) -> list[httpx.Response]:
    router = FakeRouter(lambda request: [1] * 8, vocab=355, context_tokens=64)
    with routers_of(router):
        pool = pool_of([router])
        async with in_process(pool, tokenizer, max_body_bytes=100_000) as http:
            await pool.model_info()
            answers = [await http.post(path, content=content) for path, content in calls]
            assert pool.in_flight == 0
        assert router.seen == []
    return answers


def _check(answer: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert isinstance(error["message"], str)
    assert error["message"]
    return error


def test_every_bad_value_is_named() -> None:
    tokenizer = tiny_tokenizer()
    good = {"model": "tiny", "prompt": "hi"}
    cases = [(COMPLETIONS, field, {**good, **changes}) for field, changes in COMPLETION]
    chat = {"model": "tiny", "messages": [USER]}
    cases += [(CHAT, field, {**chat, **changes}) for field, changes in CHATS]
    cases += [(path, field or "", body) for path, field, _, body in OTHERS]
    assert len(cases) > 100
    answers = asyncio.run(
        _ask([(path, json.dumps(body).encode()) for path, _, body in cases], tokenizer)
    )
    for (_, field, body), answer in zip(cases, answers, strict=True):
        error = _check(answer, 400, field)
        assert error["type"] == "invalid_request_error", body


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"prompt"', 400),
        (b"\xff\xfe", 400),
        (b'{"prompt": "\\ud800"}', 400),
        (b'{"prompt": NaN}', 400),
        (b'{"temperature": NaN, "prompt": "x"}', 400),
        (b"[" * 10_000, 400),
        (b'{"a":' * 10_000, 400),
        (b" " * 100_001, 413),
        (json.dumps({"prompt": "a" * 100_000}).encode(), 413),
    ],
)
def test_bodies_that_are_no_request(content: bytes, status: int) -> None:
    for path in (COMPLETIONS, CHAT):
        (answer,) = asyncio.run(_ask([(path, content)], tiny_tokenizer()))
        param = answer.json()["error"]["param"]
        _check(answer, status, param)
        assert param in (None, "prompt", "messages", "temperature")


def test_a_chunked_body_over_the_limit_is_refused() -> None:
    async def main() -> None:
        router = FakeRouter(lambda request: [1])
        with routers_of(router):
            async with in_process(pool_of([router]), tiny_tokenizer(), max_body_bytes=1000) as http:

                async def parts() -> Any:
                    for _ in range(100):
                        yield b" " * 100

                _check(await http.post(COMPLETIONS, content=parts()), 413, None)

    asyncio.run(main())


def test_wrong_ways_and_wrong_methods() -> None:
    async def main() -> None:
        router = FakeRouter(lambda request: [1])
        with routers_of(router):
            async with in_process(pool_of([router]), tiny_tokenizer()) as http:
                for path in ("/", "/v1", "/v1/completion", "/v2/completions", "/placement"):
                    _check(await http.get(path), 404, None)
                for method, path in (
                    ("GET", COMPLETIONS),
                    ("PUT", CHAT),
                    ("DELETE", "/v1/models"),
                    ("POST", "/health"),
                    ("GET", "/v1/embeddings"),
                ):
                    answer = await http.request(method, path)
                    _check(answer, 405, None)
                    assert answer.headers["allow"]
                for body in ({"model": "x", "prompt": "a"}, {"model": "x", "messages": [USER]}):
                    path = COMPLETIONS if "prompt" in body else CHAT
                    assert _check(await http.post(path, json=body), 404, "model")["code"] == (
                        "model_not_found"
                    )
                _check(await http.get("/v1/models/a/b"), 404, "model")

    asyncio.run(main())


def test_both_numbers_are_in_the_sentence() -> None:
    def said(body: dict[str, Any], path: str = COMPLETIONS, **router: Any) -> str:
        async def main() -> str:
            fake = FakeRouter(lambda request: [1], **router)
            with routers_of(fake):
                async with in_process(pool_of([fake]), tiny_tokenizer()) as http:
                    error = (await http.post(path, json=body)).json()["error"]
                    assert error["code"] == "context_length_exceeded"
                    return str(error["message"])

        return asyncio.run(main())

    text = said({"prompt": [1] * 70}, context_tokens=64)
    assert "70 tokens" in text
    assert "64" in text
    text = said({"prompt": [1] * 10, "max_tokens": 60}, context_tokens=64)
    assert all(number in text for number in ("10 ", "60 ", "70", "64"))
    text = said({"prompt": [1] * 70}, context_tokens=1000, kv_capacity_tokens=32)
    assert "KV cache holds 32" in text
    for body, path in (
        ({"prompt": "word " * 10_000}, COMPLETIONS),
        ({"messages": [{"role": "user", "content": "word " * 10_000}]}, CHAT),
    ):  # known without encoding
        text = said(body, path, context_tokens=64)
        assert "tokens or more" in text and "64" in text


def test_a_model_without_a_chat_template_says_so() -> None:
    async def main() -> None:
        router = FakeRouter(lambda request: [1])
        with routers_of(router):
            async with in_process(pool_of([router]), tiny_tokenizer(chat_template=None)) as http:
                error = _check(await http.post(CHAT, json={"messages": [USER]}), 400, "messages")
                assert "no chat template" in error["message"]

    asyncio.run(main())


def test_fields_without_effect_are_taken() -> None:
    async def main() -> None:
        router = FakeRouter(lambda request: [1] * 3)
        with routers_of(router):
            async with in_process(pool_of([router]), tiny_tokenizer()) as http:
                ignored = {
                    "user": "me",
                    "metadata": {"a": "b"},
                    "store": True,
                    "service_tier": "auto",
                    "safety_identifier": "x",
                    "prompt_cache_key": "x",
                    "prompt_cache_retention": "24h",
                }
                nulls = {"suffix": None, "logprobs": None, "stop": None, "logit_bias": None}
                nulls |= {"best_of": None, "stream_options": None, "max_tokens": None}
                answer = await http.post(COMPLETIONS, json={"prompt": "a", **ignored, **nulls})
                assert answer.status_code == 200, answer.text
                nulls = {"audio": None, "functions": None, "function_call": None, "tools": None}
                nulls |= {"tool_choice": None, "modalities": ["text"], "prediction": None}
                nulls |= {"response_format": {"type": "text"}, "parallel_tool_calls": True}
                answer = await http.post(CHAT, json={"messages": [USER], **ignored, **nulls})
                assert answer.status_code == 200, answer.text

    asyncio.run(main())
