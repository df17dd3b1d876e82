"""The exceptions raymoe raises on purpose.

    RaymoeError
    |- ConfigError           a setting is impossible; the sentence says which and what to do
    |- CheckpointError       the checkpoint is missing, corrupt, not an MoE, or not supported
    |- LinkError             the data plane between a client and a group
    |  |- HandshakeRefused   the other end is not ours (secret, version, model, dtype, role)
    |  |- FrameError         a frame that is not well-formed, or longer than it may be
    |  `- PeerLost           the other end is gone, or is taken for gone
    |- ExpertsUnavailable    no ready replica of an expert answered in time
    |- RequestError          a client's request cannot be served as it stands (HTTP 400)
    |- Overloaded            the queue is full; try again later (HTTP 429)
    `- RouterUnavailable     no router can take the request (HTTP 503)

Every argument reaches `Exception.__init__` and `__str__` makes the sentence, so that errors
survive pickling between Ray processes.
"""

from __future__ import annotations


class RaymoeError(Exception):
    """Base of every error raised on purpose."""


class ConfigError(RaymoeError):
    """A setting is impossible. One argument: the sentence that says which, and what to do."""


class CheckpointError(RaymoeError):
    """A checkpoint cannot be served. One argument: the sentence that says why, naming the path."""


class LinkError(RaymoeError):
    """Something went wrong between a client and a group."""


class HandshakeRefused(LinkError):
    """The peer was refused, or refused us. One argument: the reason, naming both values."""


class FrameError(LinkError):
    """A frame is malformed or longer than agreed. One argument: what was wrong."""


class PeerLost(LinkError):
    """The connection to a peer has ended. Arguments: the peer's name, and why."""

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(peer, why)
        self.peer = peer
        self.why = why

    def __str__(self) -> str:
        return f"lost {self.peer}: {self.why}"


class ExpertsUnavailable(RaymoeError):
    """No ready replica answered for some experts of a layer within the stall limit."""

    def __init__(self, layer: int, experts: tuple[int, ...], waited_s: float) -> None:
        super().__init__(layer, experts, waited_s)
        self.layer = layer
        self.experts = experts
        self.waited_s = waited_s

    def __str__(self) -> str:
        shown = ", ".join(map(str, self.experts[:8])) + (", ..." if len(self.experts) > 8 else "")
        return (
            f"no ready replica of {len(self.experts)} expert(s) of MoE layer {self.layer} "
            f"({shown}) answered within {self.waited_s:.1f} s"
        )


class RequestError(RaymoeError):
    """A client's request cannot be served as it stands. Arguments: the sentence, the field."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message, field)
        self.message = message
        self.field = field

    def __str__(self) -> str:
        return self.message


class Overloaded(RaymoeError):
    """The queue is full. Arguments: the sentence, and after how many seconds to try again."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s)
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return self.message


class RouterUnavailable(RaymoeError):
    """No router can take or finish the request. One argument: the sentence."""
