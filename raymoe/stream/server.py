"""The router's end of the stream: requests in, one frame an engine step out."""

from __future__ import annotations

import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from raymoe.errors import (
    FrameError,
    HandshakeRefused,
    LinkError,
    RaymoeError,
)
from raymoe.links.handshake import Identity, Responder, Role, refusal
from raymoe.links.streams import frame
from raymoe.logs import fields
from raymoe.requests import GenerationRequest, TokenEvent
from raymoe.stream.book import RequestBook
from raymoe.stream.frames import MAX_FRAME_BYTES, decode, encode
from raymoe.stream.messages import (
    Cancel,
    Hello,
    Load,
    ModelInfo,
    StreamEndpoint,
    Submit,
    Tokens,
)
from raymoe.stream.outgoing import frames_of, kind_of
from raymoe.stream.peer import GatewayPeer
from raymoe.stream.sockets import listen_tcp, listen_unix, tune_tcp

log = logging.getLogger(__name__)
_READ_BYTES = 1 << 16
_ACCEPTED_ROLES: tuple[Role, ...] = ("gateway",)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Limits of the router's end.

    tcp_host None: no TCP socket; unix False: no unix socket (gateways in another network
    namespace cannot reach an abstract one anyway).
    """

    tcp_host: str | None = "127.0.0.1"
    tcp_port: int = 0
    unix: bool = True
    max_pending_bytes: int = 2 * MAX_FRAME_BYTES  # unread by one gateway before it is dropped
    stall_s: float = 10.0  # a gateway that reads nothing at all for this long is dropped
    max_gateways: int = 64
    max_unauthenticated: int = 16
    handshake_timeout_s: float = 5.0
    heartbeat_s: float = 0.5  # a load report goes out at least this often


class StreamServer:
    """Listens for gateways; hands requests in, takes token events out.

    `submitted(request)` and `cancelled(request_ids)` are called in this server's thread and must
    return at once; a RaymoeError raised by `submitted` becomes the request's error. `load()`
    returns (running, waiting) of the engine; without it every open request counts as running.
    """

    def __init__(
        self,
        *,
        router_id: str,
        model: ModelInfo,
        identity: Identity,
        secret: bytes,
        submitted: Callable[[GenerationRequest], None],
        cancelled: Callable[[tuple[str, ...]], None],
        load: Callable[[], tuple[int, int]] | None = None,
        node: str = "",
        config: StreamConfig | None = None,
    ) -> None:
        self._config = config or StreamConfig()
        self._router_id = router_id
        self._model = model
        self._identity = identity
        self._secret = secret
        self._submitted = submitted
        self._cancelled = cancelled
        self._engine_load = load
        self._book = RequestBook()
        self._peers: set[GatewayPeer] = set()
        self._writing: set[GatewayPeer] = set()
        self._accepting = True
        self._giving_away = False
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._listeners: list[socket.socket] = []
        self.endpoint = self._listen(node)
        self._thread = threading.Thread(target=self._run, name="raymoe-stream", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends every connection and the thread; open requests are cancelled. Repeatable."""
        self._stopping = True
        self._wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    @property
    def open_requests(self) -> int:
        return len(self._book)

    @property
    def gateways(self) -> int:
        """Gateways connected and known."""
        return sum(peer.ready for peer in tuple(self._peers))

    def set_accepting(self, accepting: bool) -> None:
        """Tells the gateways whether to send more; False drains: open requests go on."""
        self._accepting = accepting
        self._report_load(tuple(self._peers))

    def give_away(self) -> None:
        """From now on every open request, and each that still arrives, ends as "cancelled": its
        gateway goes on with it at another router, after the tokens it was sent. Any thread."""
        self._accepting = False
        self._giving_away = True
        self._wake()

    def publish(self, events: Sequence[TokenEvent]) -> None:
        """Sends one engine step's events: one frame a gateway. Any thread; never blocks.

        Events of requests that are not open (cancelled since) are left out.
        """
        if not events:
            return
        needs_thread = False
        for peer, own in self._book.route(events).items():
            peer.last_sent = time.monotonic()
            frames, failed = frames_of(own, self._load_for(peer))
            for frame_of_step in frames:
                needs_thread |= not peer.send(frame_of_step)
            if failed:  # the gateway has been told of their end
                self._cancel(peer, failed)
        if needs_thread:
            self._wake()

    # -- the thread ----------------------------------------------------------------------------

    def _listen(self, node: str) -> StreamEndpoint:
        unix = tcp = None
        if self._config.unix:
            unix = f"raymoe-stream-{os.getpid()}-{secrets.token_hex(8)}"
            self._listeners.append(listen_unix(unix))
        if self._config.tcp_host is not None:
            listener = listen_tcp(self._config.tcp_host, self._config.tcp_port)
            self._listeners.append(listener)
            tcp = f"{self._config.tcp_host}:{listener.getsockname()[1]}"
        return StreamEndpoint(router_id=self._router_id, node=node, unix=unix, tcp=tcp)

    def _run(self) -> None:
        self._selector.register(self._wake_in, selectors.EVENT_READ)
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ)
        tick_s = min(self._config.heartbeat_s, self._config.handshake_timeout_s) / 2
        try:
            while not self._stopping:
                for key, ready in self._selector.select(tick_s):
                    self._handle(key.fileobj, ready)  # type: ignore[arg-type]
                self._tend(time.monotonic())
        finally:
            for peer in tuple(self._peers):
                self._drop(peer, "the router is stopping")
            for sock in (*self._listeners, self._wake_in, self._wake_out):
                sock.close()
            self._selector.close()

    def _handle(self, sock: socket.socket, ready: int) -> None:
        if sock is self._wake_in:
            try:
                self._wake_in.recv(4096)
            except BlockingIOError:
                pass
            return
        if sock in self._listeners:
            self._accept(sock)
            return
        peer = self._selector.get_key(sock).data
        if ready & selectors.EVENT_WRITE:
            peer.flush()
        if ready & selectors.EVENT_READ:
            self._read(peer)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:  # gone before we got to it, or no descriptors left: the next one may do
            return
        unknown = sum(not peer.ready for peer in self._peers)
        full = len(self._peers) >= self._config.max_gateways
        if full or unknown >= self._config.max_unauthenticated:
            log.warning("refused a connection: %d open, %d unknown", len(self._peers), unknown)
            sock.close()
            return
        sock.setblocking(False)
        tune_tcp(sock)
        responder = Responder(
            self._identity, _ACCEPTED_ROLES, self._secret, role="router", name=self._router_id
        )
        peer = GatewayPeer(
            sock,
            responder,
            time.monotonic() + self._config.handshake_timeout_s,
            self._config.max_pending_bytes,
        )
        self._peers.add(peer)
        self._selector.register(sock, selectors.EVENT_READ, peer)

    def _read(self, peer: GatewayPeer) -> None:
        try:
            data = peer.sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._drop(peer, str(error))
            return
        if not data:
            self._drop(peer, "the gateway closed it")
            return
        try:
            self._take(peer, data)
        except LinkError as error:
            self._drop(peer, str(error))
        except Exception:  # a mistake of ours that a peer has found must not end the router
            log.exception("a gateway's connection failed")
            self._drop(peer, "internal error")

    def _take(self, peer: GatewayPeer, data: bytes) -> None:
        for body in peer.reader.feed(data):
            if not peer.ready:
                self._shake(peer, body)
                continue
            message = decode(body)
            if isinstance(message, Submit):
                self._open(peer, message.request)
            elif isinstance(message, Cancel):
                self._cancel(peer, message.request_ids)
            else:
                raise FrameError(f"a gateway does not send {type(message).__name__}")

    def _shake(self, peer: GatewayPeer, body: bytes) -> None:
        try:
            peer.send(frame(peer.responder.feed(body)))
        except HandshakeRefused as reason:
            peer.send(frame(refusal(reason)))
            raise
        if not peer.responder.done:
            return
        peer.reader.max_frame_bytes = MAX_FRAME_BYTES
        hello = Hello(
            router_id=self._router_id,
            pid=os.getpid(),
            model=self._model,
            load=self._load_for(peer),
        )
        peer.last_sent = time.monotonic()
        peer.send(encode(hello))
        peer.ready = True

    def _open(self, peer: GatewayPeer, request: GenerationRequest) -> None:
        if not self._book.add(request.request_id, peer):
            raise FrameError(f"request {request.request_id} is open already")
        try:
            self._submitted(request)
        except Exception as error:
            if not isinstance(error, RaymoeError):
                extra = fields(request_id=request.origin.request_id)
                log.exception("the engine did not take %s", request.request_id, extra=extra)
            refusal_of_engine = TokenEvent(
                request_id=request.request_id,
                finish="error",
                error=str(error) or type(error).__name__,
                error_kind=kind_of(error),
            )
            self.publish([refusal_of_engine])

    def _cancel(self, peer: GatewayPeer, request_ids: Sequence[str]) -> None:
        own = self._book.remove(request_ids, peer)
        if own:
            self._cancelled(own)

    def _give_away_all(self) -> None:
        given = tuple(i for peer in self._peers for i in self._book.ids_of(peer))
        # What a step that ends now has made for them is left out, and made again elsewhere.
        self.publish([TokenEvent(request_id=i, finish="cancelled") for i in given])
        if given:
            self._cancelled(given)

    def _drop(self, peer: GatewayPeer, why: str) -> None:
        if peer not in self._peers:
            return
        level = logging.INFO if peer.ready else logging.WARNING
        log.log(level, "a gateway's connection ends: %s", why)
        self._peers.discard(peer)
        self._writing.discard(peer)
        self._selector.unregister(peer.sock)
        peer.close()
        self._cancel(peer, self._book.ids_of(peer))

    def _tend(self, now: float) -> None:
        """After every round: broken peers, handshakes too late, write interest, heartbeats."""
        if self._giving_away:
            self._give_away_all()
        quiet = []
        for peer in tuple(self._peers):
            if peer.broken is not None:
                self._drop(peer, peer.broken)
            elif not peer.ready and now > peer.deadline:
                self._drop(peer, "no handshake in time")
            elif peer.stalled_s(now) > self._config.stall_s:
                self._drop(peer, f"nothing read for {self._config.stall_s:g} s: too slow")
            else:
                self._watch(peer)
                if not peer.wants_write and now - peer.last_sent >= self._config.heartbeat_s:
                    quiet.append(peer)
        self._report_load(quiet)

    def _watch(self, peer: GatewayPeer) -> None:
        wants = peer.wants_write
        if wants == (peer in self._writing):
            return
        (self._writing.add if wants else self._writing.discard)(peer)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wants else 0)
        self._selector.modify(peer.sock, events, peer)

    def _report_load(self, peers: Sequence[GatewayPeer]) -> None:
        for peer in peers:
            if peer.ready:
                peer.last_sent = time.monotonic()
                peer.send(encode(Tokens(events=(), load=self._load_for(peer))))

    def _load_for(self, peer: GatewayPeer) -> Load:
        open_requests = len(self._book)
        load = Load(
            running=open_requests,
            others=open_requests - self._book.count_of(peer),
            accepting=self._accepting,
        )
        if self._engine_load is None:
            return load
        running, waiting = self._engine_load()
        return replace(load, running=running, waiting=waiting)

    def _wake(self) -> None:
        try:
            self._wake_out.send(b"w")
        except (BlockingIOError, OSError):  # it is awake already, or gone
            pass
