"""One streamed POST over a plain socket: server-sent events, each with the time it came.

A bare client, because its CPU time may come from the same cores as the server's.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from raymoe.errors import ConfigError

_READ_BYTES = 1 << 16
_MAX_HEAD_BYTES = 1 << 16


class BadAnswer(Exception):
    """The server did not stream. Arguments: the HTTP status (0: no HTTP at all), what it said."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(status, said)
        self.status = status
        self.said = said

    def __str__(self) -> str:
        return f"status {self.status}: {self.said}" if self.status else self.said


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where to send: `base` is the path before /v1."""

    host: str
    port: int
    tls: bool
    base: str
    api_key: str | None = None

    @classmethod
    def of(cls, url: str, api_key: str | None = None) -> Endpoint:
        """From http://host:port[/path][/v1]. Raises ConfigError."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"--url {url}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url {url} is not http://HOST:PORT or https://HOST")
        tls = parts.scheme == "https"
        return cls(
            host=parts.hostname,
            port=port or (443 if tls else 80),
            tls=tls,
            base=parts.path.rstrip("/").removesuffix("/v1"),
            api_key=api_key,
        )

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://{self.host}:{self.port}{self.base}"

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """The bytes of one HTTP request, after which the server is to close."""
        head = [f"{method} {self.base}{path} HTTP/1.1", f"Host: {self.host}:{self.port}"]
        head += ["Connection: close", "Accept: text/event-stream, application/json"]
        if self.api_key:
            head.append(f"Authorization: Bearer {self.api_key}")
        if body:
            head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*head, "", ""]).encode() + body


async def post_events(
    endpoint: Endpoint, path: str, body: dict[str, Any]
) -> AsyncIterator[tuple[float, bytes]]:
    """(perf_counter seconds, data) of each event, until the server closes. Raises BadAnswer for
    any other answer than a stream, OSError when the connection fails."""
    async for at, part in _exchange(endpoint, "POST", path, json.dumps(body).encode(), 200):
        yield at, part


async def get_json(endpoint: Endpoint, path: str) -> Any:
    """A small JSON document. Raises BadAnswer, OSError."""
    return await _whole(endpoint, "GET", path, b"")


async def post_json(endpoint: Endpoint, path: str, body: dict[str, Any]) -> Any:
    """The same for a POST."""
    return await _whole(endpoint, "POST", path, json.dumps(body).encode())


class BodyDecoder:
    """An HTTP/1.1 body's bytes without its framing; `feed` what arrives after the head."""

    def __init__(self, chunked: bool) -> None:
        self._chunked = chunked
        self._raw = b""
        self._left = 0  # of the present chunk, its line end included
        self.ended = False

    def feed(self, data: bytes) -> bytes:
        if not self._chunked:
            return data
        self._raw += data
        parts = []
        while self._raw and not self.ended:
            if self._left > 2:
                part = self._raw[: self._left - 2]
                self._raw = self._raw[len(part) :]
                self._left -= len(part)
                parts.append(part)
            elif self._left:
                cut = min(self._left, len(self._raw))
                self._raw = self._raw[cut:]
                self._left -= cut
            else:
                line, found, rest = self._raw.partition(b"\r\n")
                if not found:
                    break
                self._raw = rest
                size = int(line.partition(b";")[0], 16)
                self._left = size + 2
                self.ended = size == 0
        return b"".join(parts)


class EventSplitter:
    """The data of server-sent events, however the bytes are cut."""

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, data: bytes) -> list[bytes]:
        text = (self._tail + data).replace(b"\r\n", b"\n")
        if text.endswith(b"\r"):  # half a line end
            text, last = text[:-1], b"\r"
        else:
            last = b""
        *events, tail = text.split(b"\n\n")
        self._tail = tail + last
        found = []
        for event in events:
            lines = [line[5:].lstrip(b" ") for line in event.split(b"\n") if line[:5] == b"data:"]
            if lines:
                found.append(b"\n".join(lines))
        return found


async def _exchange(
    endpoint: Endpoint, method: str, path: str, body: bytes, wanted: int
) -> AsyncIterator[tuple[float, bytes]]:
    context = ssl.create_default_context() if endpoint.tls else None
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=context)
    try:
        writer.write(endpoint.request(method, path, body))
        await writer.drain()
        status, headers, rest = await _head(reader)
        decoder = BodyDecoder("chunked" in headers.get("transfer-encoding", ""))
        if status != wanted or "event-stream" not in headers.get("content-type", ""):
            text = decoder.feed(rest + await reader.read(1 << 20))
            raise BadAnswer(status, _said(text))
        splitter = EventSplitter()
        data = rest
        while True:
            now = time.perf_counter()
            for event in splitter.feed(decoder.feed(data)):
                yield now, event
            if decoder.ended or not (data := await reader.read(_READ_BYTES)):
                return
    finally:
        writer.close()


async def _whole(endpoint: Endpoint, method: str, path: str, body: bytes) -> Any:
    context = ssl.create_default_context() if endpoint.tls else None
    reader, writer = await asyncio.open_connection(endpoint.host, endpoint.port, ssl=context)
    try:
        writer.write(endpoint.request(method, path, body))
        await writer.drain()
        status, headers, rest = await _head(reader)
        data = BodyDecoder("chunked" in headers.get("transfer-encoding", "")).feed(
            rest + await reader.read()
        )
        if status != 200:
            raise BadAnswer(status, _said(data))
        try:
            return json.loads(data)
        except ValueError:
            raise BadAnswer(status, f"{path} is not JSON") from None
    finally:
        writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Status, headers by lower-case name, and what came behind them."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = await reader.read(_READ_BYTES)
        if not part:
            raise BadAnswer(0, "the server closed the connection without an answer")
        data += part
        if len(data) > _MAX_HEAD_BYTES and b"\r\n\r\n" not in data:
            raise BadAnswer(0, "this is no HTTP server")
    head, _, rest = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/") or not words[1].isdigit():
        raise BadAnswer(0, "this is no HTTP server")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip().lower()
    return int(words[1]), headers, rest


def _said(data: bytes) -> str:
    """The sentence of an error body."""
    try:
        return str(json.loads(data)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return data[:200].decode(errors="replace").strip() or "an empty answer"
