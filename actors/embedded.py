"""The embedded engine as a router runs it: transformers' dense part over a client of the groups."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from raymoe.checkpoint.dense import load_dense
from raymoe.checkpoint.spec import ModelSpec
from raymoe.client import ClientConfig, ExpertClient
from raymoe.config import DeploymentConfig, RoutersConfig
from raymoe.control import ControlClient
from raymoe.engine.aside import SettingAside
from raymoe.engine.config import EngineConfig
from raymoe.engine.engine import Engine
from raymoe.engine.facts import eos_ids
from raymoe.engine.hosted import HostedExperts
from raymoe.errors import RouterUnavailable
from raymoe.experts.devices import check_device
from raymoe.gateway.tokenizer import GatewayTokenizer
from raymoe.grammar.state import LateGrammars
from raymoe.links.handshake import Identity
from raymoe.requests import GenerationRequest, TokenEvent
from raymoe.stream.messages import ModelInfo

log = logging.getLogger("raymoe.router")
_BLIP_S = 0.25  # a step waits so long for experts; then it goes on without who needs them


def _microbatch_tokens(settings: RoutersConfig) -> int:
    """Measured on CPUs only (docs/decisions/0010): elsewhere it is asked for."""
    if settings.microbatch_tokens is not None:
        return settings.microbatch_tokens
    return 128 if settings.device == "cpu" else 0


class EmbeddedEngine:
    """One engine, in a thread of its own, with its client and control connection."""

    def __init__(
        self,
        config: DeploymentConfig,
        spec: ModelSpec,
        *,
        identity: Identity,
        secret: bytes,
        name: str,
        node: str,
        controller: Callable[[], tuple[str, int]],
    ) -> None:
        """`controller()` says where the controller's control end is now."""
        plane, settings = config.data_plane, config.routers
        self._experts = ExpertClient(
            identity=identity,
            secret=secret,
            node=node,
            name=name,
            config=ClientConfig(mode=plane.mode, stall_limit_s=min(plane.stall_limit_s, _BLIP_S)),
        )
        experts = SettingAside(self._experts)
        self._control = ControlClient(
            identity=identity, secret=secret, name=name, resolve=controller, client=self._experts
        )
        self._control.start()
        self._await_experts(config.placement.load_timeout_s)
        check_device(settings.device, settings.kv_bytes, name)
        there = experts if settings.device == "cpu" else HostedExperts(experts, settings.device)
        model: Any = load_dense(spec, there, dtype=settings.dtype, device=settings.device)
        vocab = model.config.get_text_config().vocab_size
        self._engine = Engine(
            model,
            experts,
            EngineConfig(
                kv_bytes=settings.kv_bytes,
                block_tokens=settings.block_tokens,
                max_batch=settings.max_batch,
                chunk_tokens=settings.chunk_tokens,
                microbatch_tokens=_microbatch_tokens(settings),
                prefix_cache=settings.prefix_cache,
                max_context=settings.max_context_tokens,
                max_waiting=settings.max_requests - settings.max_batch,
                stall_end_s=plane.stall_limit_s,
            ),
            grammars=LateGrammars(
                lambda: GatewayTokenizer.load(spec.path).grammar_start(vocab, eos_ids(model))
            ),
        )
        self.model = ModelInfo(
            name=config.served_model_name,
            vocab=vocab,
            context_tokens=self._engine.max_context,
            kv_capacity_tokens=self._engine.pool.capacity_tokens,
            eos_ids=tuple(sorted(self._engine.eos_ids)),
        )
        self.died: str | None = None
        self.client = self._experts.stats
        self._name = name
        self._work = threading.Event()
        self._stopping = threading.Event()

    def _await_experts(self, limit_s: float) -> None:
        """This router is there for Serve, and so for readiness probes, once it reaches every expert
        that the table calls ready; of those that were lost the controller knows."""
        deadline = time.monotonic() + limit_s
        while (missing := self._experts.out_of_reach()) != 0:
            if time.monotonic() > deadline:
                raise RouterUnavailable(
                    f"no placement table within {limit_s:.0f} s: {self._control.last_error}"
                    if missing is None
                    else f"{missing} experts cannot be reached after {limit_s:.0f} s; only the "
                    f"groups {', '.join(self._experts.connected()) or '(none)'} answer"
                )
            time.sleep(0.05)

    def start(
        self, publish: Callable[[Sequence[TokenEvent]], None], on_death: Callable[[], None]
    ) -> None:
        """From now on requests may come; `on_death` is called once if the engine ends by itself."""
        threading.Thread(
            target=self._steps, args=(publish, on_death), name="steps", daemon=True
        ).start()

    def submit(self, request: GenerationRequest) -> None:
        """Raises RequestError for one that can never run, and Overloaded."""
        self._engine.add(request)
        self._work.set()

    def cancel(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._engine.cancel(request_id)
        self._work.set()

    @property
    def epoch(self) -> tuple[int, int] | None:
        """(term, epoch) of the table in use."""
        return self._experts.epoch

    def load(self) -> tuple[int, int]:
        """Requests that run, and requests that wait to."""
        return self._engine.load()

    def profile(self) -> dict[str, Any]:
        """Totals of the engine and of its client."""
        return {
            **asdict(self._engine.stats),
            **asdict(self._experts.stats),
            "kv_used_blocks": self._engine.pool.used,
            "kv_blocks": self._engine.pool.blocks - 1,  # block 0 is padding
        }

    def close(self) -> None:
        """Ends the engine thread and the links."""
        self._stopping.set()
        self._work.set()
        self._control.close()
        self._experts.close()

    def _steps(
        self, publish: Callable[[Sequence[TokenEvent]], None], on_death: Callable[[], None]
    ) -> None:
        # transformers, torch and Ray are 400,000 objects that never go: a full collection over
        # them is a pause of 240 ms (busy machine), none without them.
        gc.collect()
        gc.freeze()
        try:
            while not self._stopping.is_set():
                if not self._engine.has_work:
                    self._work.wait()
                    self._work.clear()
                    continue
                publish(self._engine.step())
        except Exception as e:
            if self._stopping.is_set():  # the links were closed under its last step
                return
            log.exception("the engine of %s died", self._name)
            self.died = repr(e)
            on_death()
