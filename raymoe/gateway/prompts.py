"""From a checked body to choices: prompts encoded, limits applied, one choice an output."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from raymoe.errors import RequestError
from raymoe.gateway.choice import Choice, TextOptions
from raymoe.gateway.sampling import (
    COMPLETION_MAX_TOKENS,
    check_body,
    check_length,
    check_prompt,
    draw_seed,
    output_limit,
    sampling_params,
)
from raymoe.gateway.schemas import ChatBody, CompletionBody, SamplingBody, TokenizeBody
from raymoe.gateway.tokenizer import LONG, GatewayTokenizer
from raymoe.requests import GenerationRequest
from raymoe.stream.messages import ModelInfo

_MESSAGE = 128  # what the template does with a message, in characters


P = ParamSpec("P")
T = TypeVar("T")

# Parameters of the library's call, which are not the template's.
_NOT_FOR_CLIENTS = frozenset(
    [
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of a request, checked, with what may be generated after it."""

    text: str | None  # None: it came as token ids
    ids: tuple[int, ...]
    max_tokens: int


async def completion_prompts(
    body: CompletionBody, model: ModelInfo, tokenizer: GatewayTokenizer
) -> list[Prompt]:
    """Raises RequestError or ApiError naming the field."""
    check_body(body, model)
    size = sum(len(one) for one in body.prompt if isinstance(one, str))
    prompts = []
    for at, prompt in enumerate(body.prompt):
        field = f"prompt[{at}]" if len(body.prompt) > 1 else "prompt"
        text = prompt if isinstance(prompt, str) else None
        if text is None:
            ids = prompt
        else:
            special = body.add_special_tokens is not False
            ids = await _encode(tokenizer, text, special, field, model, size)
        check_prompt(ids, field, model)
        limit = output_limit(body, len(ids), model, COMPLETION_MAX_TOKENS)
        prompts.append(Prompt(text=text, ids=ids, max_tokens=limit))
    return prompts


async def chat_prompt(
    body: ChatBody, model: ModelInfo, tokenizer: GatewayTokenizer, size: int
) -> Prompt:
    """size: bytes of the request. Raises RequestError or ApiError naming the field."""
    check_body(body, model)
    text = await off_loop(weight(body, size), chat_text, body, tokenizer)
    # The template writes the special tokens itself.
    special = bool(body.add_special_tokens)
    ids = await _encode(tokenizer, text, special, "messages", model, len(text))
    check_prompt(ids, "messages", model)
    return Prompt(text=text, ids=ids, max_tokens=output_limit(body, len(ids), model, None))


def chat_text(body: ChatBody | TokenizeBody, tokenizer: GatewayTokenizer) -> str:
    """The prompt a conversation becomes."""
    arguments: dict[str, object] = {}
    tools = body.tools
    proceed = False
    if isinstance(body, ChatBody):
        arguments.update(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            arguments["reasoning_effort"] = body.reasoning_effort
        if body.tool_choice == "none":
            tools = None
        proceed = bool(body.continue_final_message)
    reserved = _NOT_FOR_CLIENTS & set(arguments)
    if reserved:
        raise RequestError(f"{min(reserved)!r} may not be given here", "chat_template_kwargs")
    assert body.messages is not None
    begin = not proceed if body.add_generation_prompt is None else body.add_generation_prompt
    return tokenizer.chat(
        [message.model_dump(exclude_none=True) for message in body.messages],
        [tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
        add_generation_prompt=begin,
        continue_final_message=proceed,
        template_arguments=arguments,
    )


def make_choices(
    body: SamplingBody,
    prompts: list[Prompt],
    answer_id: str,
    model: ModelInfo,
    tokenizer: GatewayTokenizer,
    *,
    per_prompt: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: str | None,
) -> list[Choice]:
    """`per_prompt` choices of each prompt, in order; all under one seed."""
    seed = draw_seed(body.seed)
    options = TextOptions(
        stops=body.stop,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        eos_ids=model.eos_ids,
    )
    choices: list[Choice] = []
    for prompt in prompts:
        for choice in range(per_prompt):
            sampling = sampling_params(
                body,
                max_tokens=prompt.max_tokens,
                choice=choice,
                seed=seed,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                grammar=grammar,
            )
            index = len(choices)
            request = GenerationRequest(
                request_id=f"{answer_id}-{index}",
                prompt_ids=prompt.ids,
                sampling=sampling,
                priority=body.priority or 0,
            )
            choices.append(Choice(index, request, tokenizer, options))
    return choices


async def _encode(
    tokenizer: GatewayTokenizer,
    text: str,
    add_special_tokens: bool,
    field: str,
    model: ModelInfo,
    size: int,
) -> tuple[int, ...]:
    """size: characters of the whole request. Raises ApiError for a text that is far too long,
    without encoding it."""
    if size >= LONG:
        least = await off_loop(size, tokenizer.least_tokens, text)
        check_length(least, field, model)
    return await off_loop(size, tokenizer.encode, text, add_special_tokens)


def weight(body: ChatBody | TokenizeBody, size: int) -> int:
    """How much work the chat template has, in characters, with the messages and tools of a request
    of so many bytes."""
    return size + _MESSAGE * len(body.messages or ())


async def off_loop(size: int, work: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
    """The result of `work`; in a thread when `size` (characters, or what takes about as long) is
    large, so that the streams of other clients go on."""
    if size < LONG:
        return work(*args, **named)
    return await asyncio.to_thread(work, *args, **named)
