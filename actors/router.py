"""The router actor: the dense part, the gate and continuous batching in one engine thread."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from dataclasses import asdict
from typing import Any

import ray
import torch

from actors.controller import ensure_controller, find_controller
from raymoe.checkpoint.dense import load_dense
from raymoe.checkpoint.spec import ModelSpec
from raymoe.client import ClientConfig, ExpertClient
from raymoe.config import DeploymentConfig, read_secret
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
from raymoe.identity import identity_of
from raymoe.logs import configure
from raymoe.observe.lives import Lives
from raymoe.requests import GenerationRequest
from raymoe.stream.messages import ModelInfo
from raymoe.stream.server import StreamConfig, StreamServer
from raymoe.tracing import from_environment

_BEAT_S = 1.0
_BLIP_S = 0.25  # a step waits so long for experts; then it goes on without who needs them
log = logging.getLogger("raymoe.router")


class Router:
    """One engine with its client of the expert groups and its token stream to the gateways."""

    def __init__(self, config: dict[str, Any], spec_json: str) -> None:
        torch.set_num_threads(1)
        self._config = DeploymentConfig.model_validate(config)
        configure(self._config.logging, "router", self._config.name, self._surroundings)
        spec = ModelSpec.from_json(spec_json)
        ensure_controller(self._config, spec_json)
        identity, secret = identity_of(self._config, spec), read_secret(self._config)
        context = ray.get_runtime_context()
        self.node = str(context.get_node_id())
        self.router_id = f"router-{os.getpid()}-{self.node[:6]}"
        plane, settings = self._config.data_plane, self._config.routers
        self._experts = ExpertClient(
            identity=identity,
            secret=secret,
            node=self.node,
            name=self.router_id,
            config=ClientConfig(mode=plane.mode, stall_limit_s=min(plane.stall_limit_s, _BLIP_S)),
        )
        tracing = from_environment("router", self._config.name)
        lines = self._config.logging.requests
        watched = lines or tracing is not None
        self._tracing = tracing
        self._lives = Lives(self._experts.stats, tracing, lines=lines) if watched else None
        experts = SettingAside(self._experts)
        self._control = ControlClient(
            identity=identity,
            secret=secret,
            name=self.router_id,
            resolve=self._controller_address,
            client=self._experts,
        )
        self._control.start()
        self._await_experts(self._config.placement.load_timeout_s)
        check_device(settings.device, settings.kv_bytes, self.router_id)
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
                prefix_cache=settings.prefix_cache,
                max_context=settings.max_context_tokens,
                max_waiting=settings.max_waiting,
                stall_end_s=plane.stall_limit_s,
            ),
            grammars=LateGrammars(
                lambda: GatewayTokenizer.load(spec.path).grammar_start(vocab, eos_ids(model))
            ),
        )
        self._work = threading.Event()
        self._stopping = threading.Event()
        self._died: str | None = None
        self._stream = StreamServer(
            router_id=self.router_id,
            model=ModelInfo(
                name=self._config.served_model_name,
                vocab=vocab,
                context_tokens=self._engine.max_context,
                kv_capacity_tokens=self._engine.pool.capacity_tokens,
                eos_ids=tuple(sorted(self._engine.eos_ids)),
            ),
            identity=identity,
            secret=secret,
            submitted=self._submit,
            cancelled=self._cancel,
            load=self._engine.load,
            node=self.node,
            config=StreamConfig(
                tcp_host=ray.util.get_node_ip_address() if plane.host == "node" else plane.host
            ),
        )
        self._stream.start()
        for target in (self._steps, self._beats):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def check_health(self) -> None:
        """Raises when the engine thread has ended: Ray Serve then replaces this router."""
        if self._died is not None:
            raise RuntimeError(f"the engine of {self.router_id} died: {self._died}")

    def close(self) -> None:
        """Ends the engine thread, the stream and the links."""
        self._stopping.set()
        self._work.set()
        self._stream.close()
        self._control.close()
        self._experts.close()
        if self._lives is not None:
            self._lives.close()
        if self._tracing is not None:
            self._tracing.close()

    def _surroundings(self) -> dict[str, Any]:
        """What is true of every line that this process logs."""
        term, epoch = self._experts.epoch or (None, None)
        return {"router": self.router_id, "term": term, "epoch": epoch}

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

    # ---- the stream's thread

    def _submit(self, request: GenerationRequest) -> None:
        lives = self._lives
        if lives is not None:
            lives.came(request)
        try:
            self._engine.add(request)
        except BaseException:
            if lives is not None:
                lives.refused(request.request_id)
            raise
        self._work.set()

    def _cancel(self, request_ids: tuple[str, ...]) -> None:
        for request_id in request_ids:
            self._engine.cancel(request_id)
        self._work.set()

    # ---- the engine's thread

    def _steps(self) -> None:
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
                events = self._engine.step()
                self._stream.publish(events)
                if self._lives is not None:
                    self._lives.heard(events)
        except Exception as e:
            log.exception("the engine of %s died", self.router_id)
            self._died = repr(e)
            self._stream.close()  # its gateways go on elsewhere

    # ---- the thread that talks to the controller

    def _beats(self) -> None:
        while not self._stopping.wait(_BEAT_S):
            try:
                info = self._info()
                ray.get(find_controller(self._config.name).router_beat.remote(info), timeout=5)
            except (ValueError, ray.exceptions.RayError):
                continue  # it restarts; the next beat tells it again
            except Exception:
                log.exception("a beat of %s failed", self.router_id)

    def _info(self) -> dict[str, Any]:
        return {
            "id": self.router_id,
            "pid": os.getpid(),
            "node": self.node,
            "state": "failed" if self._died else "ready",
            "endpoint": self._stream.endpoint.to_dict(),
            "profile": {
                **asdict(self._engine.stats),
                **asdict(self._experts.stats),
                "kv_used_blocks": self._engine.pool.used,
                "kv_blocks": self._engine.pool.blocks - 1,  # block 0 is padding
            },
        }

    def _controller_address(self) -> tuple[str, int]:
        controller = find_controller(self._config.name)
        host, port = ray.get(controller.control_address.remote(), timeout=5)
        return str(host), int(port)
