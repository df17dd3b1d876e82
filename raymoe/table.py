"""What the controller tells every client: where replicas are ready, how to reach their groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from placement.errors import PlacementError
from placement.table import Table
from raymoe.errors import FrameError
from raymoe.links.link import Endpoint


@dataclass(frozen=True, kw_only=True)
class GroupEndpoint:
    """Where one group listens. `incarnation` grows each time the group is started anew."""

    id: str
    node: str
    incarnation: int
    endpoints: tuple[Endpoint, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON- and msgpack-safe."""
        return {
            "id": self.id,
            "node": self.node,
            "incarnation": self.incarnation,
            "endpoints": [endpoint.to_dict() for endpoint in self.endpoints],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> GroupEndpoint:
        """What `to_dict` wrote. Raises FrameError when it is not."""
        try:
            return cls(
                id=str(data["id"]),
                node=str(data["node"]),
                incarnation=int(data["incarnation"]),
                endpoints=tuple(Endpoint.from_dict(e) for e in data["endpoints"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FrameError(f"not a group endpoint: {error!r}") from None


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTable:
    """One epoch: the ready replicas of every expert and the endpoints of every group.

    A group without endpoints (it is restarting) is known but not reachable.
    """

    table: Table
    endpoints: Mapping[str, GroupEndpoint]

    @property
    def order(self) -> tuple[int, int]:
        """Newer routing tables compare greater: (term, epoch)."""
        return self.table.order

    def to_dict(self) -> dict[str, Any]:
        """JSON- and msgpack-safe."""
        return {
            "table": self.table.to_dict(),
            "endpoints": [self.endpoints[i].to_dict() for i in sorted(self.endpoints)],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RoutingTable:
        """What `to_dict` wrote. Raises FrameError when it is not."""
        try:
            endpoints = [GroupEndpoint.from_dict(e) for e in data["endpoints"]]
            return cls(table=Table.from_dict(data["table"]), endpoints={e.id: e for e in endpoints})
        except (KeyError, TypeError, PlacementError) as error:
            raise FrameError(f"not a routing table: {error!r}") from None
