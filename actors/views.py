"""What operators are shown of a deployment: plain data for the CLI, HTTP and scripts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from actors.fleet import LiveGroup
from actors.history import History
from placement.table import Table
from placement.types import Floats
from raymoe.checkpoint.spec import ModelSpec

_ROUTER_FIELDS = ("id", "pid", "node", "state", "profile")


def group_row(group: LiveGroup) -> dict[str, Any]:
    """A group in `raymoe status --json`."""
    return {
        "id": group.id,
        "kind": group.kind.kind,
        "pid": group.pid,
        "node": group.node,
        "state": group.shown_state,
        "speed": round(group.speed, 4),
        "memory_bytes": group.memory_bytes,
        "resident_bytes": group.resident_bytes,
        "replicas": int(group.resident.sum()),
        "queued_pairs": group.queued_pairs,
        "busy": round(group.busy, 3),
        "served_since": group.served_since,
        "incarnation": group.incarnation,
        "deaths": group.deaths,
        "last_error": group.last_error,
    }


def router_rows(routers: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The routers in `raymoe status --json`."""
    return [{name: router[name] for name in _ROUTER_FIELDS} for router in routers]


def placement_view(spec: ModelSpec, table: Table, load: Floats, history: History) -> dict[str, Any]:
    """The answer of `GET /placement`: every expert's replicas, their share, age and reason.

    load: float64 [L, E], pairs/s. Times in Unix seconds.
    """
    layers = []
    for layer, name in enumerate(spec.layer_names):
        experts = []
        for expert in range(spec.experts_of_layer[layer]):
            replicas = []
            for g in np.flatnonzero(table.resident[layer, expert]):
                group_id = table.group_ids[g]
                since, reason = history.why_of((layer, expert, group_id))
                share = round(float(table.share[layer, expert, g]), 6)
                replicas.append({"group": group_id, "share": share, "since": since, "why": reason})
            pairs_per_s = round(float(load[layer, expert]), 3)
            experts.append({"expert": expert, "load": pairs_per_s, "replicas": replicas})
        layers.append({"layer": layer, "name": name, "experts": experts})
    return {"term": table.term, "epoch": table.epoch, "layers": layers}


def balancedness(table: Table | None, load: Floats) -> float | None:
    """Time-balancedness of the load on the table: sum over layers of the ideal time, over that of
    the slowest group's; 1 is perfect. None without a table or load."""
    if table is None or not load.any():
        return None
    work = np.einsum("le,leg->lg", load, table.share)  # [L, G] pairs/s
    ideal = float((work.sum(1) / table.speed.sum()).sum())
    slowest = float((work / table.speed).max(1).sum())
    return round(ideal / slowest, 4) if slowest else None
