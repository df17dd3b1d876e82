"""The Placement service: the fleet, and where experts are and why."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from raymoe.errors import RaymoeError
from raymoe.gateway.errors import ApiError
from raymoe.rpc import raymoe_pb2 as pb
from raymoe.rpc.generation import refuse
from raymoe.rpc.raymoe_pb2_grpc import PlacementServicer

Ask = Callable[[], Awaitable[Mapping[str, Any]]]
_GROUP = ("id", "kind", "state", "node", "speed", "memory_bytes", "resident_bytes")
_ROW = (*_GROUP, "replicas", "deaths")


class Placement(PlacementServicer):
    """`status` and `placement` give what GET /status and GET /placement do."""

    def __init__(self, status: Ask, placement: Ask) -> None:
        self._status, self._placement = status, placement

    async def GetStatus(self, request: Any, context: Any) -> Any:
        """Status."""
        try:
            status = await self._status()
        except RaymoeError as error:
            await refuse(context, error)
        answer = pb.Status(
            **{name: status[name] for name in ("deployment", "model", "ready", "term", "epoch")},
            groups=[pb.Group(**{name: g[name] for name in _ROW}) for g in status["groups"]],
            routers=[pb.Router(id=r["id"], state=r["state"]) for r in status["routers"]],
        )
        if status["balancedness"] is not None:
            answer.balancedness = status["balancedness"]
        return answer

    async def GetLayer(self, request: Any, context: Any) -> Any:
        """Layer."""
        try:
            placement = await self._placement()
            count = len(placement["layers"])
            if request.layer >= count:
                raise ApiError(404, f"there is no MoE layer {request.layer}: there are {count}")
        except (RaymoeError, ApiError) as error:
            await refuse(context, error)
        return pb.Layer(
            layer=request.layer,
            epoch=placement["epoch"],
            experts=[
                pb.Expert(
                    expert=row["expert"],
                    load=row["load"],
                    replicas=[pb.Replica(**replica) for replica in row["replicas"]],
                )
                for row in placement["layers"][request.layer]["experts"]
            ],
        )
