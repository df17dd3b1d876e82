"""The bare HTTP client: however the bytes are cut, the same events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.bench.sse import BadAnswer, BodyDecoder, Endpoint, EventSplitter, get_json, post_events
from raymoe.errors import ConfigError

EVENTS = [b"one", b"two\nlines", b'{"a": "\xe6\x97\xa5"}', b"[DONE]"]
STREAM = (
    b": a comment\n\ndata: one\r\n\r\nevent: x\ndata: two\ndata:lines\n\n"
    b'data: {"a": "\xe6\x97\xa5"}\n\ndata: [DONE]\n\n'
)


def in_chunks(data: bytes, sizes: list[int]) -> bytes:
    framed, at = b"", 0
    for size in sizes:
        part = data[at : at + size]
        at += size
        if part:
            framed += b"%x;ext=1\r\n%s\r\n" % (len(part), part)
    if rest := data[at:]:
        framed += b"%x\r\n%s\r\n" % (len(rest), rest)
    return framed + b"0\r\n\r\n"


@given(st.lists(st.integers(1, 40), max_size=12), st.lists(st.integers(1, 30), max_size=20))
@settings(max_examples=80, deadline=None, database=None)
def test_events_do_not_depend_on_the_cuts(chunks: list[int], reads: list[int]) -> None:
    raw = in_chunks(STREAM, chunks)
    decoder, splitter, found = BodyDecoder(chunked=True), EventSplitter(), []
    at = 0
    for size in [*reads, len(raw)]:
        found += splitter.feed(decoder.feed(raw[at : at + size]))
        at += size
    assert found == EVENTS
    assert decoder.ended


@asynccontextmanager
async def server(answer: bytes) -> AsyncIterator[Endpoint]:
    """Says the same to everyone, and closes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    running = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with running:
        yield Endpoint.of(f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}/v1")


def events_of(answer: bytes) -> list[bytes]:
    async def main() -> list[bytes]:
        async with server(answer) as endpoint:
            return [data async for _, data in post_events(endpoint, "/v1/completions", {})]

    return asyncio.run(main())


def test_a_stream_with_chunks_and_one_without() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
    assert (
        events_of(head + b"Transfer-Encoding: chunked\r\n\r\n" + in_chunks(STREAM, [3])) == EVENTS
    )
    assert events_of(head + b"\r\n" + STREAM) == EVENTS


@pytest.mark.parametrize(
    ("answer", "status", "said"),
    [
        (
            b'HTTP/1.1 429 Too Many\r\n\r\n{"error": {"message": "the queue is full"}}',
            429,
            "queue is full",
        ),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n<html>bad</html>", 502, "<html>"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{}", 200, "{}"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", 0, "no HTTP"),
        (b"", 0, "without an answer"),
    ],
)
def test_other_answers_say_what_they_were(answer: bytes, status: int, said: str) -> None:
    with pytest.raises(BadAnswer, match=said) as caught:
        events_of(answer)
    assert caught.value.status == status


def test_a_json_document() -> None:
    async def main() -> object:
        async with server(b'HTTP/1.1 200 OK\r\n\r\n{"a": [1]}') as endpoint:
            return await get_json(endpoint, "/status")

    assert asyncio.run(main()) == {"a": [1]}


def test_addresses() -> None:
    one = Endpoint.of("https://example.com/serve/v1/", "key")
    assert (one.host, one.port, one.tls, one.base) == ("example.com", 443, True, "/serve")
    sent = one.request("POST", "/v1/completions", b"{}")
    assert sent.startswith(b"POST /serve/v1/completions HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer key\r\n" in sent and sent.endswith(b"\r\n\r\n{}")
    assert Endpoint.of("localhost:8000").url == "http://localhost:8000"
    for wrong in ("ftp://x", "http://", "http://x:port"):
        with pytest.raises(ConfigError, match="--url"):
            Endpoint.of(wrong)
