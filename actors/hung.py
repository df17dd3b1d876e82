"""A controller that runs but does not answer (stopped, hung) is ended, so that Ray starts another.

Ray starts anew what has died; whether what lives also answers it does not ask. Routers do, who tell
the controller every second that they are there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from actors.spawn import RUNNING, Place, kill_anywhere

log = logging.getLogger("raymoe.router")
LIMIT_S = 60.0  # far more than any plan takes
_PROCESS = "PlacementController"  # part of what Ray calls its process


class HungController:
    """How long one router has waited for answers of one process, for nothing."""

    def __init__(self, kill: Callable[[str, int, str], None] = kill_anywhere) -> None:
        self._kill = kill
        self._silent_s = 0.0
        self._place: Place | None = None

    def answered(self) -> None:
        """It answers, or has died: Ray knows what to do."""
        self._silent_s, self._place = 0.0, None

    def silent(self, waited_s: float, place_of: Callable[[], Place]) -> None:
        """A call was not answered for so long. `place_of()`: where the controller is now, as Ray
        knows it. Only waiting counts: a router that stood still itself has not waited."""
        # Of the process that was silent first: by the time its end comes another router may have
        # ended it already, and its successor be about to answer.
        place = self._place or place_of()
        if place.stage != RUNNING:
            return
        self._place = place
        self._silent_s += waited_s
        if self._silent_s >= LIMIT_S:
            log.error("the controller has not answered for %.0f s: it is ended", self._silent_s)
            self.answered()
            self._kill(place.node, place.pid, _PROCESS)
