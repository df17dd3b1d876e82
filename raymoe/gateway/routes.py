"""What the completion and chat routes do, free of FastAPI's decorators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from raymoe.gateway.answer import Answer
from raymoe.gateway.backend import Backend
from raymoe.gateway.choice import Choice, TokenEntry, prompt_entries
from raymoe.gateway.errors import ApiError
from raymoe.gateway.formats import forced_calls, output_grammar
from raymoe.gateway.life import NOT_WATCHED, Watching
from raymoe.gateway.observe import GatewayMetrics
from raymoe.gateway.prompts import Prompt, chat_prompt, completion_prompts, make_choices
from raymoe.gateway.schemas import ChatBody, CompletionBody, SamplingBody
from raymoe.gateway.shapes import Shape, usage
from raymoe.gateway.streaming import EventStream
from raymoe.gateway.tokenizer import GatewayTokenizer


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What every route needs."""

    backend: Backend
    tokenizer: GatewayTokenizer
    metrics: GatewayMetrics
    model_name: str
    request_timeout_s: float | None
    max_choices: int
    watching: Watching = NOT_WATCHED

    def check_model(self, asked: str | None) -> None:
        """Raises ApiError (404) for any model but the one that is served."""
        if asked is not None and asked != self.model_name:
            raise ApiError(
                404,
                f"The model '{asked}' does not exist; this endpoint serves '{self.model_name}'.",
                "model",
                "model_not_found",
            )


async def complete(serving: Serving, request: Request, body: CompletionBody) -> Response:
    """POST /v1/completions."""
    serving.check_model(body.model)
    serving.backend.admit(1)  # before the work of encoding
    per_prompt = max(body.n or 1, body.best_of or 1)
    _check_count(serving, len(body.prompt), per_prompt)
    model = await serving.backend.model_info()
    prompts = await completion_prompts(body, model, serving.tokenizer)
    best = body.best_of is not None and body.best_of > (body.n or 1)
    shape = Shape("completion", serving.model_name, serving.tokenizer)
    logprobs = body.logprobs
    choices = make_choices(
        body,
        prompts,
        shape.id,
        model,
        serving.tokenizer,
        per_prompt=per_prompt,
        logprobs=0 if best and logprobs is None else logprobs,
        prompt_logprobs=logprobs if body.echo else None,
        grammar=await output_grammar(body, serving.tokenizer),
    )
    answer = _answer(serving, request, shape, choices, prompts)
    echo = _Echo(serving.tokenizer, prompts, per_prompt, logprobs) if body.echo else None
    if body.stream:
        return await _stream(request, answer, body, shape, echo)
    deltas = await _collect(request, answer)
    kept = _best(choices, per_prompt, body.n or 1) if best else choices
    outputs = []
    for index, choice in enumerate(kept):
        text, entries = deltas[choice.index]
        if echo is not None:
            text, entries = echo.before(choice, text, entries)
        outputs.append(
            shape.output(index, text, None if logprobs is None else entries, choice.finish)
        )
    return JSONResponse(shape.whole(outputs, _usage(answer)), headers=id_header(request, shape))


async def chat(serving: Serving, request: Request, body: ChatBody, size: int) -> Response:
    """POST /v1/chat/completions; size: bytes of the body."""
    serving.check_model(body.model)
    serving.backend.admit(1)  # before the work of encoding
    _check_count(serving, 1, body.n or 1)
    model = await serving.backend.model_info()
    prompts = [await chat_prompt(body, model, serving.tokenizer, size)]
    shape = Shape("chat", serving.model_name, serving.tokenizer, forced_calls(body))
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    choices = make_choices(
        body,
        prompts,
        shape.id,
        model,
        serving.tokenizer,
        per_prompt=body.n or 1,
        logprobs=logprobs,
        prompt_logprobs=None,
        grammar=await output_grammar(body, serving.tokenizer),
    )
    answer = _answer(serving, request, shape, choices, prompts)
    if body.stream:
        return await _stream(request, answer, body, shape, None)
    deltas = await _collect(request, answer)
    outputs = []
    for choice in choices:
        text, entries = deltas[choice.index]
        outputs.append(
            shape.output(choice.index, text, None if logprobs is None else entries, choice.finish)
        )
    return JSONResponse(shape.whole(outputs, _usage(answer)), headers=id_header(request, shape))


def id_header(request: Request, shape: Shape) -> dict[str, str]:
    """The answer's id as X-Request-Id, unless the request has one: Ray Serve gives every request
    one and adds it to the answer, and two would become one header with two values."""
    return {} if "x-request-id" in request.headers else {"X-Request-Id": shape.id}


def _check_count(serving: Serving, prompts: int, per_prompt: int) -> None:
    """Raises ApiError (400) for more outputs than one request may have."""
    count = prompts * per_prompt
    most = min(serving.max_choices, serving.backend.max_in_flight)
    if count > most:
        raise ApiError(
            400,
            f"{prompts} prompts with {per_prompt} outputs each are {count}; "
            f"at most {most} are allowed in one request",
            "prompt" if prompts > 1 else "n",
            "invalid_value",
        )


def _answer(
    serving: Serving, request: Request, shape: Shape, choices: list[Choice], prompts: list[Prompt]
) -> Answer:
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    return Answer(
        serving.backend,
        serving.metrics,
        choices,
        sum(len(prompt.ids) for prompt in prompts),
        serving.request_timeout_s,
        serving.watching.begin(f"POST {path}", shape.id, request.headers.get),
    )


def _usage(answer: Answer) -> dict[str, Any]:
    cached = sum(choice.cached_prompt_tokens for choice in answer.choices)
    return usage(answer.prompt_tokens, answer.completion_tokens, cached)


async def _collect(request: Request, answer: Answer) -> dict[int, tuple[str, list[TokenEntry]]]:
    """Text and entries of every choice, once all have ended."""
    texts: dict[int, list[str]] = {choice.index: [] for choice in answer.choices}
    entries: dict[int, list[TokenEntry]] = {choice.index: [] for choice in answer.choices}
    try:
        answer.start(request.receive)
        while not answer.ended:
            for choice, delta in await answer.next():
                texts[choice.index].append(delta.text)
                entries[choice.index].extend(delta.entries)
    finally:
        answer.close()
    return {index: ("".join(parts), entries[index]) for index, parts in texts.items()}


async def _stream(
    request: Request, answer: Answer, body: SamplingBody, shape: Shape, echo: _Echo | None
) -> EventStream:
    """The response, made when the first tokens are there."""
    options = body.stream_options
    mode: Literal["none", "last", "each"] = "none"
    if options is not None and options.include_usage:
        mode = "each" if options.continuous_usage_stats else "last"
    writer = shape.stream(mode)
    try:
        answer.start(request.receive)
        first = await answer.next()
    except BaseException:
        answer.close()
        raise

    def opening(choice: Choice) -> bytes:
        if echo is None:
            return writer.first(choice.index)
        text, entries = echo.before(choice, "", [])
        return writer.raw_text(choice.index, text, entries if echo.with_logprobs else None)

    return EventStream(answer, first, writer, opening, id_header(request, shape))


class _Echo:
    """Puts each choice's prompt before its output."""

    def __init__(
        self,
        tokenizer: GatewayTokenizer,
        prompts: list[Prompt],
        per_prompt: int,
        logprobs: int | None,
    ) -> None:
        self.with_logprobs = logprobs is not None
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._per_prompt = per_prompt

    def before(
        self, choice: Choice, text: str, entries: Sequence[TokenEntry]
    ) -> tuple[str, list[TokenEntry]]:
        prompt = self._prompts[choice.index // self._per_prompt]
        echoed = prompt.text
        if echoed is None:
            echoed = self._tokenizer.decode(prompt.ids, skip_special_tokens=False)
        if not self.with_logprobs:
            return echoed + text, []
        own = prompt_entries(prompt.ids, choice.prompt_logprobs, self._tokenizer)
        moved = [entry._replace(offset=entry.offset + len(echoed)) for entry in entries]
        return echoed + text, own + moved


def _best(choices: list[Choice], per_prompt: int, n: int) -> list[Choice]:
    """Of each prompt's choices the n with the highest mean log probability a token."""
    kept = []
    for start in range(0, len(choices), per_prompt):
        ranked = sorted(
            choices[start : start + per_prompt],
            key=lambda choice: -choice.cumulative_logprob / max(1, choice.completion_tokens),
        )
        kept += ranked[:n]
    return kept
