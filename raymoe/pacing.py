"""How long work that can wait rests, so that requests on the same cores do not feel it.

A thread that moves experts takes CPU time from those that compute where the cores are all in use,
and from nobody where they are idle. The kernel says which: how long a thread was ready to run and
had no core (Linux, /proc/self/task/TID/schedstat). Rests are in proportion to the CPU time spent:
as long on idle cores, up to twelve times as long where it waits for a core as long as it runs.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_IDLE_REST, _BUSY_REST = 1.0, 12.0
_UNKNOWN = 0.2  # part of the time without a core, where the kernel does not say
_NEW = 0.3  # weight of the latest measurement


@dataclass
class Spent:
    """CPU seconds of a piece of work, and how long to rest after it."""

    cpu_s: float = 0.0
    rest_s: float = 0.0


class Pacer:
    """For the threads of one process; any of them may use it."""

    def __init__(self) -> None:
        self.waiting = _UNKNOWN  # part of its time that such work waited for a core, lately

    @contextlib.contextmanager
    def measured(self) -> Iterator[Spent]:
        """The block's work in this thread; filled in when it ends."""
        spent = Spent()
        before = _times()
        try:
            yield spent
        finally:
            after = _times()
            spent.cpu_s = after[0] - before[0]
            if before[1] is not None and after[1] is not None and spent.cpu_s > 0:
                waited_s = after[1] - before[1]
                part = waited_s / (waited_s + spent.cpu_s)
                self.waiting += _NEW * (part - self.waiting)
            spent.rest_s = spent.cpu_s * self.rests

    @property
    def rests(self) -> float:
        """Seconds of rest for each second of CPU time."""
        return _IDLE_REST + (_BUSY_REST - _IDLE_REST) * min(2.0 * self.waiting, 1.0)


def _times() -> tuple[float, float | None]:
    """CPU seconds of this thread, and seconds it was ready without a core (None: unknown)."""
    try:
        text = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text()
        waited_s: float | None = int(text.split()[1]) * 1e-9
    except (OSError, ValueError, IndexError):
        waited_s = None
    return time.thread_time(), waited_s
