"""How a router leaves: nothing new comes, it finishes what it can, others go on with the rest."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

_LOOK_S = 0.1
_ASK_S = 1.0
_LINGER_S = 0.5  # what was on its way to us is given away too, and the gateways hear of it


class Leaver(Protocol):
    """The part of `raymoe.stream.server.StreamServer` that this needs."""

    @property
    def open_requests(self) -> int: ...
    def set_accepting(self, accepting: bool) -> None: ...
    def give_away(self) -> None: ...


async def leave(
    stream: Leaver,
    others: Callable[[], Awaitable[bool]],
    limit_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> int:
    """Returns when no request is open here any more; how many were given away unfinished.

    `others()` says whether another router takes requests. While none does this one goes on taking
    them: its replacement may still be starting. After `limit_s` what is open is given away.
    """
    began = clock()
    asked_s, accepting = -float("inf"), True
    while stream.open_requests and clock() - began < limit_s:
        if clock() - asked_s >= _ASK_S:
            asked_s = clock()
            wanted = not await others()
            if wanted != accepting:
                stream.set_accepting(wanted)
                accepting = wanted
        await sleep(_LOOK_S)
    given = stream.open_requests
    stream.give_away()
    await sleep(_LINGER_S)
    return given
