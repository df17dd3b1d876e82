"""Which waiting request a group serves next. Pure: no sockets, no clock.

Deficit round robin over links (Shreedhar and Varghese, 1996), in pairs, so that a router that sends
much delays the others by one quantum and not by its queue. Decode (few tokens) goes before prefill;
a prefill that has waited `max_wait_s` goes first, but never two of them in a row past a decode.
Requests of the same layer and mode that wait together come out together, up to `merge_pairs`.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from raymoe.links.protocol import Call


@dataclass(frozen=True, kw_only=True)
class Fairness:
    """How a group shares its time."""

    decode_tokens: int = 64  # a request of at most so many tokens is decode
    quantum_pairs: int = 512  # what a link may be served more than another
    max_wait_s: float = 0.05  # ageing bound of prefill behind decode
    merge_pairs: int = 2048  # of requests served together


class Waits(Protocol):
    """What the queue knows of a request."""

    @property
    def link_id(self) -> int: ...
    @property
    def call(self) -> Call: ...
    @property
    def arrived_s(self) -> float: ...


W = TypeVar("W", bound=Waits)


class _RoundRobin(Generic[W]):
    """Deficit round robin over links."""

    def __init__(self, quantum: int) -> None:
        self._quantum = quantum
        self._queues: OrderedDict[int, deque[W]] = OrderedDict()  # next link first
        self._deficit: dict[int, int] = {}

    def __bool__(self) -> bool:
        return bool(self._queues)

    def push(self, item: W) -> None:
        queue = self._queues.get(item.link_id)
        if queue is None:
            self._queues[item.link_id] = queue = deque()
            self._deficit[item.link_id] = self._quantum
        queue.append(item)

    def pop(self) -> W:
        while True:
            link_id, queue = next(iter(self._queues.items()))
            if queue[0].call.pairs <= self._deficit[link_id] or len(self._queues) == 1:
                return self._take(link_id, queue)
            self._deficit[link_id] += self._quantum
            self._queues.move_to_end(link_id)

    def pop_oldest(self) -> W:
        link_id, queue = min(self._queues.items(), key=lambda entry: entry[1][0].arrived_s)
        return self._take(link_id, queue)

    def oldest_s(self) -> float:
        return min(queue[0].arrived_s for queue in self._queues.values())

    def pop_like(self, call: Call, pairs: int) -> W | None:
        """A request at the head of some link with that layer and mode and at most `pairs`."""
        for link_id, queue in self._queues.items():
            head = queue[0].call
            if head.layer == call.layer and head.mode == call.mode and head.pairs <= pairs:
                return self._take(link_id, queue)
        return None

    def _take(self, link_id: int, queue: deque[W]) -> W:
        item = queue.popleft()
        self._deficit[link_id] -= item.call.pairs
        if not queue:  # an idle link saves nothing up, and owes nothing
            del self._queues[link_id], self._deficit[link_id]
        return item

    def drop(self, link_id: int) -> list[W]:
        self._deficit.pop(link_id, None)
        return list(self._queues.pop(link_id, ()))

    def __iter__(self) -> Iterator[W]:
        return (item for queue in self._queues.values() for item in queue)


class FairQueue(Generic[W]):
    """Requests that wait for the compute thread. Not thread-safe."""

    def __init__(self, fairness: Fairness) -> None:
        self._fairness = fairness
        self._decode: _RoundRobin[W] = _RoundRobin(fairness.quantum_pairs)
        self._prefill: _RoundRobin[W] = _RoundRobin(fairness.quantum_pairs)
        self._aged_last = False
        self.count = 0  # requests waiting
        self._single: W | None = None  # the usual case: one waits, nothing to choose
        self.pairs = 0  # waiting altogether
        self.experts = 0

    def __len__(self) -> int:
        return self.count

    def push(self, item: W) -> None:
        """Append a request to its link's queue."""
        self.count += 1
        self.pairs += item.call.pairs
        self.experts += item.call.experts
        if self.count == 1:
            self._single = item
            return
        if self._single is not None:
            self._sort_in(self._single)
            self._single = None
        self._sort_in(item)

    def _sort_in(self, item: W) -> None:
        small = item.call.tokens <= self._fairness.decode_tokens
        (self._decode if small else self._prefill).push(item)

    def pop(self, now_s: float) -> list[W]:
        """The next request and those to serve with it; [] when none waits."""
        if self._single is not None:
            first, self._single = self._single, None
            taken = [first]
        elif not self.count:
            return []
        else:
            ring = self._choose(now_s)
            first = ring.pop_oldest() if self._aged_last else ring.pop()
            taken = self._with_its_like(ring, first)
        for item in taken:
            self._forget(item)
        return taken

    def pop_decode(self) -> list[W]:
        """The next small requests, those that pass a large one by; [] when none waits."""
        single = self._single
        if single is not None:
            if single.call.tokens > self._fairness.decode_tokens:
                return []
            self._single = None
            taken = [single]
        elif not self._decode:
            return []
        else:
            taken = self._with_its_like(self._decode, self._decode.pop())
        for item in taken:
            self._forget(item)
        return taken

    def _with_its_like(self, ring: _RoundRobin[W], first: W) -> list[W]:
        taken = [first]
        room = self._fairness.merge_pairs - first.call.pairs
        while room > 0 and ring and (more := ring.pop_like(first.call, room)) is not None:
            taken.append(more)
            room -= more.call.pairs
        return taken

    def _choose(self, now_s: float) -> _RoundRobin[W]:
        if not self._prefill or not self._decode:
            self._aged_last = False
            return self._decode or self._prefill
        aged = now_s - self._prefill.oldest_s() > self._fairness.max_wait_s
        self._aged_last = aged and not self._aged_last
        return self._prefill if self._aged_last else self._decode

    def _forget(self, item: W) -> None:
        self.count -= 1
        self.pairs -= item.call.pairs
        self.experts -= item.call.experts

    def drop(self, link_id: int) -> None:
        """Forget everything a link has waiting."""
        if self._single is not None:
            if self._single.link_id == link_id:
                self._forget(self._single)
                self._single = None
            return
        for item in self._decode.drop(link_id) + self._prefill.drop(link_id):
            self._forget(item)
