"""A process that nobody asks after any more ends itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Lease:
    """Calls `end` once, from a thread of its own, when `renew` was not called for `ttl_s`."""

    def __init__(self, ttl_s: float, end: Callable[[], None]) -> None:
        self._ttl_s, self._end = ttl_s, end
        self._renewed_s = time.monotonic()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="lease", daemon=True).start()

    def renew(self) -> None:
        self._renewed_s = time.monotonic()

    def close(self) -> None:
        """It will not end any more."""
        self._closed.set()

    def _watch(self) -> None:
        # a frozen process finds its lease long over when it wakes: it gets a moment to hear first
        while not self._closed.wait(self._ttl_s / 4):
            if time.monotonic() - self._renewed_s <= self._ttl_s:
                continue
            if self._closed.wait(self._ttl_s / 4):
                return
            if time.monotonic() - self._renewed_s > self._ttl_s:
                self._end()
                return
