"""What an engine tells of a request: a token, or its end."""

from __future__ import annotations

from raymoe.engine.sequence import Sequence
from raymoe.requests import ErrorKind, FinishReason, TokenEvent, TokenLogprobs


def token_event(
    sequence: Sequence, token: int, logprob: TokenLogprobs | None, finish: FinishReason | None
) -> TokenEvent:
    """A token has been drawn; `finish` when it was the last."""
    return TokenEvent(
        request_id=sequence.request.request_id,
        token_ids=(token,),
        logprobs=() if logprob is None else (logprob,),
        prompt_logprobs=_take_once(sequence),
        finish=finish,
        cached_prompt_tokens=_announce(sequence),
        began_s=sequence.began_s,
    )


def end_event(
    sequence: Sequence,
    *,
    finish: FinishReason = "error",
    error: str | None = None,
    kind: ErrorKind | None = None,
) -> TokenEvent:
    """A request has ended without another token."""
    return TokenEvent(
        request_id=sequence.request.request_id,
        prompt_logprobs=_take_once(sequence),
        finish=finish,
        error=error,
        error_kind=kind,
        cached_prompt_tokens=_announce(sequence),
        began_s=sequence.began_s,
    )


def _announce(sequence: Sequence) -> int:
    """Prompt tokens found in the cache, with a request's first event only."""
    if sequence.announced:
        return 0
    sequence.announced = True
    return sequence.cached_tokens


def _take_once(sequence: Sequence) -> tuple[TokenLogprobs, ...]:
    """The prompt's log probabilities, with a request's first event only."""
    if sequence.sampling.prompt_logprobs is None or sequence.prompt_logprobs_sent:
        return ()
    sequence.prompt_logprobs_sent = True
    return tuple(sequence.prompt_logprobs)
