"""The gRPC server of a gateway: both services, health and reflection, in the gateway's loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from raymoe.errors import ConfigError
from raymoe.gateway.routes import Serving
from raymoe.rpc import raymoe_pb2 as pb
from raymoe.rpc.generation import Generation
from raymoe.rpc.placement import Ask, Placement
from raymoe.rpc.raymoe_pb2_grpc import (
    add_GenerationServicer_to_server,
    add_PlacementServicer_to_server,
)

_LOOK_S = 0.5
_GRACE_S = 3.0
_SERVICES = tuple(service.full_name for service in pb.DESCRIPTOR.services_by_name.values())
_STATUS = health_pb2.HealthCheckResponse.ServingStatus


class RpcServer:
    """Listens on `address` ("host:port", port 0: any; then `port` tells which).

    shared: several gateways of a node listen on one port (SO_REUSEPORT), the kernel spreads
    connections over them; else a port in use is an error.
    Generation is healthy when a router can be reached; Placement always is.
    """

    def __init__(
        self,
        address: str,
        serving: Serving,
        status: Ask,
        placement: Ask,
        *,
        most_bytes: int,
        shared: bool = False,
    ) -> None:
        self._backend_ready: Callable[[], bool] = lambda: serving.backend.ready
        options = (
            ("grpc.so_reuseport", int(shared)),
            ("grpc.max_receive_message_length", most_bytes),
        )
        self._server = grpc.aio.server(options=options)
        generation, placing = Generation(serving), Placement(status, placement)
        add_GenerationServicer_to_server(generation, self._server)  # type: ignore[no-untyped-call]
        add_PlacementServicer_to_server(placing, self._server)  # type: ignore[no-untyped-call]
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*_SERVICES, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name)
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._server)
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as e:
            raise ConfigError(
                f"cannot listen for gRPC on {address}: choose another gateway.grpc_port, or stop "
                "what uses it"
            ) from e

    async def run(self) -> None:
        """Serves until cancelled; open calls then have some seconds to end."""
        await self._server.start()
        try:
            while True:
                await self._tell_health()
                await asyncio.sleep(_LOOK_S)
        finally:
            await asyncio.shield(self._server.stop(_GRACE_S))

    async def _tell_health(self) -> None:
        ready = self._backend_ready()
        for name in ("", *_SERVICES):
            well = ready or name.endswith("Placement")
            await self._health.set(name, _STATUS.SERVING if well else _STATUS.NOT_SERVING)
