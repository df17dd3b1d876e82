"""What groups are asked to hold: loads and drops as Ray calls, one of each at a time a group."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from actors.fleet import Calls, LiveGroup, reason

Pairs = list[tuple[int, int]]  # (layer, expert)
Failed = list[tuple[int, int, str]]  # (layer, expert, why)


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
        group is lost meanwhile."""
        group = self._groups[group_id]
        endpoint = None if source is None else self._groups[source].endpoint
        assert group.actor is not None and (source is None or endpoint is not None)
        group.bringing = True
        group.asked += 1
        for layer, expert in pairs:
            group.loading[layer, expert] = True
        told = None if endpoint is None else endpoint.to_dict()
        ref = group.actor.bring.remote(pairs, told, limit_bytes_per_s, self._term)
        self._start(group, ref, pairs, True, done)

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
    ) -> None:
        life = group.incarnation

        def finished(answer: Any, error: Exception | None) -> None:
            with self._lock:
                if life != group.incarnation or group.actor is None:
                    return
                if present:
                    group.bringing = False
                else:
                    group.dropping = False
                group.asked += 1
                if error is not None:
                    failed = [(layer, expert, reason(error)) for layer, expert in pairs]
                else:
                    failed = [(la, e, why) for la, e, why in answer["failed"]]
                    group.resident_bytes = answer["resident_bytes"]
                ready = _settle(group, pairs, failed, present)
                if failed:
                    group.last_error = failed[0][2]
                    group.load_failures += 1
                done(ready, failed)
                self._changed()

        self._calls.start(ref, finished)


def _settle(group: LiveGroup, pairs: Pairs, failed: Failed, present: bool) -> Pairs:
    """Write down what has come (or could not go); the replicas that are ready now."""
    lost = {(layer, expert) for layer, expert, _ in failed}
    ready = [pair for pair in pairs if pair not in lost]
    for layer, expert in pairs if present else lost:
        group.loading[layer, expert] = False
        group.resident[layer, expert] = ((layer, expert) not in lost) is present
    return ready if present else []
