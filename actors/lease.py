"""A process that nobody asks after, and nobody uses, any more ends itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Lease:
    """Calls `end` once, from a thread of its own, when `renew` was not called for `ttl_s` and
    `used()`, a figure that grows with use, has not changed either."""

    def __init__(
        self, ttl_s: float, end: Callable[[], None], used: Callable[[], float] = lambda: 0.0
    ) -> None:
        self._ttl_s, self._end, self._used = ttl_s, end, used
        self._seen = used()
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
            if not self._over():
                continue
            if self._closed.wait(self._ttl_s / 4):
                return
            if self._over():
                self._end()
                return

    def _over(self) -> bool:
        used = self._used()
        if used != self._seen:
            self._seen = used
            self.renew()
            return False
        return time.monotonic() - self._renewed_s > self._ttl_s
