"""The gateway's end of the stream, in its event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import cast

from raymoe.errors import FrameError, HandshakeRefused, LinkError, PeerLost
from raymoe.links.handshake import MAX_MESSAGE_BYTES, Identity, Initiator
from raymoe.links.streams import frame
from raymoe.requests import GenerationRequest, TokenEvent
from raymoe.stream.frames import MAX_FRAME_BYTES, FrameReader, decode, encode
from raymoe.stream.messages import Cancel, Hello, Load, StreamEndpoint, Submit, Tokens
from raymoe.stream.sockets import tune_tcp

log = logging.getLogger(__name__)
EventCallback = Callable[[tuple[TokenEvent, ...]], None]


class StreamClient(asyncio.Protocol):
    """One connection to one router. Make it with `connect`.

    `on_events(events)` gets each frame's events; `on_lost(why)` is called once, when an
    established connection ends for any reason but `close`. A router that says nothing for
    `silence_s` (it sends its load twice a second) counts as lost.
    """

    hello: Hello
    load: Load

    def __init__(
        self,
        initiator: Initiator,
        on_events: EventCallback,
        on_lost: Callable[[str], None],
        silence_s: float,
    ) -> None:
        self._initiator = initiator
        self._on_events = on_events
        self._on_lost = on_lost
        self._silence_s = silence_s
        self._reader = FrameReader(MAX_MESSAGE_BYTES)
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._transport: asyncio.Transport | None = None
        self._last_heard = time.monotonic()
        self._silence_timer: asyncio.TimerHandle | None = None
        self._suspected = False
        self._why_lost = "the router closed it"
        self._closed = False

    @classmethod
    async def connect(
        cls,
        endpoint: StreamEndpoint,
        *,
        identity: Identity,
        secret: bytes,
        on_events: EventCallback,
        on_lost: Callable[[str], None],
        node: str = "",
        name: str = "",
        timeout_s: float = 5.0,
        silence_s: float = 10.0,
    ) -> StreamClient:
        """Connects, proves the secret and has heard the router's hello.

        The unix socket is tried first when `node` is the router's, then TCP. Raises PeerLost when
        nobody answers, HandshakeRefused when the router is not one of ours or refuses us.
        """

        def make() -> StreamClient:
            initiator = Initiator(identity, "gateway", secret, name=name)
            return cls(initiator, on_events, on_lost, silence_s)

        why = "no address that can be reached from here"
        for kind in ("unix", "tcp"):
            if getattr(endpoint, kind) is None or (kind == "unix" and endpoint.node != node):
                continue
            try:
                async with asyncio.timeout(timeout_s):
                    client = await _open(endpoint, kind, make)
                    await client._established()
                    return client
            except HandshakeRefused:
                raise
            except (OSError, TimeoutError, LinkError) as error:
                why = f"{kind}: {error or type(error).__name__}"
        raise PeerLost(f"router {endpoint.router_id}", why)

    def submit(self, request: GenerationRequest) -> None:
        """Raises PeerLost when the connection has ended, FrameError for a request too large."""
        self._write(encode(Submit(request=request)))

    def cancel(self, request_ids: tuple[str, ...]) -> None:
        """Does nothing when the connection has ended: that cancels everything."""
        if not self._closed:
            self._write(encode(Cancel(request_ids=request_ids)))

    def close(self) -> None:
        """Ends the connection; the router cancels what is open. `on_lost` is not called."""
        self._closed = True
        if self._silence_timer is not None:
            self._silence_timer.cancel()
        if self._transport is not None:
            self._transport.close()

    @property
    def closed(self) -> bool:
        return self._closed

    def _write(self, data: bytes) -> None:
        if self._closed or self._transport is None:
            raise PeerLost(self._peer_name(), "the connection is closed")
        self._transport.write(data)

    def _peer_name(self) -> str:
        return f"router {self.hello.router_id}" if self._ready.done() else "router"

    async def _established(self) -> None:
        try:
            await self._ready
        except BaseException:
            self.close()
            raise
        self._check_silence()

    # -- asyncio.Protocol ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        sock = transport.get_extra_info("socket")
        if sock is not None:
            tune_tcp(sock)
        self._transport.write(frame(self._initiator.start()))

    def data_received(self, data: bytes) -> None:
        self._last_heard = time.monotonic()
        try:
            for body in self._reader.feed(data):
                if self._closed:
                    return
                self._take(body)
        except LinkError as error:
            self._fail(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self._why_lost = str(exc)
        self._fail(PeerLost(self._peer_name(), self._why_lost))

    # ------------------------------------------------------------------------------------------

    def _take(self, body: bytes) -> None:
        if not self._initiator.done:
            answer = self._initiator.feed(body)
            if answer is not None:
                assert self._transport is not None
                self._transport.write(frame(answer))
            else:
                self._reader.max_frame_bytes = MAX_FRAME_BYTES
            return
        message = decode(body)
        if isinstance(message, Tokens):
            self.load = message.load
            self._on_events(message.events)
        elif isinstance(message, Hello) and not self._ready.done():
            self.hello = message
            self.load = message.load
            self._ready.set_result(None)
        else:
            raise FrameError(f"a router does not send {type(message).__name__} here")

    def _fail(self, error: LinkError) -> None:
        if self._closed:
            return
        established = self._ready.done()
        self.close()
        if established:
            self._on_lost(error.why if isinstance(error, PeerLost) else str(error))
        else:
            self._ready.set_exception(error)

    def _check_silence(self) -> None:
        if self._closed:
            return
        silent_s = time.monotonic() - self._last_heard
        if silent_s > self._silence_s and not self._suspected:
            # Perhaps it was this loop that stood still: read what has arrived, then look again.
            self._suspected = True
            self._silence_timer = self._loop.call_later(0.05, self._check_silence)
            return
        self._suspected = False
        if silent_s > self._silence_s:
            assert self._transport is not None
            self._transport.abort()
            self._fail(PeerLost(self._peer_name(), f"silent for {silent_s:.1f} s"))
            return
        self._silence_timer = self._loop.call_later(self._silence_s / 4, self._check_silence)


async def _open(
    endpoint: StreamEndpoint, kind: str, make: Callable[[], StreamClient]
) -> StreamClient:
    loop = asyncio.get_running_loop()
    if kind == "unix":
        _, client = await loop.create_unix_connection(make, "\0" + str(endpoint.unix))
        return client
    host, _, port = str(endpoint.tcp).rpartition(":")
    _, client = await loop.create_connection(make, host.strip("[]"), int(port))
    return client
