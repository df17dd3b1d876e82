"""Requests that were set aside until their experts are back."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from raymoe.engine.aside import SettingAside
from raymoe.engine.batch import Chunks
from raymoe.engine.config import EngineConfig
from raymoe.engine.sequence import Away, Sequence
from raymoe.errors import ExpertsUnavailable

log = logging.getLogger(__name__)

LONGEST_PAUSE_S = 2.0
"""Each try that finds experts away makes the pause to the next twice as long, up to this."""


class AwayRequests:
    """Which requests are set aside. Times are monotonic seconds, given by the caller."""

    def __init__(self, experts: SettingAside, config: EngineConfig) -> None:
        self._experts = experts
        self._config = config
        self._away: set[Sequence] = set()

    def __bool__(self) -> bool:
        return bool(self._away)

    def put(self, chunks: Chunks, lost: Mapping[int, ExpertsUnavailable], now: float) -> None:
        """Set aside the requests of a step's chunks that `lost` numbers."""
        news = 0
        for at, error in lost.items():
            one = chunks[at][0]
            if one.stalled_since is None:
                one.stalled_since = now - error.waited_s
                news += 1
            pause_s = min(self._config.stall_pause_s * 2**one.tries, LONGEST_PAUSE_S)
            one.away = Away(error=error, retry_s=now + pause_s)
            one.tries = min(one.tries + 1, 16)
            self._away.add(one)
        if news:
            error = next(iter(lost.values()))
            log.warning("%d of %d requests are set aside: %s", len(lost), len(chunks), error)

    def bring_back(self, now: float) -> list[Sequence]:
        """Let those go on whose experts may be back; gives those that have waited for too long."""
        expired = []
        for one in sorted(self._away, key=lambda each: each.order):
            assert one.away is not None and one.stalled_since is not None
            if now - one.stalled_since >= self._config.stall_end_s:
                expired.append(one)
            elif now >= one.away.retry_s and self._experts.back(one.away.error):
                one.away = None
                self._away.discard(one)
        return expired

    def forget(self, one: Sequence) -> None:
        """A request has ended."""
        self._away.discard(one)
