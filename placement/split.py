"""The per-batch split: how many tokens of each expert go to which of its replicas.

The router knows a batch's counts before it sends anything, so it can level the groups of this
very batch. Minimises max_g alpha_g + n_g / speed_g + gamma_g * a_g (n_g pairs, a_g active
experts); a further replica of an expert is opened only where that brings the slowest group down.

Experts one after the other, those on few groups first and of those the busy ones first (longest
processing time): whole to the group that would end first, or cut where no split of the batch
could end sooner. Then tokens of the slowest group move on until it ends there too
(placement/even.py). All of it in scalars: an array call costs as much as a whole step.
"""

from __future__ import annotations

import numpy as np

from placement.errors import PlacementError
from placement.even import Ways, even_out
from placement.table import Table
from placement.types import Bools, Floats, Ints

_CLASS = 1 << 40  # more tokens than a batch has: experts sort by copies first


class LayerSplit:
    """One layer of a table, prepared for splitting batch after batch."""

    def __init__(
        self,
        resident: Bools,
        speed: Floats,
        alpha_s: Floats,
        gamma_s: Floats,
        share: Floats | None = None,
    ) -> None:
        """resident bool [E, G] (ready replicas); speed, alpha_s, gamma_s float64 [G].

        share  float64 [E, G], the plan's; not needed any more.
        """
        copies = resident.sum(1)
        self.experts, self.groups = resident.shape
        first = resident.argmax(1).astype(np.int64)
        self.home: Ints = np.where(copies > 0, first, -1)  # [E]
        self._single = np.flatnonzero(copies == 1)
        self._single_home = self.home[self._single]
        self._single_cell = self._single * self.groups + self._single_home
        # seconds that a pair, and an active expert, of each single puts on each group
        at_home = np.arange(self.groups) == self._single_home[:, None]
        self._single_s = at_home / speed
        self._single_open_s = at_home * gamma_s
        self._missing = np.flatnonzero(copies == 0)
        self._replicated = np.flatnonzero(copies > 1)
        self._class = copies[self._replicated].astype(np.int64) * _CLASS
        self._speed, self._alpha_s = speed, alpha_s
        self._rate = float(speed.sum())
        self._priced = bool(gamma_s.any())
        # what opening the cheapest replica takes, in pairs: every active expert is open somewhere
        self._knee = float((gamma_s * speed).min())
        hosts = [np.flatnonzero(resident[e]).tolist() for e in self._replicated]
        rows = self._replicated.tolist()
        per: list[float] = (1.0 / speed).tolist()
        gamma: list[float] = gamma_s.tolist()
        groups = self.groups
        self._hosts = [
            [(g, row * groups + g, per[g], gamma[g]) for g in own]
            for row, own in zip(rows, hosts, strict=True)
        ]
        self._ways = Ways.of(rows, hosts, per, gamma)

    def split(self, counts: Ints) -> Ints:
        """counts int64 [E] -> int64 [E, G]; rows sum to counts, only on ready replicas.

        Raises PlacementError when an active expert has no ready replica.
        """
        if len(self._missing) and counts[self._missing].any():
            lost = self._missing[counts[self._missing] > 0]
            raise PlacementError(f"experts {lost.tolist()} have tokens and no ready replica")
        out = np.zeros((self.experts, self.groups), np.int64)
        flat = out.reshape(-1)
        fixed = counts[self._single]
        flat[self._single_cell] = fixed
        if not len(self._replicated):
            return out
        tokens = counts[self._replicated]
        order = (self._class - tokens).argsort().tolist()
        given = tokens.tolist()
        total = sum(given)
        if not total:
            return out
        level_s = fixed @ self._single_s
        level_s += self._alpha_s
        if self._priced:
            level_s += (fixed > 0) @ self._single_open_s
        levels = level_s.tolist()
        # no split ends below this: all groups level, every active expert open once
        least = total + self._knee * (len(given) - given.count(0)) if self._priced else total
        bound = max((float(level_s @ self._speed) + least) / self._rate, max(levels))
        cells = flat.data
        self._place(cells, levels, given, order, bound)
        even_out(cells, levels, self._ways, bound)
        return out

    def _place(
        self,
        cells: memoryview,
        levels: list[float],
        tokens: list[int],
        order: list[int],
        bound: float,
    ) -> None:
        """Each expert whole to where it ends first, unless that is beyond the bound."""
        far = float("inf")
        for i in order:
            n = tokens[i]
            if not n:
                continue
            hosts = self._hosts[i]
            if len(hosts) == 2:  # the usual case: half the time unrolled
                (group, cell, per, opens), (g, at, per_2, opens_2) = hosts
                best = levels[group] + n * per + opens
                end = levels[g] + n * per_2 + opens_2
                if end < best:
                    best, group, cell = end, g, at
            else:
                best, group, cell = far, -1, -1
                for g, at, per, opens in hosts:
                    end = levels[g] + n * per + opens
                    if end < best:
                        best, group, cell = end, g, at
            if best <= bound:
                cells[cell] = n
                levels[group] = best
            else:
                self._cut(cells, levels, i, n, bound)

    def _cut(
        self, cells: memoryview, levels: list[float], i: int, tokens: int, bound: float
    ) -> None:
        """Fill the expert's groups up to the bound, lowest first; the rest where it ends first."""
        hosts = self._hosts[i]
        if len(hosts) > 2:
            hosts = sorted(hosts, key=lambda host: levels[host[0]])
        elif levels[hosts[0][0]] > levels[hosts[1][0]]:
            hosts = hosts[::-1]
        left = tokens
        for g, cell, per, opens in hosts:
            n = int((bound - levels[g] - opens) / per)
            if n < 1 or n * per < opens:
                continue  # no room, or less than opening the replica there takes
            n = min(n, left)
            cells[cell] = n
            levels[g] += n * per + opens
            left -= n
            if not left:
                return
        best, found = float("inf"), hosts[0]
        for host in hosts:
            g, cell, per, opens = host
            end = levels[g] + left * per + (0.0 if cells[cell] else opens)
            if end < best:
                best, found = end, host
        g, cell, _, _ = found
        cells[cell] += left
        levels[g] = best


class TableSplit:
    """All layers of a table, prepared once; `split` is the router's hot path."""

    def __init__(self, table: Table) -> None:
        self.layers = [
            LayerSplit(resident, table.speed, table.alpha_s, table.gamma_s, share)
            for resident, share in zip(table.resident, table.share, strict=True)
        ]
        self.home: Ints = np.stack([layer.home for layer in self.layers])  # [L, E]

    def split(self, layer: int, counts: Ints) -> Ints:
        """counts int64 [E] of one layer -> tokens of each expert per group, int64 [E, G]."""
        return self.layers[layer].split(counts)
