"""Answers in OpenAI's shapes: whole ones as dictionaries, streamed ones as bytes made by hand.

A streamed chunk is made once a token and stream, so nothing is built that does not change: the
bytes before the text are ready, and the text goes through the C string encoder of `json`.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii
from typing import Any, Literal

from raymoe.gateway.calls import ForcedCalls
from raymoe.gateway.choice import Choice, Delta, TokenEntry
from raymoe.gateway.tokenizer import GatewayTokenizer

DONE = b"data: [DONE]\n\n"
Kind = Literal["completion", "chat"]


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


class Shape:
    """One answer's fixed part, and the two forms of the rest."""

    def __init__(
        self,
        kind: Kind,
        model: str,
        tokenizer: GatewayTokenizer,
        calls: ForcedCalls | None = None,
    ) -> None:
        """calls: the outputs are tool calls."""
        self.kind = kind
        self.calls = calls
        prefix, self._object = {
            "completion": ("cmpl", "text_completion"),
            "chat": ("chatcmpl", "chat.completion"),
        }[kind]
        self.id = f"{prefix}-{secrets.token_hex(12)}"
        self._head = {
            "id": self.id,
            "object": self._object,
            "created": int(time.time()),
            "model": model,
        }
        self._tokenizer = tokenizer

    def whole(self, outputs: Sequence[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": list(outputs), "usage": usage}

    def output(
        self, index: int, text: str, entries: Sequence[TokenEntry] | None, finish: str | None
    ) -> dict[str, Any]:
        """One choice of a whole answer. entries None: no log probabilities were asked for."""
        logprobs = None if entries is None else self.logprobs(entries)
        if self.kind == "chat":
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if self.calls is not None:
                message, finish = self.calls.message(text), self.calls.finish(finish)
            return {
                "index": index,
                "message": message,
                "logprobs": logprobs,
                "finish_reason": finish,
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def logprobs(self, entries: Sequence[TokenEntry]) -> dict[str, Any]:
        make = _chat_logprobs if self.kind == "chat" else _completion_logprobs
        return make(entries, self._tokenizer)

    def stream(self, usage_mode: Literal["none", "last", "each"]) -> ChunkWriter:
        return ChunkWriter(self, self._head, usage_mode)


class ChunkWriter:
    """Server-sent events of one answer."""

    def __init__(
        self, shape: Shape, head: dict[str, Any], usage_mode: Literal["none", "last", "each"]
    ) -> None:
        self._shape = shape
        object_name = "chat.completion.chunk" if shape.kind == "chat" else "text_completion"
        opening = json.dumps({**head, "object": object_name}, separators=(",", ":"))[:-1]
        self._before_index = f'data: {opening},"choices":[{{"index":'
        self._opening = f"data: {opening}"
        self._text_key = ',"delta":{"content":' if shape.kind == "chat" else ',"text":'
        self._text_end = "}" if shape.kind == "chat" else ""
        self._usage_mode = usage_mode
        self._calls = shape.calls
        self._unsaid: dict[int, list[TokenEntry]] = {}  # of chunks that said nothing of a call
        tail = "]}\n\n" if usage_mode == "none" else '],"usage":null}\n\n'
        self._tail = tail
        self._plain_tail = f'{self._text_end},"logprobs":null,"finish_reason":null}}{tail}'
        self._starts: dict[int, str] = {}

    def first(self, index: int) -> bytes:
        """A chat's opening chunk, which carries the role; nothing for completions."""
        if self._shape.kind != "chat":
            return b""
        delta = '"delta":{"role":"assistant","content":""}'
        return (
            f'{self._before_index}{index},{delta},"logprobs":null,"finish_reason":null}}{self._tail}'
        ).encode()

    def chunk(
        self, choice: Choice, delta: Delta, prompt_tokens: int, completion_tokens: int
    ) -> bytes:
        """One chunk, or nothing when the delta has neither text nor end."""
        text, entries, finish = delta
        if not text and finish is None:
            return b""
        if self._calls is not None:
            return self._call_chunk(choice, delta, prompt_tokens, completion_tokens)
        start = self._starts.get(choice.index)
        if start is None:
            start = f"{self._before_index}{choice.index}{self._text_key}"
            self._starts[choice.index] = start
        if finish is None and not entries and self._usage_mode != "each":
            return (start + encode_basestring_ascii(text) + self._plain_tail).encode()
        tail = self._tail_with(prompt_tokens, completion_tokens)
        logprobs = json.dumps(self._shape.logprobs(entries)) if entries else "null"
        if not text and self._shape.kind == "chat":
            start = f'{self._before_index}{choice.index},"delta":{{'
            body = ""
        else:
            body = encode_basestring_ascii(text)
        reason = "null" if finish is None else f'"{finish}"'
        return (
            f'{start}{body}{self._text_end},"logprobs":{logprobs},"finish_reason":{reason}}}{tail}'
        ).encode()

    def _call_chunk(
        self, choice: Choice, delta: Delta, prompt_tokens: int, completion_tokens: int
    ) -> bytes:
        """The same of an output that is a tool call."""
        assert self._calls is not None
        text, entries, finish = delta
        said = self._calls.delta(choice.index, text, finish is not None)
        entries = [*self._unsaid.pop(choice.index, ()), *entries]
        if not said and finish is None:
            self._unsaid[choice.index] = entries
            return b""
        logprobs = json.dumps(self._shape.logprobs(entries)) if entries else "null"
        reason = json.dumps(self._calls.finish(finish))
        return (
            f'{self._before_index}{choice.index},"delta":{json.dumps(said)},"logprobs":{logprobs},'
            f'"finish_reason":{reason}}}{self._tail_with(prompt_tokens, completion_tokens)}'
        ).encode()

    def _tail_with(self, prompt_tokens: int, completion_tokens: int) -> str:
        if self._usage_mode != "each":
            return self._tail
        return f'],"usage":{json.dumps(usage(prompt_tokens, completion_tokens))}}}\n\n'

    def raw_text(self, index: int, text: str, entries: Sequence[TokenEntry] | None) -> bytes:
        """A completion's echoed prompt."""
        logprobs = "null" if entries is None else json.dumps(self._shape.logprobs(entries))
        return (
            f"{self._before_index}{index}{self._text_key}{encode_basestring_ascii(text)}"
            f'{self._text_end},"logprobs":{logprobs},"finish_reason":null}}{self._tail}'
        ).encode()

    def last(self, usage: dict[str, Any]) -> bytes:
        """What follows the last chunk: the usage when it was asked for, and the end."""
        if self._usage_mode == "none":
            return DONE
        return f'{self._opening},"choices":[],"usage":{json.dumps(usage)}}}\n\n'.encode() + DONE


def error_chunk(body: dict[str, Any]) -> bytes:
    """An error in mid-stream, as OpenAI's clients look for it."""
    return b"data: " + json.dumps(body).encode() + b"\n\n" + DONE


def _chat_logprobs(entries: Sequence[TokenEntry], tokenizer: GatewayTokenizer) -> dict[str, Any]:
    content = []
    for entry in entries:
        assert entry.logprobs is not None
        top = [_chat_token(token_id, p, tokenizer) for token_id, p in entry.logprobs.top]
        content.append(
            {**_chat_token(entry.token_id, entry.logprobs.token, tokenizer), "top_logprobs": top}
        )
    return {"content": content, "refusal": None}


def _chat_token(token_id: int, logprob: float, tokenizer: GatewayTokenizer) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": _finite(logprob),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }


def _completion_logprobs(
    entries: Sequence[TokenEntry], tokenizer: GatewayTokenizer
) -> dict[str, Any]:
    return {
        "tokens": [tokenizer.token_text(entry.token_id) for entry in entries],
        "token_logprobs": [
            None if entry.logprobs is None else _finite(entry.logprobs.token) for entry in entries
        ],
        "top_logprobs": [_top(entry, tokenizer) for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def _top(entry: TokenEntry, tokenizer: GatewayTokenizer) -> dict[str, float] | None:
    """The likeliest tokens and the chosen one, as OpenAI gives them."""
    if entry.logprobs is None:
        return None
    top = {tokenizer.token_text(token_id): _finite(p) for token_id, p in entry.logprobs.top}
    if top:
        top.setdefault(tokenizer.token_text(entry.token_id), _finite(entry.logprobs.token))
    return top


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes -9999 for "practically never"."""
    return logprob if logprob > -9999.0 else -9999.0
