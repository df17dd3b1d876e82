"""Settings of one engine."""

from __future__ import annotations

from dataclasses import dataclass

from raymoe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Frozen settings; impossible ones raise `ConfigError` at once."""

    kv_bytes: int = 1 << 28  # budget of the KV cache, in bytes
    compiled: bool = True  # attention of decoding tokens in C, where there is a compiler
    lanes_share: float = 0.25  # without it: of kv_bytes, for copies that decode faster; 0: none
    block_tokens: int = 16  # tokens of one KV block
    max_batch: int = 64  # requests that run at once
    chunk_tokens: int = 256  # prompt tokens prefilled in one step, over all requests
    microbatch_tokens: int = 0  # steps of two of so many run as two in turns; 0: never
    prefix_cache: bool = True  # prompts that begin alike share KV blocks
    max_context: int | None = None  # None: what the checkpoint says
    max_waiting: int = 4096  # requests queued before `Overloaded`
    stall_end_s: float = 600.0  # a request whose experts are away for so long ends; 0: at once
    stall_pause_s: float = 0.05  # between two tries of a stalled step, where experts do not wait

    def __post_init__(self) -> None:
        for name in ("kv_bytes", "block_tokens", "max_batch", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.lanes_share < 1:
            raise ConfigError(f"lanes_share must be from 0 to below 1, not {self.lanes_share}")
        for name in ("max_waiting", "microbatch_tokens", "stall_end_s", "stall_pause_s"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.max_context is not None and self.max_context < 2:
            raise ConfigError(f"max_context must be at least 2, not {self.max_context}")
