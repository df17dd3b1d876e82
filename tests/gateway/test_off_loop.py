"""Work that grows with a request does not hold up the streams of others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from raymoe.gateway import GatewayTokenizer
from tests.gateway.conftest import in_process, pool_of, routers_of
from tests.gateway.fakes import FakeRouter
from tests.gateway.tiny_tokenizer import tiny_tokenizer

MESSAGE = {"role": "user", "content": "hi"}


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

    for name in ("encode", "decode", "chat"):
        monkeypatch.setattr(tokenizer, name, spied(name, getattr(tokenizer, name)))
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
        ("/tokenize", {"prompt": "a"}, {"prompt": "a" * 20_000}, {"encode"}),
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
    assert not seen
