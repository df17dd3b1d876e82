"""Which gateway each open request belongs to; used by the engine's and the server's thread."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from raymoe.requests import TokenEvent
from raymoe.stream.peer import GatewayPeer


class RequestBook:
    """Open requests by id. A request is open from `add` until its end is routed or `remove`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._peer_of_request: dict[str, GatewayPeer] = {}
        self._requests_of_peer: dict[GatewayPeer, set[str]] = {}

    def __len__(self) -> int:
        return len(self._peer_of_request)

    def count_of(self, peer: GatewayPeer) -> int:
        return len(self._requests_of_peer.get(peer, ()))

    def ids_of(self, peer: GatewayPeer) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._requests_of_peer.get(peer, ()))

    def add(self, request_id: str, peer: GatewayPeer) -> bool:
        """False when the id is open already."""
        with self._lock:
            if request_id in self._peer_of_request:
                return False
            self._peer_of_request[request_id] = peer
            self._requests_of_peer.setdefault(peer, set()).add(request_id)
            return True

    def remove(self, request_ids: Iterable[str], peer: GatewayPeer) -> tuple[str, ...]:
        """Those of the ids that were open and this peer's."""
        with self._lock:
            own = tuple(i for i in request_ids if self._peer_of_request.get(i) is peer)
            for request_id in own:
                self._forget(request_id, peer)
            return own

    def route(self, events: Sequence[TokenEvent]) -> dict[GatewayPeer, list[TokenEvent]]:
        """Events by gateway, in order; those of requests that are not open are left out."""
        events_of_peer: dict[GatewayPeer, list[TokenEvent]] = {}
        with self._lock:
            for event in events:
                peer = self._peer_of_request.get(event.request_id)
                if peer is None:
                    continue
                events_of_peer.setdefault(peer, []).append(event)
                if event.finish is not None:
                    self._forget(event.request_id, peer)
        return events_of_peer

    def _forget(self, request_id: str, peer: GatewayPeer) -> None:
        del self._peer_of_request[request_id]
        own = self._requests_of_peer[peer]
        own.discard(request_id)
        if not own:
            del self._requests_of_peer[peer]
