"""Reaching groups in the background: the engine's thread never waits for a connect."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

from raymoe.errors import LinkError
from raymoe.links.link import Link
from raymoe.logs import fields
from raymoe.table import GroupEndpoint

log = logging.getLogger(__name__)

_FLAP_S = 1.0

Dial = Callable[[GroupEndpoint], Link]


class Dialer:
    """Keeps trying every wanted group that is not connected, each in a short-lived thread.

    `connected(endpoint, link)` is called from that thread; it owns the link, and calls `want` with
    what is wanted then.
    """

    def __init__(
        self,
        dial: Dial,
        connected: Callable[[GroupEndpoint, Link], None],
        pauses_s: tuple[float, float],
    ) -> None:
        self._dial = dial
        self._connected = connected
        self._first_pause_s, self._longest_pause_s = pauses_s
        self._lock = threading.Lock()
        self._wanted: Mapping[str, GroupEndpoint] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._changed = threading.Condition(self._lock)
        self._reached: dict[str, tuple[float, float]] = {}  # when, and the pause after
        self._closed = False

    def want(self, groups: Mapping[str, GroupEndpoint]) -> None:
        """From now on reach exactly these groups. Never blocks on a connect."""
        with self._lock:
            self._wanted = dict(groups)
            self._changed.notify_all()
            for group_id in groups:
                if group_id not in self._threads and not self._closed:
                    thread = threading.Thread(
                        target=self._keep_trying,
                        args=(group_id,),
                        name=f"raymoe-dial-{group_id}",
                        daemon=True,
                    )
                    self._threads[group_id] = thread
                    thread.start()

    def close(self, timeout_s: float) -> None:
        """Stop trying; waits at most `timeout_s` for connects under way."""
        with self._lock:
            self._closed = True
            self._wanted = {}
            threads = list(self._threads.values())
            self._changed.notify_all()
        for thread in threads:
            thread.join(timeout_s / max(1, len(threads)))

    def _keep_trying(self, group_id: str) -> None:
        pause_s = self._first_pause_s
        while True:
            with self._lock:
                self._sit_out(group_id)
                target = self._wanted.get(group_id)
                if target is None:
                    del self._threads[group_id]
                    return
            link = self._try(target)
            if link is not None:
                self._note_reached(group_id)
                self._connected(target, link)  # which says anew what is wanted
                pause_s = self._first_pause_s
                continue
            with self._lock:
                if self._wanted.get(group_id) is target:
                    self._changed.wait(pause_s)
                    pause_s = min(pause_s * 2, self._longest_pause_s)

    def _note_reached(self, group_id: str) -> None:
        """A group reached twice within a second flaps: pauses before the next time grow."""
        now = time.monotonic()
        with self._lock:
            before = self._reached.get(group_id)
            pause_s = self._first_pause_s
            if before is not None and now - before[0] < before[1] + _FLAP_S:
                pause_s = min(before[1] * 2, self._longest_pause_s)
            self._reached[group_id] = (now, pause_s)

    def _sit_out(self, group_id: str) -> None:
        """Wait, with the lock released meanwhile, until the pause since it was reached is over."""
        while group_id in self._wanted and group_id in self._reached:
            at_s, pause_s = self._reached[group_id]
            left_s = at_s + pause_s - time.monotonic()
            if left_s <= 0:
                return
            self._changed.wait(left_s)

    def _try(self, target: GroupEndpoint) -> Link | None:
        try:
            return self._dial(target)
        except (LinkError, OSError) as error:
            log.info(
                "group %s is not reachable yet: %s", target.id, error, extra=fields(group=target.id)
            )
            return None
