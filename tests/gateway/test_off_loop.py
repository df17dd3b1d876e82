"""Work that grows with a request does not hold up the streams of others."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from raymoe.gateway import GatewayTokenizer, bodies
from tests.gateway.conftest import in_process, pool_of, routers_of
from tests.gateway.fakes import FakeRouter
from tests.gateway.tiny_tokenizer import tiny_tokenizer

MESSAGE = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "find", "description": "a" * 40}}


def threads_of(
    tokenizer: GatewayTokenizer, monkeypatch: pytest.MonkeyPatch
) -> dict[str, set[bool]]:
    """By method: whether its calls came from the event loop's thread."""
    loop_thread = threading.get_ident()
    seen: dict[str, set[bool]] = {}

    def spied(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*args: Any, **named: Any) -> Any:
            seen.setdefault(name, set()).add(threading.get_ident() == loop_thread)
            return call(*args, **named)

        return spy

    for owner, *names in (
        (tokenizer, "encode", "decode", "chat", "token_text"),
        (bodies, "_checked"),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, spied(name, getattr(owner, name)))
    return seen


@pytest.mark.parametrize(
    ("path", "small", "large", "methods"),
    [
        ("/v1/completions", {"prompt": "a"}, {"prompt": ["a" * 1000] * 40}, {"encode"}),
        (
            "/v1/chat/completions",
            {"messages": [MESSAGE]},
            {"messages": [MESSAGE] * 300},
            {"chat"},
        ),
        (
            "/v1/chat/completions",
            {"messages": [MESSAGE]},
            {"messages": [MESSAGE], "tools": [TOOL] * 300},
            {"chat"},
        ),
        (
            "/v1/chat/completions",
            {"messages": [MESSAGE]},
            {"messages": [MESSAGE] * 3000},
            {"chat", "_checked"},
        ),
        ("/tokenize", {"prompt": "a"}, {"prompt": "a" * 20_000}, {"encode"}),
        (
            "/tokenize",
            {"prompt": "a", "return_token_strs": True},
            {"prompt": "a" * 100_000, "return_token_strs": True},
            {"encode", "token_text", "_checked"},
        ),
        ("/detokenize", {"tokens": [65]}, {"tokens": [65] * 20_000}, {"decode"}),
    ],
)
def test_large_requests_are_prepared_in_a_thread(
    path: str,
    small: dict[str, Any],
    large: dict[str, Any],
    methods: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = tiny_tokenizer()
    seen = threads_of(tokenizer, monkeypatch)

    async def main() -> None:
        router = FakeRouter(lambda request: [1] * 4, vocab=512, context_tokens=1 << 20)
        with routers_of(router):
            async with in_process(pool_of([router]), tokenizer) as http:
                for body, on_loop in ((small, True), (large, False)):
                    seen.clear()
                    answer = await http.post(path, json=body)
                    assert answer.status_code == 200, answer.text
                    assert seen.keys() >= methods
                    assert all(seen[method] == {on_loop} for method in methods), seen

    asyncio.run(main())


def test_too_many_prompts_are_refused_before_they_are_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = tiny_tokenizer()
    seen = threads_of(tokenizer, monkeypatch)

    async def main() -> None:
        router = FakeRouter(lambda request: [1])
        with routers_of(router):
            async with in_process(pool_of([router]), tokenizer) as http:
                answer = await http.post("/v1/completions", json={"prompt": ["a"] * 300})
                assert answer.status_code == 400
                assert answer.json()["error"]["param"] == "prompt"

    asyncio.run(main())
    assert seen.keys() == {"_checked"}


def test_encoding_a_long_text_leaves_python_to_other_threads() -> None:
    """A thread alone does not: the library's `encode` keeps Python's lock to its end."""
    tokenizer = tiny_tokenizer()
    text = "The quick brown fox jumps over the lazy dog. " * 30_000
    ended = False

    async def longest_wait() -> float:
        longest, last = 0.0, time.monotonic()
        while not ended:
            await asyncio.sleep(0.001)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        return longest

    async def part_waited() -> float:
        """The longest pause of the event loop, as a part of the time the encoding took."""
        nonlocal ended
        ended = False
        waiting = asyncio.create_task(longest_wait())
        await asyncio.sleep(0.01)
        began = time.monotonic()
        await asyncio.to_thread(tokenizer.encode, text)
        took, ended = time.monotonic() - began, True
        return await waiting / took

    # A machine under load may hold the loop up by itself, but not every time.
    assert any(asyncio.run(part_waited()) < 0.5 for _ in range(10))


@pytest.mark.parametrize("special", [True, False])
def test_long_texts_have_the_tokens_that_the_library_gives_them(special: bool) -> None:
    tokenizer = tiny_tokenizer()
    for text in ("Hello world.\n", "<|user|> a <|end|>", "\u00e4\u2003\U0001f600 "):
        long = text * 8000
        expected = tokenizer._backend.encode(long, add_special_tokens=special).ids
        assert tokenizer.encode(long, special) == tuple(expected)


def test_blanks_do_not_count_for_the_least_tokens() -> None:
    tokenizer = tiny_tokenizer()
    blanks = "".join(chr(code) for code in range(0x110000) if chr(code).isspace())
    text = f"a{blanks}b{blanks}\u200bc\u00e4"  # no width, but no blank
    assert sum(map(len, text.split())) == 5
    longest = tokenizer.least_tokens("a" * 10_000)
    assert tokenizer.least_tokens(text * 2000) == longest
