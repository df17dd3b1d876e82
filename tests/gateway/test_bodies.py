"""Bodies that are small in bytes and still much work: refused, or read beside the event loop."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from raymoe.gateway import bodies
from raymoe.gateway.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tests.gateway.conftest import in_process, pool_of, routers_of
from tests.gateway.fakes import FakeRouter
from tests.gateway.tiny_tokenizer import tiny_tokenizer

MANY = bodies.MAX_PARTS
MESSAGE = {"role": "user", "content": "hi"}
TEXT = {"type": "text", "text": "a"}


def post(path: str, body: dict[str, Any]) -> httpx.Response:
    async def main() -> httpx.Response:
        router = FakeRouter(lambda request: [5])
        with routers_of(router):
            async with in_process(pool_of([router]), tiny_tokenizer()) as http:
                return await http.post(path, json=body)

    return asyncio.run(main())


MANY = bodies.MAX_PARTS


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * (MANY // 3)}),
        ("/v1/chat/completions", {"messages": [], **{f"x{at}": 1 for at in range(MANY)}}),
        ("/v1/completions", {"prompt": [[1]] * MANY}),
        ("/v1/completions", {"prompt": "a", "logit_bias": {str(at): 1 for at in range(MANY)}}),
        ("/tokenize", {"messages": [{"role": "user", "content": [TEXT] * (MANY // 3)}]}),
    ],
)
def test_too_many_parts(path: str, body: dict[str, Any]) -> None:
    answer = post(path, body)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"
    assert "65536 objects, arrays and members" in answer.json()["error"]["message"]


def test_brackets_and_colons_in_texts_are_no_parts() -> None:
    quoted = '{"a": ["\\", \'"\', ":\\\\"]}\n' * (MANY // 4)
    for text in (quoted, quoted + "\\", '"' + quoted):
        data = bytearray(json.dumps({"prompt": text, "n": 1}).encode())
        assert bodies._signs(data) > MANY
        assert not bodies._has_too_many_parts(data)
        assert bodies._checked_parts(data, CompletionBody).prompt == (text,)


@given(
    st.recursive(
        st.none() | st.integers(-9, 9) | st.text('"\\\\{[:,a\n', max_size=6),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text('"\\\\{[:a', max_size=4), inner, max_size=4)
        ),
        max_leaves=30,
    ),
    st.integers(1, 9),
)
def test_parts_are_counted_rightly(value: Any, stride: int) -> None:
    def parts(of: Any) -> int:
        if isinstance(of, dict):
            return 1 + len(of) + sum(map(parts, of.values()))
        return 1 + sum(map(parts, of)) if isinstance(of, list) else 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "_STRIDE", stride)
        for limit in (parts(value), parts(value) - 1):
            patch.setattr(bodies, "MAX_PARTS", limit)
            found = bodies._has_too_many_parts(bytearray(json.dumps(value).encode()))
            assert found == (limit < parts(value))


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", "messages"),
        ("/v1/chat/completions", "tools"),
        ("/tokenize", "messages"),
        ("/detokenize", "tokens"),
    ],
)
def test_lists_end_at_their_first_mistake(path: str, field: str) -> None:
    kind = {"/v1/chat/completions": ChatBody, "/tokenize": TokenizeBody}.get(path, DetokenizeBody)
    body: dict[str, Any] = {"messages": [MESSAGE]} if field == "tools" else {}
    body[field] = [None] * 1000
    with pytest.raises(ValidationError) as found:
        kind.model_validate_json(json.dumps(body))
    assert found.value.error_count() == 1
    answer = post(path, body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == f"{field}[0]"
