"""Each option's effect on the answer, computed a second way here."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from raymoe.gateway import GatewayTokenizer
from raymoe.requests import GenerationRequest, SamplingParams
from tests.gateway.conftest import in_process, pool_of, routers_of
from tests.gateway.fakes import FakeRouter, logprobs_of
from tests.gateway.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = "Hello world, 日本 🙂 the end."
IDS = TOKENIZER.encode(TEXT)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


def ask(
    body: dict[str, Any],
    path: str = COMPLETIONS,
    script: Any = None,
    tokenizer: GatewayTokenizer = TOKENIZER,
) -> tuple[dict[str, Any], list[GenerationRequest], list[str]]:
    """The answer, what the router was asked, what was cancelled there."""
    router = FakeRouter(
        script or (lambda request: [*IDS, 0]), eos_ids=(0,), vocab=355, context_tokens=256
    )
    router.step_s = 0.001

    async def main() -> httpx.Response:
        pool = pool_of([router])
        async with in_process(pool, tokenizer) as http:
            answer = await http.post(path, json=body)
            assert pool.in_flight == 0
            if router.running:  # the cancel is on its way
                await asyncio.sleep(0.1)
            return answer

    with routers_of(router):
        answer = asyncio.run(main())
    assert answer.status_code == 200, answer.text
    if body.get("stream"):
        return {"chunks": chunks_of(answer.text)}, router.seen, router.cancelled
    return answer.json(), router.seen, router.cancelled


def chunks_of(text: str) -> list[dict[str, Any]]:
    *events, done, rest = text.split("\n\n")
    assert done == "data: [DONE]"
    assert rest == ""
    return [json.loads(event.removeprefix("data: ")) for event in events]


def test_every_sampling_field_reaches_the_router() -> None:
    body = {
        "prompt": "Hello",
        "max_tokens": 9,
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.125,
        "typical_p": 0.75,
        "presence_penalty": 1,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"5": -100, "6": 1.5},
        "min_tokens": 3,
        "ignore_eos": True,
        "stop_token_ids": [8, 9],
        "seed": 77,
        "logprobs": 2,
        "echo": True,
        "priority": -4,
    }
    _, (request,), _ = ask(body)
    assert request.sampling == SamplingParams(
        seed=77,
        choice=0,
        temperature=0.25,
        top_p=0.5,
        top_k=7,
        min_p=0.125,
        typical_p=0.75,
        presence_penalty=1.0,
        frequency_penalty=-0.5,
        repetition_penalty=1.25,
        logit_bias=((5, -100.0), (6, 1.5)),
        max_tokens=9,
        min_tokens=3,
        ignore_eos=True,
        stop_token_ids=(8, 9),
        logprobs=2,
        prompt_logprobs=2,
    )
    assert request.priority == -4
    assert request.prompt_ids == TOKENIZER.encode("Hello")


def test_defaults_are_openais() -> None:
    _, (request,), _ = ask({"prompt": "Hello"})
    assert request.sampling == SamplingParams(seed=request.sampling.seed, max_tokens=16)
    _, (chat,), _ = ask({"messages": [{"role": "user", "content": "x"}], "top_k": -1}, CHAT)
    left = 256 - len(chat.prompt_ids)
    assert chat.sampling == SamplingParams(seed=chat.sampling.seed, max_tokens=left)
    assert chat.sampling.seed != request.sampling.seed


def test_choices_share_the_seed_and_differ_in_number() -> None:
    answer, seen, _ = ask({"prompt": ["a", "b"], "n": 3, "seed": -5})
    assert [(one.sampling.seed, one.sampling.choice) for one in seen] == [
        (2**63 - 5, choice) for choice in (0, 1, 2, 0, 1, 2)
    ]
    assert len({one.request_id for one in seen}) == 6
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "text", "finish"),
    [
        ({"stop": "world"}, "Hello ", "stop"),
        ({"stop": ["nothing", "日本 🙂 the"]}, "Hello world, ", "stop"),
        ({"stop": "日"}, "Hello world, ", "stop"),
        ({"stop": "the end.!"}, TEXT, "stop"),
        ({"stop": "Hello"}, "", "stop"),
        ({"stop": "world", "include_stop_str_in_output": True}, "Hello world", "stop"),
        ({"stop": "world", "min_tokens": 5}, TEXT, "stop"),
        ({"stop": " the", "min_tokens": 5}, "Hello world, 日本 🙂", "stop"),
        ({"max_tokens": 3}, TOKENIZER.decode(IDS[:3]), "length"),
        ({"max_tokens": 7, "stop": ["xyz"]}, TOKENIZER.decode(IDS[:7]), "length"),
        ({"skip_special_tokens": False, "ignore_eos": True}, TEXT + "<|end|>", "length"),
        ({"skip_special_tokens": False}, TEXT, "stop"),
        ({"ignore_eos": True}, TEXT, "length"),
    ],
)
def test_where_the_text_ends(stream: bool, body: dict[str, Any], text: str, finish: str) -> None:
    for path, prompt in (
        (COMPLETIONS, {"prompt": "x"}),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}),
    ):
        answer, _, _ = ask({**prompt, "max_tokens": 60, "stream": stream, **body}, path)
        if not stream:
            (choice,) = answer["choices"]
            got = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
            assert (got, choice["finish_reason"]) == (text, finish)
            continue
        choices = [chunk["choices"][0] for chunk in answer["chunks"]]
        got = "".join(
            choice["text"] if path == COMPLETIONS else choice["delta"].get("content", "")
            for choice in choices
        )
        assert (got, choices[-1]["finish_reason"]) == (text, finish)
        assert all(choice["finish_reason"] is None for choice in choices[:-1])


def test_a_stop_string_cancels_the_rest_at_the_router() -> None:
    answer, (request,), cancelled = ask(
        {"prompt": "x", "stop": "world", "max_tokens": 200}, script=lambda _: [*IDS, *[70] * 200]
    )
    assert cancelled == [request.request_id]
    until_stop = next(n for n in range(len(IDS)) if "world" in TOKENIZER.decode(IDS[:n]))
    assert answer["usage"]["completion_tokens"] == until_stop


def test_a_token_that_stops_has_no_text() -> None:
    stop_id = TOKENIZER.encode("!")[0]

    def script(request: GenerationRequest) -> list[int]:
        return [*IDS[:2], stop_id]

    router = FakeRouter(script, eos_ids=(stop_id,), vocab=355)

    async def main() -> list[Any]:
        async with in_process(pool_of([router]), TOKENIZER) as http:
            return [
                (await http.post(COMPLETIONS, json={"prompt": "x", **body})).json()["choices"][0]
                for body in ({}, {"include_stop_str_in_output": True})
            ]

    with routers_of(router):
        silent, shown = asyncio.run(main())
    assert silent["text"] == TOKENIZER.decode(IDS[:2])
    assert shown["text"] == TOKENIZER.decode(IDS[:2]) + "!"
    assert silent["finish_reason"] == shown["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_completion(stream: bool) -> None:
    answer, _, _ = ask({"prompt": "x", "max_tokens": 60, "logprobs": 2, "stream": stream})
    parts = (
        [chunk["choices"][0]["logprobs"] for chunk in answer["chunks"]]
        if stream
        else [answer["choices"][0]["logprobs"]]
    )
    merged: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
    merged["text_offset"] = []
    for part in parts:
        for key in merged:
            merged[key] += part[key] if part else []
    ids = [*IDS, 0]
    assert merged["tokens"] == [TOKENIZER.token_text(i) for i in ids]
    assert merged["token_logprobs"] == [logprobs_of(i, 2).token for i in ids]
    for token_id, top in zip(ids, merged["top_logprobs"], strict=True):
        own = {TOKENIZER.token_text(token_id): logprobs_of(token_id, 2).token}
        expected = {TOKENIZER.token_text(i): p for i, p in logprobs_of(token_id, 2).top}
        assert top == {**own, **expected}
    decoded = [len(TOKENIZER.decode(ids[:at]).rstrip("\ufffd")) for at in range(len(ids))]
    assert merged["text_offset"] == decoded


def test_a_chunk_with_text_carries_the_logprobs_of_all_its_tokens() -> None:
    answer, _, _ = ask({"prompt": "x", "max_tokens": 60, "logprobs": 0, "stream": True})
    for chunk in answer["chunks"]:
        choice = chunk["choices"][0]
        tokens = choice["logprobs"]["tokens"]
        if choice["finish_reason"] is None:
            joined = b"".join(
                bytes.fromhex(token.removeprefix("bytes:").replace("\\x", ""))
                if token.startswith("bytes:")
                else token.encode()
                for token in tokens
            )
            assert joined.decode() == choice["text"]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}
    answer, _, _ = ask({**body, "stream": stream}, CHAT)
    parts = (
        [chunk["choices"][0]["logprobs"] for chunk in answer["chunks"]]
        if stream
        else [answer["choices"][0]["logprobs"]]
    )
    content = [entry for part in parts if part for entry in part["content"]]
    assert [entry["token"] for entry in content] == [TOKENIZER.token_text(i) for i in (*IDS, 0)]
    text_bytes = bytes(byte for entry in content for byte in entry["bytes"])
    assert text_bytes.decode() == TEXT + "<|end|>"
    assert all(len(entry["top_logprobs"]) == 1 for entry in content)
    assert content[0]["logprob"] == logprobs_of(IDS[0], 1).token


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Hello", list(TOKENIZER.encode("Hello"))])
def test_echo_puts_the_prompt_first(stream: bool, prompt: Any) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 2, "stream": stream}
    answer, _, _ = ask(body)
    ids = (*TOKENIZER.encode("Hello"), *IDS[:2])
    choices = [chunk["choices"][0] for chunk in answer["chunks"]] if stream else answer["choices"]
    assert "".join(choice["text"] for choice in choices) == TOKENIZER.decode(ids)
    tokens = [token for c in choices if c["logprobs"] for token in c["logprobs"]["tokens"]]
    values = [p for c in choices if c["logprobs"] for p in c["logprobs"]["token_logprobs"]]
    assert tokens == [TOKENIZER.token_text(i) for i in ids]
    assert values == [None, *[logprobs_of(i, 1).token for i in ids[1:]]]
    if not stream:
        assert choices[0]["logprobs"]["text_offset"] == [
            len(TOKENIZER.decode(ids[:at])) for at in range(len(ids))
        ]


def test_echo_alone_scores_a_prompt() -> None:
    body = {"prompt": ["Hello", "world"], "echo": True, "logprobs": 0, "max_tokens": 0}
    answer, seen, _ = ask(body)
    assert [choice["text"] for choice in answer["choices"]] == ["Hello", "world"]
    assert answer["usage"]["completion_tokens"] == 0
    assert [request.sampling.max_tokens for request in seen] == [0, 0]
    for choice, request in zip(answer["choices"], seen, strict=True):
        assert choice["logprobs"]["token_logprobs"][1:] == [
            logprobs_of(i, 0).token for i in request.prompt_ids[1:]
        ]


def test_best_of_keeps_the_likeliest() -> None:
    outputs = [[50, 51], [20, 21], [90, 91], [30, 10]]

    def script(request: GenerationRequest) -> list[int]:
        return outputs[request.sampling.choice]

    body = {"prompt": "x", "best_of": 4, "n": 2, "max_tokens": 2}
    answer, seen, _ = ask(body, script=script)
    assert len(seen) == 4
    assert [choice["text"] for choice in answer["choices"]] == [
        TOKENIZER.decode(outputs[3]),
        TOKENIZER.decode(outputs[1]),
    ]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 8


def test_usage_with_every_chunk_when_asked() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    answer, _, _ = ask({"prompt": "x", "stream": True, "stream_options": options, "max_tokens": 4})
    counts = [chunk["usage"]["completion_tokens"] for chunk in answer["chunks"]]
    assert counts[-2:] == [4, 4]  # the last chunk is the usage's own
    assert counts[:-1] == sorted(set(counts)), "tokens that come together share a chunk"
    assert answer["chunks"][-1]["choices"] == []


def test_a_conversation_can_be_continued() -> None:
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "So it"}]
    _, (request,), _ = ask({"messages": messages, "continue_final_message": True}, CHAT)
    text = TOKENIZER.decode(request.prompt_ids, skip_special_tokens=False)
    assert text == "<|user|>x<|end|><|assistant|>So it"


def test_templates_get_their_arguments() -> None:
    tokenizer = tiny_tokenizer("{{ messages[0].content }}-{{ reasoning_effort }}-{{ mood }}")
    body = {
        "messages": [{"role": "user", "content": "x"}],
        "reasoning_effort": "low",
        "chat_template_kwargs": {"mood": "good"},
    }
    _, (request,), _ = ask(body, CHAT, tokenizer=tokenizer)
    assert tokenizer.decode(request.prompt_ids) == "x-low-good"


def test_tokenize_and_back() -> None:
    async def main() -> None:
        router = FakeRouter(lambda request: [1], vocab=355)
        with routers_of(router):
            async with in_process(pool_of([router]), TOKENIZER) as http:
                body = {"prompt": TEXT, "return_token_strs": True}
                answer = (await http.post("/tokenize", json=body)).json()
                assert tuple(answer["tokens"]) == IDS
                assert answer["count"] == len(IDS)
                assert answer["max_model_len"] == 64
                assert answer["token_strs"][0] == TOKENIZER.token_text(IDS[0])
                back = await http.post("/detokenize", json={"tokens": answer["tokens"]})
                assert back.json() == {"prompt": TEXT}
                chat = {"messages": [{"role": "user", "content": "x"}]}
                answer = (await http.post("/tokenize", json=chat)).json()
                back = await http.post("/detokenize", json={"tokens": answer["tokens"]})
                assert back.json() == {"prompt": "<|user|>x<|end|><|assistant|>"}

    asyncio.run(main())
