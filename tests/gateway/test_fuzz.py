"""Bodies of any shape: an answer or a clear refusal, never a failure of ours."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymoe.gateway.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from tests.gateway.conftest import in_process, pool_of, routers_of
from tests.gateway.fakes import FakeRouter
from tests.gateway.tiny_tokenizer import tiny_tokenizer

USER = {"role": "user", "content": "hi"}
GOOD: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/completions": (CompletionBody, {"prompt": "hi"}),
    "/v1/chat/completions": (ChatBody, {"messages": [USER]}),
    "/tokenize": (TokenizeBody, {"prompt": "hi"}),
    "/detokenize": (DetokenizeBody, {"tokens": [1]}),
}
SCALAR = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
JSON = st.recursive(
    SCALAR,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "function", "name", "1", "x"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=6,
)


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    path = draw(st.sampled_from(sorted(GOOD)))
    model, good = GOOD[path]
    names = st.sampled_from(sorted(model.model_fields))
    return path, {**good, **draw(st.dictionaries(names, JSON, min_size=1, max_size=3))}


def test_no_body_makes_the_gateway_fail() -> None:
    tokenizer = tiny_tokenizer()
    # ignore_eos and the like do not matter to it: every answer is two tokens.
    router = FakeRouter(lambda request: [70, 71], vocab=355, context_tokens=64)
    with routers_of(router), asyncio.Runner() as runner:
        context = in_process(pool_of([router]), tokenizer, max_choices=8)
        http: httpx.AsyncClient = runner.run(context.__aenter__())

        @settings(
            max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None
        )
        @given(requests())
        def run(request: tuple[str, dict[str, Any]]) -> None:
            path, body = request
            answer = runner.run(http.post(path, json=body))
            assert answer.status_code in (200, 400, 404), (body, answer.text)
            if answer.status_code != 200:
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert error["param"], (body, error)

        run()
        runner.run(context.__aexit__(None, None, None))
