"""What gateway and router say to each other, as values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from raymoe.requests import GenerationRequest, TokenEvent


@dataclass(frozen=True, kw_only=True)
class StreamEndpoint:
    """Where a router listens for gateways.

    `unix` is the name of an abstract unix socket (no leading NUL), good on the same `node` only;
    `tcp` is "host:port". At least one is given.
    """

    router_id: str
    node: str
    unix: str | None = None
    tcp: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON- and msgpack-safe."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StreamEndpoint:
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a gateway must know of the model before it can check a request.

    vocab, context_tokens and kv_capacity_tokens are counts; `kv_capacity_tokens` is what one
    request can use of the router's KV cache at most.
    """

    name: str
    vocab: int
    context_tokens: int
    kv_capacity_tokens: int
    eos_ids: tuple[int, ...] = ()

    @property
    def longest_tokens(self) -> int:
        """Prompt and output of one request together can be this long."""
        return min(self.context_tokens, self.kv_capacity_tokens)


@dataclass(frozen=True, kw_only=True)
class Load:
    """A router's queue: requests of all gateways, and whether it takes more.

    `others` counts the open requests of the *other* gateways; a gateway knows its own exactly.
    """

    running: int = 0
    waiting: int = 0
    others: int = 0
    accepting: bool = True


@dataclass(frozen=True, kw_only=True)
class Hello:
    """The router's first frame."""

    router_id: str
    pid: int
    model: ModelInfo
    load: Load


@dataclass(frozen=True, kw_only=True)
class Submit:
    request: GenerationRequest


@dataclass(frozen=True, kw_only=True)
class Cancel:
    request_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """All of one engine step's events for one gateway; empty for a bare report of the load."""

    events: tuple[TokenEvent, ...]
    load: Load


Message = Hello | Submit | Cancel | Tokens
