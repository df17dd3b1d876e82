"""The handshake by itself: who gets in, who is refused, and by which name."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from dataclasses import replace
from typing import Any

import pytest

from raymoe.errors import HandshakeRefused
from raymoe.links.handshake import (
    MAX_MESSAGE_BYTES,
    Identity,
    Initiator,
    Peer,
    Responder,
)
from raymoe.links.streams import LENGTH, shake_asyncio, shake_socket

SECRET = b"a secret of thirty-two bytes ...."
OURS = Identity(deployment="demo", fingerprint="f00d", wire_dtype="float32", hidden=16)


def run(initiator: Initiator, responder: Responder) -> list[bytes]:
    """Shake hands to the end; every message sent, in order."""
    sent = [initiator.start()]
    while not (initiator.done and responder.done):
        sent.append(responder.feed(sent[-1]))
        answer = initiator.feed(sent[-1])
        if answer is not None:
            sent.append(answer)
    return sent


def responder(identity: Identity = OURS, **options: Any) -> Responder:
    return Responder(identity, ("router",), SECRET, name="group-0", incarnation=7, **options)


def test_both_sides_learn_the_other_and_the_terms() -> None:
    left = Initiator(OURS, "router", SECRET, name="router-0", offer={"slots": 2})
    right = responder(terms=lambda peer: {"slots": peer.offer["slots"] + 1})
    messages = run(left, right)
    assert left.peer is not None and right.peer is not None
    assert (left.peer.role, left.peer.name, left.peer.incarnation) == ("group", "group-0", 7)
    assert (right.peer.role, right.peer.name) == ("router", "router-0")
    assert left.peer.terms == right.peer.terms == {"slots": 3}
    assert len(messages) == 4
    assert not any(SECRET in message for message in messages)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("deployment", "other", "deployment differs: ours is 'demo', the peer's is 'other'"),
        ("fingerprint", "beef", "model fingerprint differs: ours is 'f00d', the peer's is 'beef'"),
        ("wire_dtype", "float16", "wire dtype differs: ours is 'float32'"),
        ("hidden", 32, "hidden size differs: ours is 16, the peer's is 32"),
        ("protocol", 99, "protocol version differs: ours is 1, the peer's is 99"),
    ],
)
def test_a_mismatch_is_refused_by_name(field: str, value: Any, named: str) -> None:
    theirs = replace(OURS, **{field: value})
    with pytest.raises(HandshakeRefused, match=named):
        responder().feed(Initiator(theirs, "router", SECRET).start())
    challenge = responder(theirs).feed(Initiator(theirs, "router", SECRET).start())
    left = Initiator(OURS, "router", SECRET)
    left.start()
    with pytest.raises(HandshakeRefused, match=named):  # and by an initiator, of a responder
        left.feed(challenge)


def test_an_unstated_field_is_not_compared_by_that_end_only() -> None:
    short = Identity(deployment="demo")
    run(Initiator(short, "router", SECRET), responder(short))
    with pytest.raises(HandshakeRefused, match="fingerprint"):
        responder().feed(Initiator(short, "router", SECRET).start())


def test_role_and_incarnation_are_refused_by_name() -> None:
    with pytest.raises(HandshakeRefused, match="role 'gateway' is not accepted here, only router"):
        responder().feed(Initiator(OURS, "gateway", SECRET).start())
    left = Initiator(OURS, "router", SECRET, expect_incarnation=8)
    challenge = responder().feed(left.start())
    with pytest.raises(HandshakeRefused, match="expected 8, the peer's is 7"):
        left.feed(challenge)


def test_a_wrong_secret_is_refused_at_either_end() -> None:
    right = responder()
    left = Initiator(OURS, "router", b"another secret, long enough")
    proof = left.feed(right.feed(left.start()))
    assert proof is not None
    with pytest.raises(HandshakeRefused, match="wrong secret"):
        right.feed(proof)
    assert right.peer is None and not right.done
    with pytest.raises(HandshakeRefused, match="ended"):
        right.feed(proof)
    # a responder without the secret that lets anybody in is found out by the initiator
    left = Initiator(OURS, "router", SECRET)
    left.feed(responder().feed(left.start()))
    with pytest.raises(HandshakeRefused, match="wrong secret"):
        left.feed(json.dumps({"welcome": {"terms": {}, "mac": "0" * 64}}).encode())


def test_a_short_secret_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(HandshakeRefused, match="shorter than 16"):
        Initiator(OURS, "router", b"short")


def test_replaying_a_recorded_handshake_is_refused() -> None:
    hello, challenge, proof, welcome = run(Initiator(OURS, "router", SECRET), responder())
    again = responder()
    again.feed(hello)
    with pytest.raises(HandshakeRefused, match="wrong secret"):
        again.feed(proof)
    left = Initiator(OURS, "router", SECRET)
    left.start()
    left.feed(challenge)
    with pytest.raises(HandshakeRefused, match="wrong secret"):
        left.feed(welcome)


def test_a_reflected_proof_is_refused() -> None:
    left = Initiator(OURS, "router", SECRET)
    right = responder()
    proof = left.feed(right.feed(left.start()))
    assert proof is not None
    mac = json.loads(proof)["proof"]["mac"]
    with pytest.raises(HandshakeRefused, match="wrong secret"):
        left.feed(json.dumps({"welcome": {"terms": {}, "mac": mac}}).encode())


def test_altered_terms_are_refused() -> None:
    left = Initiator(OURS, "router", SECRET)
    right = responder(terms=lambda peer: {"slots": 4})
    proof = left.feed(right.feed(left.start()))
    assert proof is not None
    welcome = json.loads(right.feed(proof))
    welcome["welcome"]["terms"]["slots"] = 5
    with pytest.raises(HandshakeRefused, match="wrong secret"):
        left.feed(json.dumps(welcome).encode())


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"GET / HTTP/1.1\r\n",
        b"\xff\xfe",
        b"[" * MAX_MESSAGE_BYTES,
        b"[]",
        b"{}",
        b'{"hello": 3}',
        b'{"hello": {"identity": {}}}',
        b"x" * (MAX_MESSAGE_BYTES + 1),
    ],
)
def test_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(HandshakeRefused):
        responder().feed(garbage)


@pytest.mark.parametrize("depth", [200, 700, 900, 990, 1900])
def test_deeply_nested_offers_are_refused(depth: int) -> None:
    right = responder()
    right.feed(Initiator(OURS, "router", SECRET).start())
    nested = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    with pytest.raises(HandshakeRefused):
        right.feed(b'{"proof": {"mac": "", "offer": ' + nested + b"}}")
    assert right.peer is None


def test_over_sockets_the_reason_reaches_the_initiator() -> None:
    left, right = socket.socketpair()
    reasons: list[str] = []

    def listen() -> None:
        try:
            shake_socket(right, responder())
        except HandshakeRefused as reason:
            reasons.append(str(reason))

    thread = threading.Thread(target=listen)
    thread.start()
    with left, right:
        with pytest.raises(HandshakeRefused, match="refused by the peer: deployment differs"):
            shake_socket(left, Initiator(replace(OURS, deployment="b"), "router", SECRET))
        thread.join(5)
    assert reasons == ["deployment differs: ours is 'demo', the peer's is 'b'"]


def test_over_sockets_a_silent_or_boasting_peer_ends_the_handshake() -> None:
    left, right = socket.socketpair()
    with left, right:
        with pytest.raises(HandshakeRefused, match=r"did not answer within 0.05 s"):
            shake_socket(right, responder(), timeout_s=0.05)
        left.sendall(LENGTH.pack(1 << 31))
        with pytest.raises(HandshakeRefused, match="message of 2147483648 bytes"):
            shake_socket(right, responder(), timeout_s=1)


def test_over_asyncio() -> None:
    async def main() -> tuple[Peer, Peer]:
        peers: asyncio.Future[Peer] = asyncio.get_running_loop().create_future()

        async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peers.set_result(await shake_asyncio(reader, writer, responder()))
            writer.close()

        server = await asyncio.start_server(listen, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        mine = await shake_asyncio(reader, writer, Initiator(OURS, "router", SECRET, name="r"))
        theirs = await peers
        writer.close()
        server.close()
        return mine, theirs

    mine, theirs = asyncio.run(main())
    assert (mine.name, theirs.name) == ("group-0", "r")
