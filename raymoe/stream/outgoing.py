"""What a router sends of its engine: a step's events in frames, and the kinds of its errors."""

from __future__ import annotations

from collections.abc import Sequence

from raymoe.errors import (
    ExpertsUnavailable,
    FrameError,
    Overloaded,
    RequestError,
    RouterUnavailable,
)
from raymoe.requests import ErrorKind, TokenEvent
from raymoe.stream.frames import encode
from raymoe.stream.messages import Load, Tokens

_ERRORS_OF_KIND: dict[ErrorKind, tuple[type[Exception], ...]] = {
    "overloaded": (Overloaded,),
    "bad_request": (RequestError,),
    "unavailable": (RouterUnavailable, ExpertsUnavailable),
}


def kind_of(error: Exception) -> ErrorKind | None:
    """What the gateway makes of it; None for a failure that is nobody's but ours."""
    for kind, errors in _ERRORS_OF_KIND.items():
        if isinstance(error, errors):
            return kind
    return None


def frames_of(events: Sequence[TokenEvent], load: Load) -> tuple[list[bytes], list[str]]:
    """One frame; more when the log probabilities of long prompts do not fit into one. And the
    requests whose single event fits none: they end with an error."""
    try:
        return [encode(Tokens(events=tuple(events), load=load))], []
    except FrameError as error:
        if len(events) > 1:
            half = len(events) // 2
            first, second = frames_of(events[:half], load), frames_of(events[half:], load)
            return first[0] + second[0], first[1] + second[1]
        name = events[0].request_id
        failed = TokenEvent(request_id=name, finish="error", error=str(error))
        return [encode(Tokens(events=(failed,), load=load))], [name]
