"""The Generation service: the same requests as over HTTP, as Protocol Buffers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from pydantic import ValidationError

from raymoe.errors import RaymoeError
from raymoe.gateway.answer import Answer
from raymoe.gateway.bodies import MAX_PARTS, too_many_parts
from raymoe.gateway.errors import ApiError, api_error, validation_error
from raymoe.gateway.prompts import (
    Prompt,
    chat_prompt,
    completion_prompts,
    make_choices,
    off_loop,
)
from raymoe.gateway.routes import Serving
from raymoe.gateway.schemas import ChatBody, CompletionBody, SamplingBody
from raymoe.gateway.shapes import Shape
from raymoe.rpc import raymoe_pb2 as pb
from raymoe.rpc.raymoe_pb2_grpc import GenerationServicer

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class Generation(GenerationServicer):
    """A call that is cancelled, or whose deadline passes, cancels its generation at the router."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def Generate(self, request: Any, context: Any) -> Any:
        """GenerateResponse."""
        texts: list[str] = []
        answer: Answer | None = None
        try:
            async for text, of in self._run("Generate", request, context):
                texts.append(text)
                answer = of
        except (ApiError, RaymoeError, ValidationError) as error:
            await refuse(context, error)
        assert answer is not None  # an answer that has ended gave something
        return pb.GenerateResponse(
            model=self._serving.model_name,
            text="".join(texts),
            finish_reason=answer.choices[0].finish,
            usage=_usage(answer),
        )

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """GenerateChunk each."""
        try:
            async for text, answer in self._run("GenerateStream", request, context):
                if answer.ended:
                    finish = answer.choices[0].finish
                    yield pb.GenerateChunk(text=text, finish_reason=finish, usage=_usage(answer))
                elif text:
                    yield pb.GenerateChunk(text=text)
        except (ApiError, RaymoeError, ValidationError) as error:
            await refuse(context, error)

    async def _run(
        self, method: str, request: Any, context: Any
    ) -> AsyncIterator[tuple[str, Answer]]:
        serving = self._serving
        metadata = {name: str(value) for name, value in context.invocation_metadata() or ()}
        serving.check_model(request.model or None)
        serving.backend.admit(1)  # before the work of encoding
        model = await serving.backend.model_info()
        body, prompt = await self._prompt(request, model)
        shape = Shape("completion", serving.model_name, serving.tokenizer)
        choices = make_choices(
            body,
            [prompt],
            shape.id,
            model,
            serving.tokenizer,
            per_prompt=1,
            logprobs=None,
            prompt_logprobs=None,
            grammar=None,
        )
        answer = Answer(
            serving.backend,
            serving.metrics,
            choices,
            len(prompt.ids),
            _timeout_s(context, serving.request_timeout_s),
            serving.watching.begin(f"raymoe.v1.Generation/{method}", shape.id, metadata.get),
        )
        try:
            answer.start(_never)
            while not answer.ended:
                yield "".join([delta.text for _, delta in await answer.next()]), answer
        finally:
            answer.close()

    async def _prompt(self, request: Any, model: Any) -> tuple[SamplingBody, Prompt]:
        """The request's body, checked by the HTTP route's rules, and its prompt."""
        size = request.ByteSize()
        body = await off_loop(size, _body, request)
        if isinstance(body, ChatBody):
            return body, await chat_prompt(body, model, self._serving.tokenizer, size)
        (only,) = await completion_prompts(body, model, self._serving.tokenizer)
        return body, only


def _body(request: Any) -> ChatBody | CompletionBody:
    """The request as the body of the HTTP route."""
    sampling = MessageToDict(request.sampling, preserving_proto_field_name=True)
    for name in ("seed",):  # JSON has 64-bit integers as strings
        if name in sampling:
            sampling[name] = int(sampling[name])
    kind = request.WhichOneof("prompt")
    if kind == "chat":
        if 3 * len(request.chat.messages) > MAX_PARTS:  # each has two fields
            raise too_many_parts()
        messages = [{"role": m.role, "content": m.content} for m in request.chat.messages]
        return ChatBody.model_validate({**sampling, "messages": messages})
    if kind is None:
        raise ApiError(400, "give text, token_ids or chat", "prompt")
    prompt = request.text if kind == "text" else list(request.token_ids.ids)
    return CompletionBody.model_validate({**sampling, "prompt": prompt})


async def refuse(context: Any, error: Exception) -> None:
    """Ends the call with the status that goes with the error; details say what to do."""
    if isinstance(error, ValidationError):
        error = validation_error(error)
    elif isinstance(error, RaymoeError):
        error = api_error(error)
    assert isinstance(error, ApiError)
    await context.abort(_CODES.get(error.status, grpc.StatusCode.INTERNAL), error.message)


def _timeout_s(context: Any, limit_s: float | None) -> float | None:
    """Until the client's deadline, or the endpoint's own limit when that is sooner."""
    left = [s for s in (context.time_remaining(), limit_s) if s is not None]
    return min(left, default=None)


def _usage(answer: Answer) -> Any:
    return pb.Usage(
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
        cached_prompt_tokens=sum(choice.cached_prompt_tokens for choice in answer.choices),
    )


async def _never() -> Any:
    """No news from the client: a call that is cancelled cancels its handler."""
    await asyncio.Event().wait()
