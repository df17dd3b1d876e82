"""Loads that fail: when they are tried again, and from where they are kept away meanwhile.

A load that fails is tried again after a pause that grows. What fails again (an expert nobody
serves: what has failed once) is barred from its group for a while. A group on which copies fail
too, one as the other, takes nothing new; one that only fails to read the checkpoint (a bad disk)
nothing that nobody serves. Plans do without (placement/around.py). Bars end by themselves, so that
a mended disk is of use again, and last longer each time. What comes in after all ends them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from placement.types import Bools

Cell = tuple[int, int, str]  # layer, expert, group id
_BAR_AFTER = 2  # failures of a replica that others serve meanwhile
_ALL_FAIL = 2  # different replicas that failed, without one that came in between: it is the group
_MOST_PAUSES = 6  # doublings
_MOST_BARS = 3


@dataclass(kw_only=True)
class _Failed:
    count: int = 0
    retry_at_s: float = 0.0
    barred_until_s: float = 0.0
    barred: bool = False  # it was, and is until then, also when others serve it meanwhile


@dataclass(kw_only=True)
class _Bar:
    cells: set[Cell] = field(default_factory=set)
    count: int = 0  # in a row
    until_s: float = -np.inf

    def failed(self, cell: Cell, now: float, bar_s: float) -> None:
        self.cells.add(cell)
        if len(self.cells) >= _ALL_FAIL and now >= self.until_s:
            self.until_s = now + bar_s * 2 ** min(self.count, _MOST_BARS)
            self.count += 1


@dataclass(kw_only=True)
class _Group:
    """What failed since something came in, and the bars that follow."""

    read: _Bar = field(default_factory=_Bar)  # nobody served it: the checkpoint alone
    all: _Bar = field(default_factory=_Bar)


@dataclass(kw_only=True)
class Failing:
    """retry_s: the first pause; bar_s: the first bar."""

    retry_s: float = 5.0
    bar_s: float = 60.0
    _cells: dict[Cell, _Failed] = field(default_factory=dict)
    _groups: dict[str, _Group] = field(default_factory=dict)
    _fresh: dict[Cell, float] = field(default_factory=dict)  # not looked at yet, and when

    def __bool__(self) -> bool:
        """Something has failed and not come in since."""
        return bool(self._cells)

    def failed(self, cell: Cell, now: float) -> None:
        """A load ended in an error, from the checkpoint too."""
        seen = self._cells.setdefault(cell, _Failed())
        seen.count += 1
        seen.retry_at_s = now + self.retry_s * 2 ** min(seen.count - 1, _MOST_PAUSES)
        seen.barred_until_s = now + self.bar_s * 2 ** min(seen.count - 1, _MOST_BARS)
        self._fresh[cell] = now

    def came(self, cell: Cell) -> None:
        """A replica is ready: earlier failures of it, and of its group, count no more."""
        self._cells.pop(cell, None)
        self._groups.pop(cell[2], None)
        self._fresh = {c: at for c, at in self._fresh.items() if c[2] != cell[2]}

    def may_try(self, cell: Cell, now: float) -> bool:
        """The pause after its last failure is over."""
        return cell not in self._cells or now >= self._cells[cell].retry_at_s

    def only(self, groups: frozenset[str]) -> None:
        """What others than `groups` failed at is forgotten: they are gone, or start anew."""
        self._cells = {c: seen for c, seen in self._cells.items() if c[2] in groups}
        self._groups = {g: seen for g, seen in self._groups.items() if g in groups}
        self._fresh = {c: at for c, at in self._fresh.items() if c[2] in groups}

    def troubled(self, group: str) -> bool:
        """Something has failed there that has not come in since."""
        return any(cell[2] == group for cell in self._cells)

    def bars(self, ids: tuple[str, ...], ready: Bools, now: float) -> Bools:
        """Replicas that are not to be loaded now, bool [L, E, G] in the order of `ids`."""
        index = {group: g for g, group in enumerate(ids)}
        served: Bools = ready.sum(2) > 0
        for cell, at in self._fresh.items():
            seen_of = self._groups.setdefault(cell[2], _Group())
            seen_of.read.failed(cell, at, self.bar_s)
            if served[cell[0], cell[1]]:
                seen_of.all.failed(cell, at, self.bar_s)
        self._fresh.clear()
        barred = np.zeros(ready.shape, np.bool_)
        for group, of_group in self._groups.items():
            if group in index and now < of_group.all.until_s:
                barred[:, :, index[group]] = True
            elif group in index and now < of_group.read.until_s:
                barred[:, :, index[group]] |= ~served
        for (layer, expert, group), seen in self._cells.items():
            enough = _BAR_AFTER if served[layer, expert] else 1
            seen.barred = now < seen.barred_until_s and (seen.barred or seen.count >= enough)
            if seen.barred and group in index:
                barred[layer, expert, index[group]] = True
        return barred & ~ready
