"""From an endpoint to a link: shared memory on the same node, TCP otherwise."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import asdict

from raymoe.errors import HandshakeRefused, LinkError, PeerLost
from raymoe.links import inproc, shm, tcp
from raymoe.links.handshake import Identity, Initiator, Peer, Role
from raymoe.links.link import Endpoint, Link, SlotTerms
from raymoe.links.protocol import Wire

TIMEOUT_S = 5.0


def connect(
    endpoints: Endpoint | Sequence[Endpoint],
    identity: Identity,
    secret: bytes,
    *,
    name: str = "",
    node: str = "",
    incarnation: int | None = None,
    terms: SlotTerms | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Link:
    """A link to the group behind `endpoints`, as role `router`.

    Takes the first that works of: in this process, shared memory when the endpoint's node is
    `node`, TCP. `incarnation`, when given, must be the group's. `terms` asks for slots; the server
    grants at most its own. Raises HandshakeRefused (by name), or PeerLost when nothing answers.
    """
    candidates = [endpoints] if isinstance(endpoints, Endpoint) else list(endpoints)
    wire = Wire(hidden=identity.hidden, dtype=identity.wire_dtype)
    errors: list[str] = []
    for endpoint in ordered(candidates, node):
        side = Initiator(
            identity,
            "router",
            secret,
            name=name,
            offer=asdict(terms) if terms else {},
            expect_incarnation=incarnation,
        )
        try:
            if endpoint.kind == "inproc":
                return shm.adopt_segment(inproc.open_pair(endpoint.address), side, wire, timeout_s)
            if endpoint.kind == "shm":
                return shm.connect_shm(endpoint, side, wire, timeout_s)
            return tcp.connect_tcp(endpoint, side, wire, timeout_s)
        except HandshakeRefused:
            raise
        except (OSError, LinkError) as error:
            # e.g. the same node but another network namespace: the next way may work
            errors.append(f"{endpoint.kind} {endpoint.address}: {error}")
    raise PeerLost(name_of(candidates), "; ".join(errors) or "it has no endpoint for this node")


def ordered(endpoints: Sequence[Endpoint], node: str) -> list[Endpoint]:
    """The endpoints that can be reached from `node`, the fastest first."""
    rank = {"inproc": 0, "shm": 1, "tcp": 2}
    usable = [e for e in endpoints if e.kind != "shm" or e.node == node]
    return sorted(usable, key=lambda endpoint: rank[endpoint.kind])


def name_of(endpoints: Sequence[Endpoint]) -> str:
    """How to call a group whose name nobody has told yet."""
    return endpoints[0].address if endpoints else "a group without endpoints"


def connect_stream(
    endpoints: Endpoint | Sequence[Endpoint],
    identity: Identity,
    secret: bytes,
    *,
    role: Role = "group",
    name: str = "",
    incarnation: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> tuple[socket.socket, Peer]:
    """A blocking, authenticated socket to a group's bulk callback, over TCP: for copies between
    groups. Raises HandshakeRefused or PeerLost."""
    candidates = [endpoints] if isinstance(endpoints, Endpoint) else list(endpoints)
    errors: list[str] = []
    for endpoint in candidates:
        if endpoint.kind != "tcp":
            continue
        side = Initiator(identity, role, secret, name=name, expect_incarnation=incarnation)
        try:
            return tcp.open_stream(endpoint, side, timeout_s)
        except OSError as error:
            errors.append(f"{endpoint.address}: {error}")
    raise PeerLost(name_of(candidates), "; ".join(errors) or "it has no TCP endpoint")
