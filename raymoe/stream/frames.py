"""Frames of the stream: a u32 length (little-endian), then one msgpack array.

Nothing is pickled, and a length is checked before anything of that size is allocated. Both ends
have shown that they know the secret before the first frame; a frame that is not well-formed is
still refused with FrameError, and the connection closed. What a router adds at the end of an
array, or to its hello, is left alone by a gateway one version older; what a gateway asks for and
a router does not know is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import asdict, fields
from typing import Any, get_args

import msgpack

from raymoe.errors import FrameError
from raymoe.requests import (
    NOBODY,
    ErrorKind,
    GenerationRequest,
    Origin,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from raymoe.stream.messages import Cancel, Hello, Load, Message, ModelInfo, Submit, Tokens

MAX_FRAME_BYTES = 32 << 20
_LENGTH = struct.Struct("<I")
_HELLO, _SUBMIT, _CANCEL, _TOKENS = 1, 2, 3, 4
_SAMPLING_DEFAULTS = asdict(SamplingParams(seed=0))
_MODEL_FIELDS = tuple(field.name for field in fields(ModelInfo))
_FINISH = (None, "stop", "length", "cancelled", "error")
_ERROR_KINDS = get_args(ErrorKind)
_CODE_OF_FINISH = {finish: code for code, finish in enumerate(_FINISH)}


class FrameReader:
    """Cuts a byte stream into frame bodies. `feed` whatever arrived, then take the bodies."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self.max_frame_bytes = max_frame_bytes  # may be changed between two bodies
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[bytes]:
        """Yields each complete body. Raises FrameError for a frame longer than agreed."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._buffer, start)
                if length > self.max_frame_bytes:
                    raise FrameError(
                        f"a frame of {length} bytes; at most {self.max_frame_bytes} are allowed"
                    )
                end = start + _LENGTH.size + length
                if len(self._buffer) < end:
                    break
                body = bytes(self._buffer[start + _LENGTH.size : end])
                start = end
                yield body
        finally:
            del self._buffer[:start]


def encode(message: Message) -> bytes:
    """One frame, its length in front."""
    body: bytes = msgpack.packb(_to_array(message), use_bin_type=True)
    if len(body) > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes; at most {MAX_FRAME_BYTES} are allowed")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Message:
    """The message in a frame's body. Raises FrameError for anything that is not one."""
    try:
        return _from_array(msgpack.unpackb(body, raw=False))
    except FrameError:
        raise
    except Exception as error:  # msgpack raises a dozen kinds; all mean the same here
        raise FrameError(f"not a message: {type(error).__name__}: {error}") from error


def _to_array(message: Message) -> list[Any]:
    if isinstance(message, Tokens):
        return [_TOKENS, _load_to_array(message.load), [_event_to_array(e) for e in message.events]]
    if isinstance(message, Submit):
        request = message.request
        array = [
            _SUBMIT,
            request.request_id,
            request.prompt_ids,
            request.output_ids,
            request.priority,
            _sampling_to_map(request.sampling),
        ]
        if request.origin != NOBODY:
            array.append([request.origin.request_id, request.origin.traceparent])
        return array
    if isinstance(message, Cancel):
        return [_CANCEL, message.request_ids]
    return [
        _HELLO,
        message.router_id,
        message.pid,
        {**asdict(message.model), "eos_ids": sorted(message.model.eos_ids)},
        _load_to_array(message.load),
    ]


def _from_array(array: Any) -> Message:
    kind, *rest = array
    if kind == _TOKENS:
        load, events = rest
        return Tokens(events=tuple(map(_event_from_array, events)), load=_load_from_array(load))
    if kind == _SUBMIT:
        request_id, prompt_ids, output_ids, priority, sampling, *more = rest
        return Submit(
            request=GenerationRequest(
                request_id=_text(request_id),
                prompt_ids=_ids(prompt_ids),
                output_ids=_ids(output_ids),
                priority=int(priority),
                sampling=_sampling_from_map(sampling),
                origin=_origin(*more),
            )
        )
    if kind == _CANCEL:
        (request_ids,) = rest
        return Cancel(request_ids=tuple(map(_text, request_ids)))
    if kind == _HELLO:
        router_id, pid, model, load, *_ = rest
        known = {name: model[name] for name in _MODEL_FIELDS}
        known["eos_ids"] = _ids(known["eos_ids"])
        return Hello(
            router_id=_text(router_id),
            pid=int(pid),
            model=ModelInfo(**known),
            load=_load_from_array(load),
        )
    raise FrameError(f"unknown message kind {kind!r}")


def _load_to_array(load: Load) -> list[Any]:
    return [load.running, load.waiting, load.others, load.accepting]


def _load_from_array(array: list[Any]) -> Load:
    running, waiting, others, accepting, *_ = array
    return Load(
        running=int(running), waiting=int(waiting), others=int(others), accepting=bool(accepting)
    )


def _event_to_array(event: TokenEvent) -> list[Any]:
    """Two elements for the plain case, which is nearly every event: the id and its tokens."""
    array: list[Any] = [event.request_id, event.token_ids]
    if (
        event.finish is None
        and not event.logprobs
        and not event.prompt_logprobs
        and not event.cached_prompt_tokens
    ):
        return array
    array += [
        _CODE_OF_FINISH[event.finish],
        event.error,
        [(one.token, one.top) for one in event.logprobs],
        [(one.token, one.top) for one in event.prompt_logprobs],
        event.cached_prompt_tokens,
        event.error_kind,
    ]
    return array


def _event_from_array(array: list[Any]) -> TokenEvent:
    if len(array) == 2:
        return TokenEvent(request_id=array[0], token_ids=tuple(array[1]))
    request_id, token_ids, finish, error, logprobs, prompt_logprobs, cached, *more = array
    kind = more[0] if more and more[0] in _ERROR_KINDS else None
    return TokenEvent(
        request_id=request_id,
        token_ids=tuple(token_ids),
        logprobs=_logprobs(logprobs),
        prompt_logprobs=_logprobs(prompt_logprobs),
        finish=_FINISH[finish],  # type: ignore[arg-type]
        error=error,
        cached_prompt_tokens=cached,
        error_kind=kind,
    )


def _logprobs(entries: list[Any]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(token=token, top=tuple((int(i), float(p)) for i, p in top))
        for token, top in entries
    )


def _sampling_to_map(sampling: SamplingParams) -> dict[str, Any]:
    """Only what differs from the defaults, by name."""
    return {
        name: value
        for name, default in _SAMPLING_DEFAULTS.items()
        if (value := getattr(sampling, name)) != default or name == "seed"
    }


def _sampling_from_map(values: dict[str, Any]) -> SamplingParams:
    unknown = values.keys() - {f.name for f in fields(SamplingParams)}
    if unknown:
        raise FrameError(f"unknown sampling field {sorted(unknown)[0]!r}")
    if "stop_token_ids" in values:
        values["stop_token_ids"] = _ids(values["stop_token_ids"])
    if "logit_bias" in values:
        values["logit_bias"] = tuple((int(i), float(b)) for i, b in values["logit_bias"])
    if not isinstance(values.get("grammar"), str | None):
        raise FrameError("a grammar must be a string")
    return SamplingParams(**values)


def _origin(array: Any = ("", "")) -> Origin:
    request_id, traceparent = array
    return Origin(request_id=_text(request_id), traceparent=_text(traceparent))


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1024:
        raise FrameError("an id must be a string of at most 1024 characters")
    return value


def _ids(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise FrameError("token ids must be a list of integers")
    return tuple(values)
