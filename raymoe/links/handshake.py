"""Who is at the other end: a mutual proof of one shared secret, and of serving the same model.

Sans-IO. Four messages, each a whole one (a SEQPACKET packet, or a length-prefixed frame on a
stream: raymoe/links/streams.py); all but the keyed digests are JSON of at most 4096 bytes:

    initiator                                   responder
    hello      role, identity, nonce_i  ---->
                                        <----   challenge  identity, nonce_r   | refusal
    proof      offer, mac_i             ---->
                                        <----   welcome    terms, mac_r        | refusal

mac_i and mac_r are HMAC-SHA256 under the secret over a label of the side and every byte sent so
far, so that neither a recording nor a reflection of a handshake is of any use, and the offer and
the terms cannot be altered. The responder, which strangers can reach, computes nothing keyed for
a peer that has not proved itself first. This authenticates; it does not encrypt what follows.

A mismatch is refused by name, with both values, at both ends; the secret is in no message.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from raymoe.errors import HandshakeRefused
from raymoe.links.protocol import COMPATIBLE_VERSIONS, PROTOCOL_VERSION

Role = Literal["router", "group", "controller", "gateway"]

MAX_MESSAGE_BYTES = 4096
MIN_SECRET_BYTES = 16
_NONCE_BYTES = 32


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What both ends must agree on. A field left at its default is not compared by this end
    (a controller need not know the wire dtype); the data plane states them all."""

    deployment: str
    fingerprint: str = ""  # of the model
    wire_dtype: str = ""
    hidden: int = 0
    protocol: int = PROTOCOL_VERSION


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The other end, once the handshake is done. `terms` is what the responder granted."""

    role: str
    name: str
    incarnation: int
    identity: Identity
    offer: Mapping[str, Any]
    terms: Mapping[str, Any]


class _Side:
    """What both sides share: encoding, the transcript, the comparison of identities."""

    def __init__(
        self, identity: Identity, role: str, secret: bytes, name: str, incarnation: int
    ) -> None:
        if len(secret) < MIN_SECRET_BYTES:
            raise HandshakeRefused(f"the secret is shorter than {MIN_SECRET_BYTES} bytes")
        self.identity = identity
        self.role = role
        self.name = name
        self.incarnation = incarnation
        self.done = False
        self.peer: Peer | None = None
        self._secret = secret
        self._transcript = hashlib.sha256(b"raymoe handshake 1")
        self._failed = False

    def _encode(self, message: dict[str, Any]) -> bytes:
        data = json.dumps(message, separators=(",", ":"), sort_keys=True).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise HandshakeRefused(f"our own handshake message is over {MAX_MESSAGE_BYTES} bytes")
        self._absorb(data)
        return data

    def _absorb(self, data: bytes) -> None:
        self._transcript.update(len(data).to_bytes(4, "little") + data)

    def _mac(self, label: str, body: dict[str, Any]) -> str:
        text = json.dumps(body, separators=(",", ":"), sort_keys=True).encode()
        message = label.encode() + b"\0" + self._transcript.digest() + text
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()

    def _introduction(self) -> dict[str, Any]:
        return {
            "role": self.role,
            "name": self.name,
            "incarnation": self.incarnation,
            "identity": asdict(self.identity),
            "nonce": os.urandom(_NONCE_BYTES).hex(),
        }

    def _decode(self, data: bytes) -> dict[str, Any]:
        if len(data) > MAX_MESSAGE_BYTES:
            raise HandshakeRefused(f"handshake message over {MAX_MESSAGE_BYTES} bytes")
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            raise HandshakeRefused("the peer does not speak the raymoe handshake") from None
        if not isinstance(message, dict):
            raise HandshakeRefused("the peer does not speak the raymoe handshake")
        if "refused" in message:
            raise HandshakeRefused(f"refused by the peer: {str(message['refused'])[:500]}")
        return message

    def _introduced(self, message: dict[str, Any]) -> Peer:
        """The peer as it presents itself; HandshakeRefused when it is not one of ours."""
        try:
            stated = message["identity"]
            theirs = Identity(
                deployment=str(stated["deployment"])[:200],
                fingerprint=str(stated["fingerprint"])[:200],
                wire_dtype=str(stated["wire_dtype"])[:200],
                hidden=int(stated["hidden"]),
                protocol=int(stated["protocol"]),
            )
            peer = Peer(
                role=str(message["role"])[:40],
                name=str(message["name"])[:200],
                incarnation=int(message["incarnation"]),
                identity=theirs,
                offer={},
                terms={},
            )
            fresh = len(bytes.fromhex(message["nonce"])) == _NONCE_BYTES
        except (KeyError, TypeError, ValueError, OverflowError):
            raise HandshakeRefused("the peer does not speak the raymoe handshake") from None
        if not fresh:
            raise HandshakeRefused(f"the peer's nonce is not {_NONCE_BYTES} bytes")
        check_identity(self.identity, theirs)
        return peer

    def _failed_by(self, reason: HandshakeRefused | RecursionError) -> HandshakeRefused:
        """End this handshake; RecursionError comes of deeply nested JSON."""
        self._failed = True
        self.done = False
        self.peer = None
        if isinstance(reason, HandshakeRefused):
            return reason
        return HandshakeRefused("the peer does not speak the raymoe handshake")


def check_identity(ours: Identity, theirs: Identity) -> None:
    """HandshakeRefused naming both values of the first field that differs."""
    versions = {ours.protocol, theirs.protocol}
    if len(versions) > 1 and not versions <= set(COMPATIBLE_VERSIONS):
        raise HandshakeRefused(
            f"protocol version differs: ours is {ours.protocol}, the peer's is {theirs.protocol}"
        )
    for field, label in (
        ("deployment", "deployment"),
        ("fingerprint", "model fingerprint"),
        ("wire_dtype", "wire dtype"),
        ("hidden", "hidden size"),
    ):
        mine, other = getattr(ours, field), getattr(theirs, field)
        if mine and mine != other:
            raise HandshakeRefused(f"{label} differs: ours is {mine!r}, the peer's is {other!r}")


class Initiator(_Side):
    """The side that connects. `start()`, then `feed()` each message received and send what it
    returns, until `done`; HandshakeRefused says why not."""

    def __init__(
        self,
        identity: Identity,
        role: Role,
        secret: bytes,
        *,
        name: str = "",
        incarnation: int = 0,
        offer: Mapping[str, Any] | None = None,
        expect_incarnation: int | None = None,
    ) -> None:
        super().__init__(identity, role, secret, name, incarnation)
        self._offer = dict(offer or {})
        self._expect_incarnation = expect_incarnation
        self._responder: Peer | None = None

    def start(self) -> bytes:
        """The first message."""
        return self._encode({"hello": self._introduction()})

    def feed(self, data: bytes) -> bytes | None:
        """Take one message; return the answer, or None when done. Raises HandshakeRefused."""
        if self._failed or self.done:
            raise HandshakeRefused("this handshake has ended")
        try:
            message = self._decode(data)
            if self._responder is None:
                return self._prove(message, data)
            self._finish(message)
            return None
        except (HandshakeRefused, RecursionError) as reason:
            raise self._failed_by(reason) from None

    def _prove(self, message: dict[str, Any], data: bytes) -> bytes:
        challenge = message.get("challenge")
        if not isinstance(challenge, dict):
            raise HandshakeRefused("the peer does not speak the raymoe handshake")
        peer = self._introduced(challenge)
        expected = self._expect_incarnation
        if expected is not None and peer.incarnation != expected:
            raise HandshakeRefused(
                f"incarnation differs: expected {expected}, the peer's is {peer.incarnation}"
            )
        self._responder = peer
        self._absorb(data)
        mac = self._mac("initiator", self._offer)
        return self._encode({"proof": {"offer": self._offer, "mac": mac}})

    def _finish(self, message: dict[str, Any]) -> None:
        welcome = message.get("welcome")
        if not isinstance(welcome, dict) or not isinstance(welcome.get("terms"), dict):
            raise HandshakeRefused("the peer does not speak the raymoe handshake")
        expected = self._mac("responder", welcome["terms"])
        if not _same(expected, welcome.get("mac")):
            raise HandshakeRefused("wrong secret: the responder's proof does not verify")
        assert self._responder is not None
        self.peer = _with(self._responder, self._offer, welcome["terms"])
        self.done = True


class Responder(_Side):
    """The side that listens. `feed()` each message and send what it returns; `done` after the
    welcome. HandshakeRefused carries `refusal()` bytes worth sending before closing."""

    def __init__(
        self,
        identity: Identity,
        accepted_roles: Collection[Role],
        secret: bytes,
        *,
        role: Role = "group",
        name: str = "",
        incarnation: int = 0,
        terms: Callable[[Peer], Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(identity, role, secret, name, incarnation)
        self._accepted = accepted_roles
        self._terms = terms
        self._initiator: Peer | None = None

    def feed(self, data: bytes) -> bytes:
        """Take one message; return the answer. Raises HandshakeRefused."""
        if self._failed or self.done:
            raise HandshakeRefused("this handshake has ended")
        try:
            message = self._decode(data)
            if self._initiator is None:
                return self._challenge(message, data)
            return self._welcome(message, data)
        except (HandshakeRefused, RecursionError) as reason:
            raise self._failed_by(reason) from None

    def _challenge(self, message: dict[str, Any], data: bytes) -> bytes:
        hello = message.get("hello")
        if not isinstance(hello, dict):
            raise HandshakeRefused("the peer does not speak the raymoe handshake")
        peer = self._introduced(hello)
        if peer.role not in self._accepted:
            raise HandshakeRefused(
                f"role {peer.role!r} is not accepted here, only {', '.join(sorted(self._accepted))}"
            )
        self._initiator = peer
        self._absorb(data)
        return self._encode({"challenge": self._introduction()})

    def _welcome(self, message: dict[str, Any], data: bytes) -> bytes:
        proof = message.get("proof")
        if not isinstance(proof, dict) or not isinstance(proof.get("offer"), dict):
            raise HandshakeRefused("the peer does not speak the raymoe handshake")
        expected = self._mac("initiator", proof["offer"])
        if not _same(expected, proof.get("mac")):
            raise HandshakeRefused("wrong secret: the initiator's proof does not verify")
        assert self._initiator is not None
        self._absorb(data)
        peer = _with(self._initiator, proof["offer"], {})
        terms = dict(self._terms(peer)) if self._terms else {}
        answer = self._encode({"welcome": {"terms": terms, "mac": self._mac("responder", terms)}})
        self.peer = _with(peer, proof["offer"], terms)
        self.done = True
        return answer


def _same(expected: str, shown: Any) -> bool:
    """Whether the peer's proof is right; as bytes, for of strings only ASCII can be compared."""
    return hmac.compare_digest(expected.encode(), str(shown).encode("utf-8", "replace"))


def refusal(reason: HandshakeRefused) -> bytes:
    """The message that tells the other end why it is refused."""
    return json.dumps({"refused": str(reason)[:500]}).encode()


def _with(peer: Peer, offer: Mapping[str, Any], terms: Mapping[str, Any]) -> Peer:
    return Peer(
        role=peer.role,
        name=peer.name,
        incarnation=peer.incarnation,
        identity=peer.identity,
        offer=dict(offer),
        terms=dict(terms),
    )
