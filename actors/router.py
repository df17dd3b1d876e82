"""The router actor: an engine with its token stream to the gateways."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ray
import torch

from actors.controller import ensure_controller, find_controller
from actors.hung import HungController
from actors.leaving import leave
from actors.router_scaling import REQUESTS
from actors.spawn import place_of
from raymoe.checkpoint.spec import ModelSpec
from raymoe.client.stats import ClientStats
from raymoe.config import DeploymentConfig, read_secret
from raymoe.identity import identity_of
from raymoe.logs import configure
from raymoe.observe.lives import Lives
from raymoe.requests import GenerationRequest, TokenEvent
from raymoe.stream.messages import ModelInfo
from raymoe.stream.server import StreamConfig, StreamServer
from raymoe.tracing import from_environment

_BEAT_S = 1.0
_ASK_S = 5.0
log = logging.getLogger("raymoe.router")


class RouterEngine(Protocol):
    """What makes tokens: the dense part, the gate and continuous batching over remote experts.

    `submit`, `cancel` and `load` are called in the stream's thread and return at once; `died` says
    why it has ended by itself, `epoch` which table is in use, `client` what its exchange with the
    groups came to (zeros when another process knows it).
    """

    model: ModelInfo
    died: str | None
    client: ClientStats

    @property
    def epoch(self) -> tuple[int, int] | None: ...

    def start(
        self, publish: Callable[[Sequence[TokenEvent]], None], on_death: Callable[[], None]
    ) -> None: ...
    def submit(self, request: GenerationRequest) -> None: ...
    def cancel(self, request_ids: Sequence[str]) -> None: ...
    def load(self) -> tuple[int, int]: ...
    def profile(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class Router:
    """One engine and its token stream. Which engine, the settings say."""

    def __init__(self, config: dict[str, Any], spec_json: str) -> None:
        torch.set_num_threads(1)
        self._config = DeploymentConfig.model_validate(config)
        configure(self._config.logging, "router", self._config.name, self._surroundings)
        spec = ModelSpec.from_json(spec_json)
        ensure_controller(self._config, spec_json)
        self.node = str(ray.get_runtime_context().get_node_id())
        self.router_id = f"router-{os.getpid()}-{self.node[:6]}"
        self._stopping = threading.Event()
        self._leaving = False
        self._engine = self._make_engine(spec)
        tracing = from_environment("router", self._config.name)
        lines = self._config.logging.requests
        watched = lines or tracing is not None
        self._tracing = tracing
        self._lives = Lives(self._engine.client, tracing, lines=lines) if watched else None
        plane = self._config.data_plane
        self._stream = StreamServer(
            router_id=self.router_id,
            model=self._engine.model,
            identity=identity_of(self._config, spec),
            secret=read_secret(self._config),
            submitted=self._submit,
            cancelled=self._engine.cancel,
            load=self._engine.load,
            node=self.node,
            config=StreamConfig(
                tcp_host=ray.util.get_node_ip_address() if plane.host == "node" else plane.host
            ),
        )
        self._stream.start()
        # A dead engine's gateways go on elsewhere.
        self._engine.start(self._publish, self._stream.close)
        self._hung = HungController()
        self._beating = threading.Thread(target=self._beats, name="beats", daemon=True)
        self._beating.start()

    def check_health(self) -> None:
        """Raises when the engine has ended: Ray Serve then replaces this router."""
        if self._engine.died is not None:
            raise RuntimeError(f"the engine of {self.router_id} died: {self._engine.died}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What Ray Serve asks for now and then when routers scale (`actors.router_scaling`)."""
        running, waiting = self._engine.load()
        return {REQUESTS: float(running + waiting)}

    async def leave(self) -> None:
        """Ends without losing a request: `actors.leaving`, then `close`."""
        self._leaving = True
        began = time.monotonic()
        given = 0
        if self._engine.died is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(self._beat), _ASK_S)
            given = await leave(self._stream, self._others, self._config.routers.drain_s)
        seconds = time.monotonic() - began
        log.info("%s leaves after %.1f s, %d requests given away", self.router_id, seconds, given)
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Ends the stream, the engine and the links."""
        self._stopping.set()
        self._stream.close()
        self._engine.close()
        self._beating.join(_ASK_S)  # its last words: that this router is gone
        if self._lives is not None:
            self._lives.close()
        if self._tracing is not None:
            self._tracing.close()

    def _surroundings(self) -> dict[str, Any]:
        """What is true of every line that this process logs."""
        term, epoch = self._engine.epoch or (None, None)
        return {"router": self.router_id, "term": term, "epoch": epoch}

    def __del__(self) -> Coroutine[None, None, None] | None:
        """How Ray Serve ends a replica: it calls this, waits for what it returns (for
        `graceful_shutdown_timeout_s`), then kills the process."""
        if not hasattr(self, "_beating") or self._stopping.is_set():
            return None
        return self.leave()

    def _make_engine(self, spec: ModelSpec) -> RouterEngine:
        config = self._config
        if config.engine == "vllm":
            from raymoe.vllm_plugin.engine import VllmEngine

            return VllmEngine(
                config,
                spec,
                name=self.router_id,
                node=self.node,
                folder=Path(tempfile.mkdtemp(prefix="vllm-", dir=_session_folder())),
                controller=self._controller_address,
            )
        from actors.embedded import EmbeddedEngine  # transformers: only where it is needed

        return EmbeddedEngine(
            config,
            spec,
            identity=identity_of(config, spec),
            secret=read_secret(config),
            name=self.router_id,
            node=self.node,
            controller=self._controller_address,
        )

    def _submit(self, request: GenerationRequest) -> None:
        """The stream's thread."""
        lives = self._lives
        if lives is not None:
            lives.came(request)
        try:
            self._engine.submit(request)
        except BaseException:
            if lives is not None:
                lives.refused(request.request_id)
            raise

    def _publish(self, events: Sequence[TokenEvent]) -> None:
        """The engine's thread: what a step has made."""
        self._stream.publish(events)
        if self._lives is not None:
            self._lives.heard(events)

    # ---- the thread that talks to the controller

    def _beats(self) -> None:
        while not self._stopping.wait(_BEAT_S):
            self._beat()
        self._beat()

    def _beat(self) -> None:
        try:
            info = self._info()
            controller = find_controller(self._config.name)
            try:
                ray.get(controller.router_beat.remote(info), timeout=_ASK_S)
            except ray.exceptions.GetTimeoutError:
                self._hung.silent(_ASK_S, partial(place_of, controller))
            else:
                self._hung.answered()
        except (ValueError, ray.exceptions.RayError):
            self._hung.answered()  # it restarts; the next beat tells it again
        except Exception:
            log.exception("a beat of %s failed", self.router_id)

    async def _others(self) -> bool:
        """Whether another router takes requests, as far as the controller answers."""

        def ask() -> list[dict[str, Any]]:
            controller = find_controller(self._config.name)  # may wait for ever for Ray's head
            return list(ray.get(controller.routers.remote(), timeout=_ASK_S))

        try:
            routers = await asyncio.wait_for(asyncio.to_thread(ask), _ASK_S)
        except (ValueError, TimeoutError, ray.exceptions.RayError):
            return False
        return any(r["state"] == "ready" and r["id"] != self.router_id for r in routers)

    def _state(self) -> str:
        if self._engine.died:
            return "failed"
        return "draining" if self._leaving else "ready"

    def _info(self) -> dict[str, Any]:
        if self._stopping.is_set():
            return {"id": self.router_id, "state": "gone"}
        return {
            "id": self.router_id,
            "pid": os.getpid(),
            "node": self.node,
            "state": self._state(),
            "endpoint": self._stream.endpoint.to_dict(),
            "profile": self._engine.profile(),
        }

    def _controller_address(self) -> tuple[str, int]:
        controller = find_controller(self._config.name)
        host, port = ray.get(controller.control_address.remote(), timeout=5)
        return str(host), int(port)


def _session_folder() -> str | None:
    """Ray's folder of this session: what a killed router leaves there goes with it."""
    node = ray._private.worker._global_node
    return None if node is None else str(node.get_session_dir_path())
