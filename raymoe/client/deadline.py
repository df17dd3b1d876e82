"""How long an answer may take before its group counts as hung.

The groups say how long each message kept them busy. From that comes a pessimistic rate (seconds a
pair, a slow decay from the worst seen), and from the rate a prediction for a message and the work
queued ahead of it. The deadline is a multiple of the prediction, never below a floor nor three
times the worst latency of late (a machine with more processes than cores answers late without
being hung), and doubles each time it struck without an answer in between: a group that is merely
slower than predicted is given up a few times at most.
"""

from __future__ import annotations

_SMALL_PAIRS = 8  # a message costs about as much as this many pairs even when it has only one
_DECAY = 0.98
_LATENCY_DECAY = 0.99
_LATENCIES = 3.0
MAX_STRIKES = 8


class Patience:
    """The deadline of one group's answers. Survives the links to that group."""

    def __init__(self, *, multiple: float, floor_s: float, first_s: float) -> None:
        self._multiple = multiple
        self._floor_s = floor_s
        self._first_s = first_s  # before anything has been observed
        self._pair_s = 0.0
        self._latency_s = 0.0
        self._strikes = 0

    def observe(self, pairs: int, busy_s: float, latency_s: float) -> None:
        """A message of `pairs` pairs kept the group busy for `busy_s`; the answer came after
        `latency_s`."""
        worst_s = self._latency_s * _LATENCY_DECAY
        self._latency_s = latency_s if latency_s > worst_s else worst_s
        rate = busy_s / (pairs + _SMALL_PAIRS)
        decayed = self._pair_s * _DECAY
        self._pair_s = rate if rate > decayed else decayed + rate * (1.0 - _DECAY)
        self._strikes = 0

    def struck(self) -> None:
        """A deadline passed without an answer: the next one is twice as long."""
        self._strikes = min(self._strikes + 1, MAX_STRIKES)

    def predict_s(self, pairs: int, messages: int = 1) -> float:
        """Expected seconds for `pairs` pairs in `messages` messages."""
        return (pairs + messages * _SMALL_PAIRS) * self._pair_s

    def limit_s(self, pairs: int, messages: int = 1) -> float:
        """Seconds to wait for the answer to the last of them."""
        limit_s = self._multiple * self.predict_s(pairs, messages) or self._first_s
        return max(self._floor_s, limit_s, _LATENCIES * self._latency_s) * (1 << self._strikes)
