"""The live cluster, seen through Ray: group actors, what they last said, what was asked of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.actor import ActorHandle

from placement.types import GroupSpec
from raymoe.config import GroupsConfig
from raymoe.table import GroupEndpoint

Bools = npt.NDArray[np.bool_]

STARTING, LOADING, READY, LOST = "starting", "loading", "ready", "lost"


@dataclass
class LiveGroup:
    """One expert group as the controller knows it.

    `resident` bool [L, E]: replicas the group said are loaded and checked. `assigned` bool [L, E]:
    what it is to hold. A new life of the group has a higher `incarnation` and a new actor.
    """

    id: str
    kind: GroupsConfig
    memory_bytes: int
    incarnation: int
    assigned: Bools
    resident: Bools
    actor: ActorHandle | None = None
    endpoint: GroupEndpoint | None = None
    state: str = STARTING
    node: str = ""
    pid: int = 0
    speed: float = 1.0  # relative to the fastest group at start
    pairs_per_s: float = 0.0  # as it measured itself
    resident_bytes: int = 0
    deaths: int = 0
    deaths_in_a_row: int = 0  # without having served in between
    retry_at_s: float | None = None  # monotonic; when the next life is to start
    last_error: str = ""

    def spec(self) -> GroupSpec:
        """What the planner needs to know of it."""
        return GroupSpec(
            id=self.id,
            node=self.node or "unknown",
            memory_bytes=self.memory_bytes,
            speed=self.speed,
            kind=self.kind.kind,
        )


class Calls:
    """Outstanding Ray calls, each with what to do when it is done.

    `wait()` runs the callbacks in the calling thread, so that whoever owns the state needs no
    lock around them. A callback gets the result, or the exception the call ended with.
    """

    def __init__(self) -> None:
        self._pending: dict[Any, Callable[[Any, Exception | None], None]] = {}

    def start(self, ref: Any, done: Callable[[Any, Exception | None], None]) -> None:
        self._pending[ref] = done

    def wait(self, timeout_s: float) -> None:
        """Returns after the first batch of finished calls, or after `timeout_s`."""
        if not self._pending:
            time.sleep(timeout_s)
            return
        ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=timeout_s)
        if ready:  # take what else has finished in the meantime
            ready, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
        for ref in ready:
            done = self._pending.pop(ref)
            try:
                result = ray.get(ref)
            except Exception as e:
                done(None, e)
            else:
                done(result, None)
