"""The official `openai` package, sync and async, over real HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from raymoe.gateway import GatewayTokenizer
from raymoe.requests import GenerationRequest
from tests.gateway.conftest import Served, routers_of, served, wait_for
from tests.gateway.fakes import FakeRouter
from tests.gateway.tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
REPLY = "Hello world, 日本 🙂 how are you?"
REPLY_IDS = [*TOKENIZER.encode(REPLY), 0]


def reply(request: GenerationRequest) -> list[int]:
    return REPLY_IDS


@pytest.fixture(scope="module")
def router() -> Iterator[FakeRouter]:
    with routers_of(FakeRouter(reply, eos_ids=(0,), vocab=355, context_tokens=200)) as (router,):
        yield router


@pytest.fixture(scope="module")
def running(router: FakeRouter, tokenizer: GatewayTokenizer) -> Iterator[Served]:
    with served([router], tokenizer) as running:
        yield running


@pytest.fixture(scope="module")
def client(running: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=running.url + "/v1", api_key="none", max_retries=0, timeout=20
    ) as client:
        wait_for(lambda: running.call(_ready(running)))
        yield client


def _ready(running: Served):  # type: ignore[no-untyped-def]
    async def ready() -> bool:
        return running.pool.ready

    return ready


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Hello", max_tokens=100)
    assert answer.choices[0].text == REPLY
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(REPLY_IDS)
    assert answer.usage.prompt_tokens == len(TOKENIZER.encode("Hello"))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + len(REPLY_IDS)


def test_a_completion_ends_at_its_default_length(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="Hello")
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text == TOKENIZER.decode(REPLY_IDS[:16])
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_a_streamed_completion_has_a_chunk_a_token(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="tiny",
        prompt="Hello",
        max_tokens=100,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == REPLY
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [
        "stop"
    ]
    whole = [TOKENIZER.token_text(i) for i in REPLY_IDS if "bytes:" not in TOKENIZER.token_text(i)]
    assert [chunk.choices[0].text for chunk in chunks if chunk.choices[0].text.isascii()] == [
        text for text in whole[:-1] if text
    ] + [""]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(REPLY_IDS)


def test_prompts_in_every_form(client: openai.OpenAI, router: FakeRouter) -> None:
    ids = list(TOKENIZER.encode("Hello world"))
    for prompt, count in (
        ("Hello world", 1),
        (["Hello world", "Hello world"], 2),
        (ids, 1),
        ([ids, ids, ids], 3),
    ):
        router.seen.clear()
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=2)
        assert [choice.index for choice in answer.choices] == list(range(count))
        assert [list(request.prompt_ids) for request in router.seen] == [ids] * count
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == count * len(ids)
        assert answer.usage.completion_tokens == count * 2


def test_a_chat(client: openai.OpenAI, router: FakeRouter) -> None:
    router.seen.clear()
    answer = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": [{"type": "text", "text": "Hel"}]},
        ],
    )
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", REPLY)
    assert answer.choices[0].finish_reason == "stop"
    prompt = TOKENIZER.decode(router.seen[0].prompt_ids, skip_special_tokens=False)
    assert prompt == "<|system|>Be kind.<|end|><|user|>Hel<|end|><|assistant|>"
    assert router.seen[0].sampling.max_tokens == 200 - len(router.seen[0].prompt_ids)


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "Hi"}],
        stream=True,
        n=2,
        stream_options={"include_usage": True},
    )
    *chunks, last = stream
    for index in (0, 1):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == REPLY
        assert own[-1].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)
    assert last.usage is not None
    assert last.usage.completion_tokens == 2 * len(REPLY_IDS)


def test_the_stream_helper_of_the_package(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=[{"role": "user", "content": "Hi"}]
    ) as stream:
        assert stream.get_final_completion().choices[0].message.content == REPLY


def test_tools_reach_the_template(client: openai.OpenAI, router: FakeRouter) -> None:
    router.seen.clear()
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
        for name in ("weather", "time")
    ]
    messages = [
        {"role": "user", "content": "?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "1",
                    "type": "function",
                    "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
    ]
    for choice in ("auto", "none"):
        client.chat.completions.create(
            model="tiny",
            messages=messages,  # type: ignore[arg-type]
            tools=tools,  # type: ignore[arg-type]
            tool_choice=choice,  # type: ignore[arg-type]
            max_tokens=1,
        )
    with_tools, without = (
        TOKENIZER.decode(request.prompt_ids, skip_special_tokens=False) for request in router.seen
    )
    rest = "<|user|>?<|end|><|assistant|>[weather(city=Rome)]<|end|><|tool|>sun<|end|><|assistant|>"
    assert with_tools == "<|system|>tools: weather time <|end|>" + rest
    assert without == rest


def test_errors_are_the_packages_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x", temperature=9)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="tiny", input="x")


def test_async_clients_side_by_side(running: Served, client: openai.OpenAI) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(
            base_url=running.url + "/v1", api_key="none", max_retries=0
        ) as clients:

            async def one(number: int) -> str:
                if number % 2:
                    answer = await clients.completions.create(
                        model="tiny", prompt=f"{number}", max_tokens=100
                    )
                    return answer.choices[0].text
                text = ""
                async for chunk in await clients.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": f"{number}"}], stream=True
                ):
                    text += chunk.choices[0].delta.content or ""
                return text

            assert await asyncio.gather(*map(one, range(24))) == [REPLY] * 24

    asyncio.run(main())


def test_a_client_that_goes_away_cancels_its_requests(
    running: Served, client: openai.OpenAI
) -> None:
    endless = FakeRouter(lambda request: [65] * 10_000, context_tokens=20_000, step_s=0.002)
    with routers_of(endless), served([endless], TOKENIZER) as other:
        with openai.OpenAI(base_url=other.url + "/v1", api_key="none", max_retries=0) as impatient:
            stream = impatient.completions.create(
                model="tiny", prompt="x", max_tokens=9_000, n=3, stream=True
            )
            for _, _ in zip(range(5), stream, strict=False):
                pass
            assert endless.running == 3
            stream.close()
            wait_for(lambda: endless.running == 0)
            assert len(endless.cancelled) == 3
            with pytest.raises(openai.APITimeoutError):
                impatient.completions.create(
                    model="tiny", prompt="x", max_tokens=9_000, timeout=1.0
                )
            wait_for(lambda: endless.running == 0)
            assert len(endless.cancelled) == 4
        assert other.pool.in_flight == 0
