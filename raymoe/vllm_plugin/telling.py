"""vLLM's outputs as the events that a router sends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raymoe.requests import FinishReason, GenerationRequest, TokenEvent, TokenLogprobs

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "repetition": "stop"}


def event_of(request: GenerationRequest, output: Any, *, first: bool) -> TokenEvent:
    """`output`: vLLM's RequestOutput with the new tokens only; `first`: the request's first one."""
    made, sampling = output.outputs[0], request.sampling
    ids = tuple(made.token_ids)
    finish: FinishReason | None = None
    error = None
    if made.finish_reason is not None:
        finish = _FINISH.get(made.finish_reason, "error")
        error = f"vLLM ended it: {made.finish_reason}" if finish == "error" else None
    if sampling.max_tokens == 0:
        ids, finish = (), finish and "length"
    return TokenEvent(
        request_id=request.request_id,
        token_ids=ids,
        logprobs=_logprobs(ids, made.logprobs, sampling.logprobs),
        prompt_logprobs=_prompt_logprobs(request, output.prompt_logprobs) if first else (),
        finish=finish,
        error=error,
        cached_prompt_tokens=(output.num_cached_tokens or 0) if first else 0,
    )


def _prompt_logprobs(
    request: GenerationRequest, given: Sequence[Mapping[int, Any] | None] | None
) -> tuple[TokenLogprobs, ...]:
    """Of every prompt token but the first, for which vLLM has None."""
    if not given or request.sampling.prompt_logprobs is None:
        return ()
    return _logprobs(request.prompt_ids[1:], given[1:], request.sampling.prompt_logprobs)


def _logprobs(
    ids: Sequence[int], given: Sequence[Mapping[int, Any] | None] | None, count: int | None
) -> tuple[TokenLogprobs, ...]:
    if count is None or given is None:
        return ()
    return tuple(
        TokenLogprobs(token=entries[token].logprob, top=_top(entries, count))
        for token, entries in zip(ids, given, strict=True)
        if entries is not None
    )


def _top(entries: Mapping[int, Any], count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest; vLLM gives the token itself beside them."""
    ranked = sorted(entries.items(), key=lambda entry: -entry[1].logprob)
    return tuple((token, entry.logprob) for token, entry in ranked[:count])
