"""One router of the pool: connect, connect again, count what is open there."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from raymoe.errors import HandshakeRefused, LinkError
from raymoe.gateway.backend import RouterState
from raymoe.requests import GenerationRequest, TokenEvent
from raymoe.stream.client import StreamClient
from raymoe.stream.messages import StreamEndpoint

if TYPE_CHECKING:
    from raymoe.gateway.pool import RouterPool

log = logging.getLogger(__name__)
_FIRST_RETRY_S, _LAST_RETRY_S = 0.05, 2.0


class RouterConnection:
    """Keeps a StreamClient to one endpoint alive until `stop`."""

    def __init__(self, pool: RouterPool, endpoint: StreamEndpoint) -> None:
        self.own: set[str] = set()  # wire ids open there
        self.retired = False  # not listed: no new requests while others are; kept while connected
        self.last_picked = 0
        self._pool = pool
        self._endpoint = endpoint
        self._client: StreamClient | None = None
        self._lost = asyncio.Event()
        self._was_accepting = True
        self._failure = ""  # of the last attempt to connect
        self._task: asyncio.Task[None] | None = None

    @property
    def router_id(self) -> str:
        return self._endpoint.router_id

    @property
    def connected(self) -> bool:
        return self._client is not None and not self._client.closed

    @property
    def usable(self) -> bool:
        """Connected and taking requests."""
        client = self._client
        return client is not None and not client.closed and client.load.accepting

    @property
    def rank(self) -> tuple[int, int]:
        """Open requests there; then who was picked longest ago."""
        others = self._client.load.others if self._client is not None else 0
        return len(self.own) + others, self.last_picked

    @property
    def state(self) -> RouterState:
        assert self._client is not None
        return RouterState(
            router_id=self.router_id,
            pid=self._client.hello.pid,
            load=self._client.load,
            own_requests=len(self.own),
        )

    def start(self) -> None:
        self._task = asyncio.create_task(self._keep(), name=f"raymoe-router-{self.router_id}")

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._client is not None:
            self._client.close()

    async def close(self) -> None:
        self.stop()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    def submit(self, request: GenerationRequest) -> None:
        """Raises PeerLost."""
        assert self._client is not None
        self._client.submit(request)
        self.own.add(request.request_id)

    def cancel(self, wire_id: str) -> None:
        self.own.discard(wire_id)
        if self._client is not None:
            self._client.cancel((wire_id,))

    def mark_lost(self) -> None:
        if self._client is not None:
            self._client.close()
        self._on_lost("the connection is closed")

    async def _keep(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            if await self._connect():
                retry_s = _FIRST_RETRY_S
                await self._lost.wait()
            else:
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _LAST_RETRY_S)

    async def _connect(self) -> bool:
        self._lost.clear()
        pool = self._pool
        try:
            self._client = await StreamClient.connect(
                self._endpoint,
                identity=pool.identity,
                secret=pool.secret,
                on_events=self._on_events,
                on_lost=self._on_lost,
                node=pool.node,
                name=pool.name,
                timeout_s=pool.config.connect_timeout_s,
                silence_s=pool.config.silence_s,
            )
        except LinkError as error:
            if str(error) != self._failure:  # once, not at every attempt
                level = logging.ERROR if isinstance(error, HandshakeRefused) else logging.INFO
                log.log(level, "router %s: %s", self.router_id, error)
            self._failure = str(error)
            return False
        self._failure = ""
        self._was_accepting = self._client.load.accepting
        pool.on_connected(self, self._client.hello.model)
        return True

    def _on_events(self, events: tuple[TokenEvent, ...]) -> None:
        if events:
            self._pool.on_events(events)
        accepting = self._client is not None and self._client.load.accepting
        if accepting and not self._was_accepting:
            self._pool.on_usable()
        self._was_accepting = accepting

    def _on_lost(self, why: str) -> None:
        log.warning("router %s: connection lost: %s", self.router_id, why)
        self._lost.set()
        wire_ids, self.own = self.own, set()
        self._pool.on_lost(self, wire_ids, why)
