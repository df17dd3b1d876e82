"""What has happened between two looks at a deployment, in sentences."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from placement.table import Table

Status = Mapping[str, Any]
Why = Callable[[tuple[int, int, str]], tuple[float, str]]  # since when (Unix seconds), and why
Said = tuple[str, str]  # kind, sentence
_MOST_SINGLE = 6  # changes of one group in one epoch told one by one; more become one sentence


class EventLog:
    """The last few hundred events, numbered. An event is {"seq", "at", "kind", "text"}.

    kind: "replica", "group", "router", "plan", "alarm"; at: Unix seconds.
    """

    def __init__(self, most: int = 400) -> None:
        self._events: deque[dict[str, Any]] = deque(maxlen=most)
        self.seq = 0

    def add(self, kind: str, text: str, at: float | None = None) -> None:
        self.seq += 1
        at = time.time() if at is None else at
        self._events.append({"seq": self.seq, "at": at, "kind": kind, "text": text})

    def since(self, seq: int) -> list[dict[str, Any]]:
        """Events after number `seq`, oldest first. Another log's number gives all of them."""
        if seq > self.seq:
            seq = 0
        return [event for event in self._events if event["seq"] > seq]


def of_status(before: Status, after: Status) -> Iterator[Said]:
    """Groups and routers that came, went, died or changed their state."""
    old = {group["id"]: group for group in before["groups"]}
    new = {group["id"]: group for group in after["groups"]}
    for group_id in sorted(old.keys() - new.keys()):
        yield "group", f"group {group_id} has left the fleet"
    for group_id, group in new.items():
        was = old.get(group_id)
        if was is None:
            yield "group", f"group {group_id} ({group['kind']}) has joined the fleet"
            continue
        if group["deaths"] > was["deaths"]:
            why = f": {group['last_error']}" if group["last_error"] else ""
            yield "alarm", f"group {group_id} was lost{why}"
        elif group["state"] != was["state"]:
            kind = "alarm" if group["state"] == "lost" else "group"
            yield kind, f"group {group_id}: {was['state']} → {group['state']}"
        if abs(group["speed"] - was["speed"]) > 0.1 * max(was["speed"], 1e-9):
            yield "group", f"group {group_id}: speed {was['speed']:.2f} → {group['speed']:.2f}"
    earlier = {router["id"]: router["state"] for router in before["routers"]}
    later = {router["id"]: router["state"] for router in after["routers"]}
    for router_id in sorted(later.keys() - earlier.keys()):
        yield "router", f"{router_id} serves"
    for router_id in sorted(earlier.keys() & later.keys()):
        if later[router_id] == "draining" != earlier[router_id]:
            yield "router", f"{router_id} leaves: no new requests"
    for router_id in sorted(earlier.keys() - later.keys()):
        if earlier[router_id] == "draining":
            yield "router", f"{router_id} has left"
        else:
            yield "alarm", f"{router_id} was lost"
    if before["ready"] and not after["ready"]:
        yield "alarm", "an expert has no ready replica: requests wait for it"
    if after["ready"] and not before["ready"]:
        yield "group", "every expert has a ready replica"


def of_tables(before: Table, after: Table, why: Why) -> Iterator[Said]:
    """Replicas that joined and left the table, [L, E, G] against [L, E, G]."""
    for added, (one, other) in ((True, (after, before)), (False, (before, after))):
        for g, group_id in enumerate(one.group_ids):
            had = np.zeros(one.resident.shape[:2], np.bool_)
            if group_id in other.group_ids:
                had = other.resident[:, :, other.group_ids.index(group_id)]
            changed = np.argwhere(one.resident[:, :, g] & ~had).tolist()
            verb = "added on" if added else "removed from"
            if len(changed) > _MOST_SINGLE:
                yield "replica", f"{len(changed)} replicas {verb} {group_id}"
                continue
            for layer, expert in changed:
                reason = _short(why((layer, expert, group_id))[1]) if added else ""
                said = f": {reason}" if reason else ""
                yield "replica", f"layer {layer} expert {expert} {verb} {group_id}{said}"


def _short(why: str) -> str:
    """Without what the sentence says already: a plan's reason names layer, expert and group."""
    return why.partition(", ")[2] if is_detail(why) and ", " in why else why


def is_detail(sentence: str) -> bool:
    """One action of a plan: told again, with its replica, when it has been carried out."""
    return sentence.startswith(("add layer ", "drop layer "))


def changes(before: Table | None, after: Table) -> tuple[dict[str, int], dict[str, int]]:
    """Replicas by group that joined the table, and that left it."""
    joined: dict[str, int] = {}
    left: dict[str, int] = {}
    nothing = np.zeros(after.resident.shape[:2], np.bool_)

    def column(table: Table | None, group_id: str) -> Any:
        if table is None or group_id not in table.group_ids:
            return nothing
        return table.resident[:, :, table.group_ids.index(group_id)]

    ids = {*after.group_ids, *(before.group_ids if before is not None else ())}
    for group_id in sorted(ids):
        old, new = column(before, group_id), column(after, group_id)
        joined[group_id], left[group_id] = int((new & ~old).sum()), int((old & ~new).sum())
    return joined, left
