"""How a router leaves, on a clock of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from actors.leaving import leave


class Stream:
    """`open_at(seconds)` says how many requests are open; notes what it is told."""

    def __init__(self, open_at: Callable[[float], int]) -> None:
        self.now, self._open_at = 0.0, open_at
        self.said: list[tuple[int, bool | str]] = []

    @property
    def open_requests(self) -> int:
        return self._open_at(self.now)

    def set_accepting(self, accepting: bool) -> None:
        self.said.append((round(self.now), accepting))

    def give_away(self) -> None:
        self.said.append((round(self.now), "give away"))

    async def sleep(self, seconds: float) -> None:
        self.now = round(self.now + seconds, 3)


def left(stream: Stream, other_at: Callable[[float], bool], limit_s: float) -> int:
    """How many requests it gave away."""

    async def others() -> bool:
        return other_at(stream.now)

    return asyncio.run(leave(stream, others, limit_s, clock=lambda: stream.now, sleep=stream.sleep))


def test_it_takes_nothing_new_and_finishes_what_it_has() -> None:
    stream = Stream(lambda now: 3 if now < 5 else 0)
    assert left(stream, lambda _: True, 30) == 0
    assert stream.said == [(0, False), (5, "give away")] and stream.now < 6


def test_after_the_limit_it_gives_the_rest_away() -> None:
    stream = Stream(lambda now: 2)
    assert left(stream, lambda _: True, 30) == 2
    assert stream.said == [(0, False), (30, "give away")]


def test_without_open_requests_it_ends_at_once() -> None:
    stream = Stream(lambda now: 0)
    assert left(stream, lambda _: False, 30) == 0
    assert stream.said == [(0, "give away")] and stream.now < 1


def test_alone_it_goes_on_taking_requests_until_another_does() -> None:
    stream = Stream(lambda now: 1)
    assert left(stream, lambda now: now > 7, 20) == 1
    assert stream.said == [(8, False), (20, "give away")]


def test_two_that_leave_together_see_so_and_take_requests_again() -> None:
    """Each took the other for one that stays, until it said that it leaves too."""
    stream = Stream(lambda now: 1)
    assert left(stream, lambda now: now < 1, 10) == 1
    assert stream.said == [(0, False), (1, True), (10, "give away")]
