"""Lanes: copies of decoding sequences' keys and values that lie ready for attention.

Paged keys must be gathered before CPU attention can read them, every step and every layer; that
costs as much as the attention. So a sequence that decodes gets a lane: a stretch of memory with
room for `capacity` tokens, filled once from its blocks, in which each step writes one row. Lanes
of one capacity form a shelf, which is attended in one call. The blocks stay the truth: a lane can
be dropped and filled again at any time, and sequences beyond the lanes' budget are gathered.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

from raymoe.engine.sequence import Sequence

ROOM_STEP = 8
"""Lanes by which a shelf grows: each growth copies the shelf once."""


@dataclass(slots=True, kw_only=True, eq=False)
class Shelf:
    """Lanes 0..len(members)-1, all in use; room for `rooms`; `fresh` ones must be filled."""

    capacity: int
    members: list[Sequence] = field(default_factory=list)
    rooms: int = 0
    fresh: set[int] = field(default_factory=set)

    @property
    def longest(self) -> int:
        """Keys that the longest member sees in this step."""
        return max(one.computed + 1 for one in self.members)

    def padding(self, keys: int) -> int:
        """Keys that one attention call would read in vain with one more member of `keys` keys."""
        lengths = [one.computed + 1 for one in self.members] + [keys]
        return max(lengths) * len(lengths) - sum(lengths)


class Lanes:
    """Which decoding sequence has which lane. Pure book-keeping.

    budget_tokens: tokens that all lanes together may have room for; split_tokens: padding keys
    that cost as much as one more attention call.
    """

    def __init__(self, budget_tokens: int, split_tokens: int) -> None:
        self._budget_tokens = budget_tokens
        self._split_tokens = split_tokens
        self._shelves: dict[int, Shelf] = {}
        self._home: dict[Sequence, Shelf] = {}

    def place(self, decode: Rows[Sequence]) -> list[Shelf]:
        """The shelves for a step with these decode rows; those not on one are to be gathered."""
        active = set(decode)
        for shelf in list(self._shelves.values()):
            shelf.fresh.clear()
            self._leave(shelf, active)
        for one in decode:
            if one not in self._home:
                self._enter(one)
        return list(self._shelves.values())

    def clear(self) -> None:
        """Forget all lanes: what they hold is not certain any more."""
        self._shelves.clear()
        self._home.clear()

    def _leave(self, shelf: Shelf, active: set[Sequence]) -> None:
        """Free the lanes of those that left or outgrew theirs; the last lane closes each gap."""
        members, lane = shelf.members, 0
        while lane < len(members):
            one = members[lane]
            if one in active and one.computed < shelf.capacity:
                lane += 1
                continue
            del self._home[one]
            last = members.pop()
            if last is not one:
                members[lane] = last
                shelf.fresh.add(lane)
            shelf.fresh.discard(len(members))
        if not members:
            del self._shelves[shelf.capacity]
        elif shelf.rooms >= len(members) + 2 * ROOM_STEP:
            shelf.rooms -= ROOM_STEP

    def _enter(self, one: Sequence) -> None:
        keys = one.computed + 1
        fitting = sorted(each for each in self._shelves if each >= keys)
        for capacity in fitting:
            shelf = self._shelves[capacity]
            if shelf.padding(keys) <= self._split_tokens and self._put(one, shelf):
                return
        capacity = capacity_for(keys)
        self._put(one, self._shelves.get(capacity) or Shelf(capacity=capacity))

    def _put(self, one: Sequence, shelf: Shelf) -> bool:
        """Give a sequence the next lane of a shelf, if the budget has room for it."""
        if len(shelf.members) == shelf.rooms:
            taken = sum(each.rooms * each.capacity for each in self._shelves.values())
            if taken + ROOM_STEP * shelf.capacity > self._budget_tokens:
                return False
            shelf.rooms += ROOM_STEP
        self._shelves[shelf.capacity] = shelf
        shelf.fresh.add(len(shelf.members))
        shelf.members.append(one)
        self._home[one] = shelf
        return True


def capacity_for(keys: int) -> int:
    """The least of 64, 96, 128, 192, 256, 384, ... that is greater than `keys`."""
    power = 64
    while power <= keys:
        power *= 2
    middle = power // 4 * 3
    return middle if power > 64 and keys < middle else power
