"""What groups are asked to hold: loads and drops as Ray calls, one of each at a time a group."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from actors.fleet import Calls, LiveGroup, reason

Pairs = list[tuple[int, int]]  # (layer, expert)
Failed = list[tuple[int, int, str]]  # (layer, expert, why)
_STUCK_S = 120.0  # no checkpoint that can be read takes so long for one expert


class Hands:
    """Executes loads and drops; what groups answer is written into their `LiveGroup`."""

    def __init__(
        self,
        groups: Mapping[str, LiveGroup],
        calls: Calls,
        lock: threading.RLock,
        term: int,
        changed: Callable[[], None],
    ) -> None:
        self._groups, self._calls, self._lock = groups, calls, lock
        self._term, self._changed = term, changed
        self._loads: dict[str, _Load] = {}  # under way, by group
        self._told: set[str] = set()  # groups that are being told to make way

    def can_bring(self, group_id: str) -> bool:
        """It is up, and no load of it is under way."""
        group = self._groups[group_id]
        return group.up and not group.bringing

    def can_drop(self, group_id: str) -> bool:
        """It is up, and no drop of it is under way."""
        group = self._groups[group_id]
        return group.up and not group.dropping

    def can_give(self, group_id: str) -> bool:
        """Others can copy from it."""
        group = self._groups.get(group_id)
        return group is not None and group.endpoint is not None

    def bring(
        self,
        group_id: str,
        pairs: Pairs,
        source: str | None,
        limit_bytes_per_s: float | None,
        done: Callable[[Pairs, Failed], None],
    ) -> None:
        """`done` gets the replicas that are ready and those that failed; not called when the
        group is lost meanwhile. With a limit nobody waits for them: see `make_way`."""
        group = self._groups[group_id]
        endpoint = None if source is None else self._groups[source].endpoint
        assert group.actor is not None and (source is None or endpoint is not None)
        group.bringing = True
        group.asked += 1
        for layer, expert in pairs:
            group.loading[layer, expert] = True
        told = None if endpoint is None else endpoint.to_dict()
        ref = group.actor.bring.remote(pairs, told, limit_bytes_per_s, self._term)
        finished = self._start(group, ref, pairs, True, done)
        self._loads[group_id] = _Load(group.incarnation, limit_bytes_per_s is None, finished)

    def make_way(self, group_id: str) -> None:
        """What requests wait for is to be loaded there: a load that nobody waits for ends, and what
        is left of it counts as not asked for."""
        group, load = self._groups[group_id], self._loads.get(group_id)
        if load is None or load.urgent or not group.bringing or group_id in self._told:
            return
        if load.life != group.incarnation or group.actor is None:
            return
        self._told.add(group_id)
        self._calls.start(
            group.actor.make_way.remote(self._term), lambda _, __: self._told.discard(group_id)
        )

    def end_stuck(self) -> None:
        """Loads from a checkpoint that does not answer count as failed; should one come to its end
        after all, pings tell what it brought."""
        for group_id, load in list(self._loads.items()):
            group = self._groups.get(group_id)
            if group is None or load.life != group.incarnation or not group.bringing:
                del self._loads[group_id]
            elif group.reading_s > _STUCK_S:
                why = f"the checkpoint was not read within {_STUCK_S:.0f} s"
                load.finished(None, TimeoutError(why))

    def drop(self, group_id: str, pairs: Pairs) -> None:
        """The replicas count as gone from now on: nobody is to copy from them."""
        group = self._groups[group_id]
        assert group.actor is not None
        group.dropping = True
        group.asked += 1
        for layer, expert in pairs:
            group.resident[layer, expert] = False
        ref = group.actor.drop.remote(pairs, self._term)
        self._start(group, ref, pairs, False, lambda _, __: None)

    def _start(
        self,
        group: LiveGroup,
        ref: Any,
        pairs: Pairs,
        present: bool,
        done: Callable[[Pairs, Failed], None],
    ) -> Callable[[Any, Exception | None], None]:
        life = group.incarnation
        ended = False

        def finished(answer: Any, error: Exception | None) -> None:
            nonlocal ended
            with self._lock:
                if ended or life != group.incarnation or group.actor is None:
                    return
                ended = True
                if present:
                    group.bringing = False
                else:
                    group.dropping = False
                group.asked += 1
                left: Pairs = []
                if error is not None:
                    failed = [(layer, expert, reason(error)) for layer, expert in pairs]
                else:
                    failed = [(la, e, why) for la, e, why in answer["failed"]]
                    group.resident_bytes = answer["resident_bytes"]
                    left = [(la, e) for la, e in answer.get("left", ())]
                ready = _settle(group, pairs, failed, left, present)
                if failed:
                    group.last_error = failed[0][2]
                    group.load_failures += 1
                done(ready, failed)
                self._changed()

        self._calls.start(ref, finished)
        return finished


class _Load(NamedTuple):
    life: int
    urgent: bool
    finished: Callable[[Any, Exception | None], None]


def _settle(group: LiveGroup, pairs: Pairs, failed: Failed, left: Pairs, present: bool) -> Pairs:
    """Write down what has come (or could not go); the replicas that are ready now."""
    lost = {(layer, expert) for layer, expert, _ in failed} | set(left)
    ready = [pair for pair in pairs if pair not in lost]
    for layer, expert in pairs if present else lost:
        group.loading[layer, expert] = False
        group.resident[layer, expert] = ((layer, expert) not in lost) is present
    return ready if present else []
