"""The gateway's shell: the HTTP application, told by Ray where routers and controller are."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from actors.controller import find_controller
from actors.metrics import Scrapes, StatusCache
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig, read_admin_token, read_secret
from raymoe.errors import RaymoeError, RouterUnavailable
from raymoe.gateway import AppConfig, GatewayTokenizer, PoolConfig, RouterPool, create_app
from raymoe.gateway.admin import add_admin_routes
from raymoe.gateway.life import Watching
from raymoe.gateway.metrics import Registry
from raymoe.identity import identity_of
from raymoe.logs import configure
from raymoe.stream.messages import StreamEndpoint
from raymoe.tracing import from_environment
from raymoe.ui.hub import Hub
from raymoe.ui.routes import add_page

log = logging.getLogger("raymoe.gateway")
_ASK_S = 5.0


class ControllerProxy:
    """The controller, found by name anew after each failure; it may be restarting."""

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment
        self._handle: Any = None

    async def ask(self, method: str, *args: Any) -> Any:
        """Result of a method. Raises RouterUnavailable with what went wrong."""
        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(find_controller, self._deployment)
            return await asyncio.wait_for(getattr(self._handle, method).remote(*args), _ASK_S)
        except (ValueError, TimeoutError, ray.exceptions.RayError) as e:
            self._handle = None
            raise RouterUnavailable(f"the placement controller does not answer: {e!r}") from e


class RouterDirectory:
    """The routers' stream endpoints; the last known ones while the controller is away."""

    def __init__(self, controller: ControllerProxy) -> None:
        self._controller = controller
        self._known: list[StreamEndpoint] = []

    async def __call__(self) -> Sequence[StreamEndpoint]:
        try:
            routers = await self._controller.ask("routers")
        except RaymoeError:
            return self._known
        self._known = [
            StreamEndpoint.from_dict(r["endpoint"]) for r in routers if r["state"] == "ready"
        ]
        return self._known


async def serve_rpc(app: FastAPI, config: DeploymentConfig, controller: ControllerProxy) -> None:
    """gRPC until cancelled; without its packages or port HTTP is served all the same."""
    try:
        from raymoe.rpc.server import RpcServer

        host, port = config.gateway.host, config.gateway.grpc_port
        server = RpcServer(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            app.state.serving,
            partial(controller.ask, "status"),
            partial(controller.ask, "placement"),
            most_bytes=AppConfig.max_body_bytes,
            shared=config.gateway.count > 1,
        )
    except ImportError as e:
        log.error("no gRPC: %s; install it with pip install 'raymoe[grpc]'", e)
    except RaymoeError as e:
        log.error("no gRPC: %s", e)
    else:
        await server.run()


def watching(config: DeploymentConfig) -> Watching:
    """Logs and traces of this process, as configured."""
    configure(config.logging, "gateway", config.name)
    tracing = from_environment("gateway", config.name)
    return Watching(tracing=tracing, lines=config.logging.requests)


def gateway_app(config: dict[str, Any], spec_json: str) -> FastAPI:
    """The ASGI application of one gateway replica."""
    checked = DeploymentConfig.model_validate(config)
    watched = watching(checked)
    spec = ModelSpec.from_json(spec_json)
    controller = ControllerProxy(checked.name)
    pool = RouterPool(
        RouterDirectory(controller),
        identity=identity_of(checked, spec),
        secret=read_secret(checked),
        node=str(ray.get_runtime_context().get_node_id()),
        name=f"gateway-{os.getpid()}",
        config=PoolConfig(
            max_in_flight=checked.gateway.max_in_flight,
            router_wait_s=checked.gateway.router_wait_s,
        ),
    )
    cached = StatusCache(lambda: controller.ask("status"))
    scrapes = Scrapes(secrets.token_hex(8), partial(controller.ask, "exchange"))

    async def beside(own: Registry) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(scrapes.beats(own))
                if checked.gateway.grpc_port is not None:
                    tasks.create_task(serve_rpc(app, checked, controller))
        finally:
            if watched.tracing is not None:
                await asyncio.to_thread(watched.tracing.close)

    app = create_app(
        pool,
        GatewayTokenizer.load(spec.path),
        AppConfig(
            model_name=checked.served_model_name,
            request_timeout_s=checked.gateway.request_timeout_s,
            # more at once than a router takes in would never be taken
            max_choices=min(AppConfig.max_choices, checked.routers.max_requests),
            watching=watched,
        ),
        placement=lambda: controller.ask("placement"),
        exposition=scrapes.text,
        alongside=beside,
        degraded=cached.degraded,
    )

    add_page(app, Hub(partial(controller.ask, "view")))

    @app.get("/status")
    async def status() -> Response:
        return JSONResponse(await controller.ask("status"))

    add_admin_routes(app, controller.ask, read_admin_token(checked))
    return app
