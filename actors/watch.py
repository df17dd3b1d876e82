"""Looks after a deployment that serves: says when its state changes, and when it is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from textwrap import shorten
from typing import Any

import ray

from actors.controller import find_controller
from actors.say import say

_LOOK_S = 2.0
_ANSWER_S = 2.0
_RAY_GONE_S = 15.0
_TEXT_CHARS = 200  # Ray explains the death of an actor at length
_SILENT = {"ready": False, "failed": None, "text": "the placement controller does not answer"}


class Watch(threading.Thread):
    """Asks the controller and Ray every two seconds, in a thread of its own: they may hang.

    `progress` returns the controller's progress, `ray_answers` whether a node of the cluster is
    alive; either may raise. Whoever owns the watch asks `failed()` and `ray_gone()`.
    """

    def __init__(
        self,
        progress: Callable[[], dict[str, Any]],
        ray_answers: Callable[[], bool],
        look_s: float = _LOOK_S,
    ) -> None:
        super().__init__(name="watch", daemon=True)
        self._progress, self._ray_answers, self._look_s = progress, ray_answers, look_s
        self._answered_at_s = time.monotonic()
        self._shown = ""
        self._failed: str | None = None
        self._end = threading.Event()

    def run(self) -> None:
        while not self._end.wait(self._look_s):
            self.look()

    def look(self) -> None:
        """Asks once, and prints one line when the state is another than before."""
        try:
            alive = self._ray_answers()
        except Exception:  # whatever it is: no answer; `ray_gone` tells when that lasts
            alive = False
        if not alive:
            self._show("not ready: Ray does not answer")
            return
        self._answered_at_s = time.monotonic()
        try:
            progress = self._progress()
        except (ValueError, ConnectionError, ray.exceptions.RayError):
            progress = _SILENT  # Ray restarts it
        if progress["failed"]:
            self._failed = progress["failed"]
        elif progress["ready"]:
            self._show("")
        else:
            self._show("not ready: " + shorten(progress["text"], _TEXT_CHARS, placeholder=" ..."))

    def failed(self) -> str | None:
        """Why the controller has given up."""
        return self._failed

    def ray_gone(self, now_s: float) -> bool:
        """No answer from Ray for so long that none will come; `now_s` of the monotonic clock."""
        return now_s - self._answered_at_s > _RAY_GONE_S

    def end(self) -> None:
        self._end.set()

    def _show(self, state: str) -> None:
        if state != self._shown and not self._end.is_set():
            say(state or "ready again")
            self._shown = state


def watch(deployment: str) -> Watch:
    """The watch of a deployment on the Ray this process is connected to."""
    return Watch(lambda: _progress(deployment), _a_node_is_alive)


def _progress(deployment: str) -> dict[str, Any]:
    progress: dict[str, Any] = ray.get(
        find_controller(deployment).progress.remote(), timeout=_ANSWER_S
    )
    return progress


def _a_node_is_alive() -> bool:
    return any(node["Alive"] for node in ray.nodes())
