"""A copy that came stays for a while, one that went stays away: no flapping for gain.

What is owed (a lost, drained or shrunk group) does not wait; only actions for gain do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.types import Bools, Placement

Cell = tuple[int, int, str]  # layer, expert, group id


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """What a plan may not do for gain.

    pinned  bool [L, E, G], copies that came lately: not to be given up
    barred  bool [L, E, G], copies given up lately: not to be loaded again
    """

    pinned: Bools
    barred: Bools

    def allows(self, loads: Bools, drops: Bools) -> bool:
        """Whether a plan with these loads and drops [L, E, G] keeps to it."""
        return not bool((loads & self.barred).any() or (drops & self.pinned).any())


class Dwell:
    """Remembers which copies came or went in the last `dwell_s` seconds, by group id."""

    def __init__(self, dwell_s: float) -> None:
        self.dwell_s = dwell_s
        self._came: dict[Cell, float] = {}
        self._went: dict[Cell, float] = {}

    def note(self, old: Placement, new: Placement, ids: tuple[str, ...], now: float) -> None:
        """The target changed from old to new (in the order of `ids`) at `now`."""
        for source, target, since, other in (
            (old, new, self._came, self._went),
            (new, old, self._went, self._came),
        ):
            for layer, expert, group in np.argwhere(target.resident & ~source.resident).tolist():
                cell = (layer, expert, ids[group])
                since[cell] = now
                other.pop(cell, None)

    def held(self, shape: tuple[int, int, int], ids: tuple[str, ...], now: float) -> Held | None:
        """What still dwells at `now` [L, E, G]; None when nothing does."""
        index = {group: g for g, group in enumerate(ids)}
        masks = []
        for since in (self._came, self._went):
            for cell in [c for c, at in since.items() if now - at >= self.dwell_s]:
                del since[cell]
            mask = np.zeros(shape, np.bool_)
            for layer, expert, group in since:
                if group in index:
                    mask[layer, expert, index[group]] = True
            masks.append(mask)
        if not masks[0].any() and not masks[1].any():
            return None
        return Held(pinned=masks[0], barred=masks[1])
