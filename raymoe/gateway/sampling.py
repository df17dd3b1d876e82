"""From a checked body to what the router is asked for: limits, defaults, token ids, the seed."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from raymoe.errors import RequestError
from raymoe.gateway.errors import ApiError
from raymoe.gateway.schemas import ChatBody, CompletionBody, SamplingBody
from raymoe.requests import SamplingParams
from raymoe.stream.messages import ModelInfo

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for completions; chat goes on to the context's end


def check_body(body: SamplingBody, model: ModelInfo) -> None:
    """What depends on two fields, or on the model. Raises RequestError naming the field."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("'stream_options' needs 'stream': true", "stream_options")
    if None not in (body.max_tokens, body.max_completion_tokens) and (
        body.max_tokens != body.max_completion_tokens
    ):
        raise RequestError(
            f"'max_completion_tokens' is {body.max_completion_tokens} but 'max_tokens' is "
            f"{body.max_tokens}",
            "max_completion_tokens",
        )
    _check_ids(body.stop_token_ids or (), "stop_token_ids", model)
    _check_ids([token_id for token_id, _ in body.logit_bias], "logit_bias", model)
    if isinstance(body, CompletionBody):
        _check_completion(body)
    elif isinstance(body, ChatBody):
        _check_chat(body)


def _check_completion(body: CompletionBody) -> None:
    n, best_of = body.n or 1, body.best_of
    if best_of is not None and best_of < n:
        raise RequestError(f"'best_of' is {best_of}, less than 'n', {n}", "best_of")
    if best_of is not None and best_of > n and body.stream:
        raise RequestError("'best_of' above 'n' cannot be streamed", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("'max_tokens' is 0, which only makes sense with 'echo'", "max_tokens")


def _check_chat(body: ChatBody) -> None:
    if body.max_tokens == 0:
        raise RequestError("'max_tokens' must be at least 1", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs': true", "top_logprobs")
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestError(
            "'continue_final_message' and 'add_generation_prompt' exclude each other",
            "continue_final_message",
        )


def _check_ids(ids: Sequence[int], field: str, model: ModelInfo) -> None:
    for token_id in ids:
        if not 0 <= token_id < model.vocab:
            raise RequestError(
                f"token id {token_id} is not in the vocabulary of {model.vocab}", field
            )


def check_prompt(ids: Sequence[int], field: str, model: ModelInfo) -> None:
    """Raises RequestError for an empty prompt or an id outside the vocabulary, ApiError (400)
    for a prompt too long."""
    if not ids:
        raise RequestError("the prompt has no tokens", field)
    _check_ids((min(ids), max(ids)), field, model)
    if len(ids) >= model.longest_tokens:
        raise _too_long(f"the prompt has {len(ids)} tokens, but {_limit(model)}", field)


def check_length(least_tokens: int, field: str, model: ModelInfo) -> None:
    """Raises ApiError (400) for a prompt that is too long whatever its tokens are."""
    if least_tokens >= model.longest_tokens:
        raise _too_long(f"the prompt has {least_tokens} tokens or more, but {_limit(model)}", field)


def output_limit(
    body: SamplingBody, prompt_tokens: int, model: ModelInfo, default: int | None
) -> int:
    """How many tokens may be generated; `default` None: as many as fit.

    Raises ApiError (400) with both numbers when the client asks for more than fits.
    """
    room = model.longest_tokens - prompt_tokens
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if asked is None:
        return room if default is None else min(default, room)
    if asked > room:
        field = "max_completion_tokens" if body.max_tokens is None else "max_tokens"
        raise _too_long(
            f"{prompt_tokens} prompt tokens and {asked} output tokens are "
            f"{prompt_tokens + asked}, but {_limit(model)}",
            field,
        )
    return asked


def sampling_params(
    body: SamplingBody,
    *,
    max_tokens: int,
    choice: int,
    seed: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: str | None,
) -> SamplingParams:
    """One choice's parameters; every default is OpenAI's."""
    if (body.min_tokens or 0) > max_tokens:
        raise RequestError(
            f"'min_tokens' is {body.min_tokens}, more than the {max_tokens} output tokens allowed",
            "min_tokens",
        )
    return SamplingParams(
        seed=seed,
        choice=choice,
        temperature=_or(body.temperature, 1.0),
        top_p=_or(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),
        min_p=_or(body.min_p, 0.0),
        typical_p=_or(body.typical_p, 1.0),
        presence_penalty=_or(body.presence_penalty, 0.0),
        frequency_penalty=_or(body.frequency_penalty, 0.0),
        repetition_penalty=_or(body.repetition_penalty, 1.0),
        logit_bias=body.logit_bias,
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        grammar=grammar,
    )


def draw_seed(seed: int | None) -> int:
    """The client's seed as 63 bits (a negative one wraps), or a fresh one."""
    return secrets.randbits(63) if seed is None else seed % 2**63


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _too_long(message: str, field: str) -> ApiError:
    return ApiError(400, message, field, "context_length_exceeded")


def _limit(model: ModelInfo) -> str:
    if model.kv_capacity_tokens < model.context_tokens:
        return f"a router's KV cache holds {model.kv_capacity_tokens}"
    return f"the model's context is {model.context_tokens} tokens"
