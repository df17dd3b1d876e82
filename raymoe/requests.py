"""What a gateway asks of a router, and what comes back: token ids in, token ids out.

Text never crosses this line: chat templates, tokenizing, stop strings and OpenAI shapes are the
gateway's; batching, KV cache, stop token ids and sampling are the router's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "cancelled", "error"]
ErrorKind = Literal["overloaded", "bad_request", "unavailable"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How tokens are drawn. Already checked by the gateway; the engine asserts, it does not parse.

    `seed` is always set (the gateway draws one when the client gave none): together with `choice`
    and the token's position it fixes every random draw, so that another router can go on.
    """

    seed: int
    choice: int = 0
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    typical_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    max_tokens: int = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # None: off; n: the sampled token and the n likeliest
    prompt_logprobs: int | None = None
    grammar: str | None = None  # what the output must follow; raymoe.grammar.build makes the text


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Whose request this is, for logs and traces; nothing depends on it.

    request_id   what the client calls it (X-Request-Id), or the id of its answer
    traceparent  W3C, of the gateway's span; empty: it is not traced
    """

    request_id: str = ""
    traceparent: str = ""


NOBODY = Origin()


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One choice of one client request.

    `output_ids` are tokens already generated elsewhere (a router that died): they count as output
    for penalties, limits, usage and positions, and are not sent again.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    output_ids: tuple[int, ...] = ()
    priority: int = 0
    origin: Origin = NOBODY


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Natural log probabilities (after temperature 1, before any filter) of one position."""

    token: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """What one engine step made for one request: its new token ids, and the end if it ended."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()  # one per token id when asked for
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()  # with the first event, when asked for
    finish: FinishReason | None = None
    error: str | None = None  # the sentence, with finish == "error"
    cached_prompt_tokens: int = field(default=0)
    error_kind: ErrorKind | None = None  # with finish == "error"; None: a failure of our own
    began_s: float = 0.0  # with finish: monotonic s when it left the queue; stays in the router
