"""Calls that need Ray's head (its GCS), so that a head that is away holds nobody up.

While the GCS does not answer, Ray lets such calls wait for up to a minute. The controller, which
has experts to restore meanwhile, waits for the first of them for `limit_s`; from then on calls
fail at once, until that one has come back. What need not be waited for is told: it is done in a
thread of its own.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger("raymoe.controller")


class HeadAway(ConnectionError):
    """Ray's head did not answer in time."""

    def __init__(self) -> None:
        super().__init__("Ray's head does not answer")


class _Call:
    """One call in a thread of its own."""

    def __init__(self, work: Callable[[], Any], undo: Callable[[Any], None] | None) -> None:
        self._work, self._undo = work, undo
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._abandoned = False
        self._result: Any = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="ray-head", daemon=True).start()

    @property
    def under_way(self) -> bool:
        return not self._ended.is_set()

    def result(self, limit_s: float) -> Any:
        """What it returned; raises what it raised, or HeadAway after `limit_s`."""
        self._ended.wait(limit_s)
        with self._lock:
            if not self._ended.is_set():
                self._abandoned = True
                raise HeadAway
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        with self._lock:
            late = self._abandoned
            if not late:
                self._ended.set()
        if late:
            try:
                if self._undo is not None and self._error is None:
                    self._undo(self._result)
            finally:
                self._ended.set()


class Head:
    """One at a time. `limit_s` None: calls are made as they are, and may take long."""

    def __init__(self) -> None:
        self.limit_s: float | None = None
        self._lock = threading.Lock()
        self._last: _Call | None = None
        self._telling = threading.Lock()
        self._told: SimpleQueue[Callable[[], object]] | None = None

    def ask(self, work: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
        """What `work()` returns, or raises; HeadAway when that takes too long, or an earlier call
        still does. `undo(result)` is called when it ends after all."""
        limit_s = self.limit_s
        if limit_s is None:
            return work()
        with self._lock:
            if self._last is not None and self._last.under_way:
                raise HeadAway
            self._last = _Call(work, undo)
            result: T = self._last.result(limit_s)
            return result

    def tell(self, work: Callable[[], object]) -> None:
        """Has `work()` done without waiting for it. It is not lost while the head is away, and an
        error is only logged."""
        if self.limit_s is None:
            work()
            return
        with self._telling:  # not the other: whoever asks holds that while it waits
            if self._told is None:
                self._told = SimpleQueue()
                threading.Thread(
                    target=_work_off, args=(self._told,), name="ray-head-told", daemon=True
                ).start()
        self._told.put(work)


def _work_off(told: SimpleQueue[Callable[[], object]]) -> None:
    while True:
        work = told.get()
        try:
            work()
        except Exception:
            log.exception("Ray's head did not do as told")
