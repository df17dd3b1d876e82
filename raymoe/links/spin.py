"""Whether to look again and again before sleeping: while that pays.

Waking a sleeping process costs its peer a system call that takes 5-25 us on a virtual machine, and
itself as much again. Looking on costs a core. So it is done while, as a rule, something comes
within the limit; when it does not (long pauses, or no core to spare, so that the peer cannot run
while we look), it is tried again only now and then.
"""

from __future__ import annotations

_WEIGHT = 0.125  # of the latest wait
_WORTH = 0.7  # of the waits that end in time
_PROBE_EVERY = 128  # waits, four times in a row


class Spin:
    """Of one thread."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._in_time = 0.0  # share of the latest waits
        self._waits = 0

    def limit_s(self) -> float:
        """How long to look before sleeping this time."""
        self._waits += 1
        if self._in_time >= _WORTH or self._waits % _PROBE_EVERY < 4:
            return self._limit_s
        return 0.0

    def note(self, came: bool) -> None:
        """After a wait with a limit: whether something came in time."""
        self._in_time += _WEIGHT * (came - self._in_time)
