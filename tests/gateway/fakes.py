"""Routers without a model: the real stream server, tokens a function of the request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from raymoe.errors import RaymoeError
from raymoe.links.handshake import Identity
from raymoe.requests import GenerationRequest, TokenEvent, TokenLogprobs
from raymoe.stream import ModelInfo, StreamConfig, StreamServer

SECRET = b"a secret of the tests, 32 bytes."
IDENTITY = Identity(deployment="test", fingerprint="f00d")
Script = Callable[[GenerationRequest], list[int]]


@dataclass
class _Running:
    request: GenerationRequest
    tokens: list[int]
    made: int


@dataclass
class FakeRouter:
    """Emits one token a request and step, as an engine would.

    script(request) gives the whole output of a request, output made elsewhere included; after it
    comes the end: "stop" when the last token is one of eos_ids, else "length".
    """

    script: Script
    router_id: str = "router-0"
    vocab: int = 512
    context_tokens: int = 64
    kv_capacity_tokens: int = 1 << 20
    eos_ids: tuple[int, ...] = ()
    step_s: float = 0.0
    unix: bool = True
    refuse: RaymoeError | None = None
    config: StreamConfig | None = None
    seen: list[GenerationRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._running: dict[str, _Running] = {}
        self._lock = threading.Condition()
        self._stopping = False
        self.paused = False
        self.asked = 0  # requests sent here, refused ones as well
        self.server = StreamServer(
            router_id=self.router_id,
            model=ModelInfo(
                name="tiny",
                vocab=self.vocab,
                context_tokens=self.context_tokens,
                kv_capacity_tokens=self.kv_capacity_tokens,
                eos_ids=self.eos_ids,
            ),
            identity=IDENTITY,
            secret=SECRET,
            submitted=self._submit,
            cancelled=self._cancel,
            node="here",
            config=self.config or StreamConfig(unix=self.unix, heartbeat_s=0.1),
        )
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> FakeRouter:
        self.server.start()
        self._thread.start()
        return self

    def close(self) -> None:
        """As when the process dies: every connection ends at once."""
        with self._lock:
            self._stopping = True
            self._lock.notify()
        self._thread.join()
        self.server.close()

    @property
    def running(self) -> int:
        return len(self._running)

    def pause(self, paused: bool) -> None:
        with self._lock:
            self.paused = paused
            self._lock.notify()

    def step(self) -> int:
        """One engine step; how many events it made."""
        events = []
        with self._lock:
            for running in tuple(self._running.values()):
                events.append(self._advance(running))
                if events[-1].finish is not None:
                    del self._running[running.request.request_id]
        self.server.publish(events)
        return len(events)

    def _submit(self, request: GenerationRequest) -> None:
        self.asked += 1
        if self.refuse is not None:
            raise self.refuse
        with self._lock:
            self.seen.append(request)
            tokens = self.script(request)[: request.sampling.max_tokens]
            self._running[request.request_id] = _Running(request, tokens, len(request.output_ids))
            self._lock.notify()

    def _cancel(self, request_ids: tuple[str, ...]) -> None:
        with self._lock:
            self.cancelled.extend(request_ids)
            for request_id in request_ids:
                self._running.pop(request_id, None)

    def _run(self) -> None:
        while True:
            with self._lock:
                while not self._stopping and (self.paused or not self._running):
                    self._lock.wait()
                if self._stopping:
                    return
            self.step()
            if self.step_s:
                time.sleep(self.step_s)

    def _advance(self, running: _Running) -> TokenEvent:
        request, sampling = running.request, running.request.sampling
        tokens = tuple(running.tokens[running.made : running.made + 1])
        running.made += len(tokens)
        finish = None
        if running.made >= len(running.tokens):
            ended = bool(running.tokens) and running.tokens[-1] in self.eos_ids
            finish = "stop" if ended and not sampling.ignore_eos else "length"
        first = running.made - len(tokens) == len(request.output_ids)
        wants_prompt = sampling.prompt_logprobs is not None and first
        return TokenEvent(
            request_id=request.request_id,
            token_ids=tokens,
            logprobs=tuple(
                logprobs_of(token, sampling.logprobs)
                for token in tokens
                if sampling.logprobs is not None
            ),
            prompt_logprobs=tuple(
                logprobs_of(token, sampling.prompt_logprobs) for token in request.prompt_ids[1:]
            )
            if wants_prompt
            else (),
            finish=finish,
        )


def logprobs_of(token: int, top: int | None) -> TokenLogprobs:
    """Made up, and the same everywhere: the token's is -token / 100, the top ones are below."""
    likeliest = tuple((token + i, -(token + i) / 100) for i in range(top or 0))
    return TokenLogprobs(token=-token / 100, top=likeliest)
