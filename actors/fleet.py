"""The live cluster, seen through Ray: groups as they were last heard of, and calls under way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
from ray.actor import ActorHandle

from raymoe.config import GroupsConfig
from raymoe.table import GroupEndpoint

Bools = npt.NDArray[np.bool_]
Sample = tuple[int, int, float]  # pairs, active experts, busy seconds

PENDING, STARTING, LOADING, READY = "pending", "starting", "loading", "ready"
LOST, DRAINING, DRAINED = "lost", "draining", "drained"
_BUSY_TAU_S = 5.0


@dataclass
class LiveGroup:
    """One expert group as the controller knows it. All arrays are bool [L, E].

    `resident`: what it said is loaded and checked; `loading`: what it was asked for and has not
    answered yet. A new life of the group has a higher `incarnation` and a new actor. Times are
    monotonic seconds.
    """

    id: str
    kind: GroupsConfig
    memory_bytes: int
    incarnation: int
    resident: Bools
    loading: Bools
    actor: ActorHandle | None = None
    endpoint: GroupEndpoint | None = None
    state: str = STARTING
    draining: bool = False
    node: str = ""
    pid: int = 0
    pairs_per_s: float = 0.0  # as it measured itself when it started
    speed: float = 1.0  # relative, as it is planned with
    resident_bytes: int = 0
    queued_pairs: int = 0
    busy: float = 0.0  # part of its time that it computes, smoothed over some seconds
    worked: tuple[float, float] | None = None  # busy seconds since its start, and when it said so
    served_since: float | None = None  # Unix seconds of this life's first message
    samples: list[Sample] = field(default_factory=list)  # not looked at yet
    deaths: int = 0
    deaths_in_a_row: int = 0  # without having been ready in between
    load_failures: int = 0  # in this life
    last_error: str = ""
    was_up: bool = False  # in some life
    spawned_s: float = field(default_factory=time.monotonic)
    looked_s: float = -math.inf  # when it was last looked how far its start is
    stage: str = PENDING  # ... and how far it was (actors/spawn.py)
    silent_s: float = 0.0  # for so long, while we were awake, a call of it is unanswered
    gone_since_s: float | None = None  # since when it has not been up
    given_up: bool = False  # away for too long: no part of the fleet until it is up again
    retry_at_s: float | None = None  # when the next life is to start
    bringing: bool = False  # loads are under way
    reading_s: float = 0.0  # for how long it has been reading one expert of the checkpoint
    dropping: bool = False  # drops are under way
    asked: int = 0  # grows with every load or drop that begins or ends
    pinged: bool = False  # a ping is under way
    pinged_at_s: float = -math.inf  # when the last one was sent

    @property
    def up(self) -> bool:
        """It has said who it is, and has not been lost since."""
        return self.state in (LOADING, READY)

    def has_worked(self, busy_s: float, now: float) -> None:
        """It says how many seconds it has computed since its start."""
        if self.worked is not None and now > self.worked[1]:
            passed_s = now - self.worked[1]
            part = min(max((busy_s - self.worked[0]) / passed_s, 0.0), 1.0)
            self.busy += -math.expm1(-passed_s / _BUSY_TAU_S) * (part - self.busy)
        self.worked = busy_s, now

    @property
    def shown_state(self) -> str:
        """The state as operators see it."""
        return DRAINING if self.up and self.draining else self.state


class Calls:
    """Outstanding Ray calls, each with what to do when it is done.

    `wait()` runs the callbacks in the calling thread. A callback gets the result, or the exception
    the call ended with.
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


def reason(error: Exception) -> str:
    """One line of why a Ray call failed."""
    cause = getattr(error, "cause", None) or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    last = lines[-1] if lines else repr(cause)
    return last.partition(": ")[2] if last.startswith("raymoe.errors.") else last
