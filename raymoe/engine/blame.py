"""Whose fault it was that a step failed: nobody knows, so each request is tried alone.

Without this one request that the engine cannot compute would end the router, and go on to end the
next one. What broke off only once goes on; what fails alone as well ends with an error; an engine
at which everything fails is broken itself, and says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from raymoe.engine.batch import Chunks
from raymoe.engine.sequence import Sequence
from raymoe.errors import ExpertsUnavailable
from raymoe.requests import TokenEvent

log = logging.getLogger(__name__)

MOST_FAILURES = 3
"""So many requests that fail alone, and none in between that succeeds: it is the engine."""


class Blame:
    """Failures of one engine's steps."""

    def __init__(self) -> None:
        self.suspicious = False  # the next step is to be tried one by one
        self._failures = 0  # of requests alone since anything succeeded

    def failed(self, error: Exception) -> None:
        """A step of several has failed, and nothing of it has happened."""
        log.error("a step failed, its requests are tried one by one", exc_info=error)
        self.suspicious = True

    def succeeded(self) -> None:
        self._failures = 0

    def one_by_one(
        self,
        chunks: Chunks,
        compute: Callable[[Chunks], list[TokenEvent]],
        spoilt: Callable[[Chunks], None],
        broken: Callable[[], bool],
    ) -> tuple[list[TokenEvent], list[tuple[Sequence, Exception]]]:
        """What each chunk's own step made, and who failed at it. Raises the error of an engine at
        which everything fails, and one after which `broken()` is true."""
        self.suspicious = False
        events: list[TokenEvent] = []
        guilty: list[tuple[Sequence, Exception]] = []
        for chunk in chunks:
            try:
                events += compute([chunk])
            except ExpertsUnavailable:
                spoilt([chunk])  # it waits with the others, in the next step
            except Exception as error:
                spoilt([chunk])
                if broken():
                    raise
                log.error("request %s failed alone", chunk[0].request.request_id, exc_info=error)
                guilty.append((chunk[0], error))
                self._failures += 1
                if self._failures >= MOST_FAILURES:
                    raise
            else:
                self.succeeded()
        return events, guilty
