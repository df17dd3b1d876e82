"""The per-batch split: how many tokens of each expert go to which of its replicas.

The router knows a batch's counts before it sends anything, so it can level the groups of this
very batch. Minimises max_g alpha_g + n_g / speed_g + gamma_g * a_g (n_g pairs, a_g active
experts); a further replica of an expert is opened only where that brings the slowest group down.

Few replicated experts: exact steps in scalars, one expert at a time with the others fixed (a
numpy call costs as much as a whole step, so the loop is over those few experts, in lists). Many:
whole arrays; flows between groups that level all of them at once come from one small linear
system (damped Newton steps, placement/level.py), then a few scalar steps on the slowest group.
"""

from __future__ import annotations

import numpy as np

from placement.errors import PlacementError
from placement.level import Leveller
from placement.table import Table
from placement.types import Bools, Floats, Ints

_SWEEPS = 4
_CLOSE = 1.004  # stop within 0.4 % of the bound: a further step costs more than it gains
_STILL = 0.998  # a sweep that lowers the slowest group by less is the last
_FEW = 12  # replicated experts up to which scalar steps are faster than whole arrays
_FIXES = 12  # scalar steps after rounding


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

        share  float64 [E, G], where the array form starts from; None: by speed.
        """
        copies = resident.sum(1)
        self.experts, self.groups = resident.shape
        first = resident.argmax(1).astype(np.int64)
        self.home: Ints = np.where(copies > 0, first, -1)  # [E]
        self._single = np.flatnonzero(copies == 1)
        self._single_home = self.home[self._single]
        self._missing = np.flatnonzero(copies == 0)
        # fewest copies first: what can go anywhere then levels what cannot
        self._replicated = np.argsort(copies, kind="stable")[int((copies < 2).sum()) :]
        self._per_pair = 1.0 / speed
        self._speed = speed
        self._alpha_s, self._gamma = alpha_s, gamma_s
        self._rate = float(speed.sum())
        self._per_pair_s: list[float] = self._per_pair.tolist()
        self._gamma_s: list[float] = gamma_s.tolist()
        self._priced = bool(gamma_s.any())
        self._hosts: list[list[int]] = [
            np.flatnonzero(resident[e]).tolist() for e in self._replicated
        ]
        per, gamma = self._per_pair_s, self._gamma_s
        self._two = [(a, b, per[a], per[b], gamma[a], gamma[b]) for a, b in self._pairs()]
        self._twos = len(self._two)  # they come first
        self._leveller = None
        if len(self._replicated) > _FEW:
            mask = resident[self._replicated]
            start = mask * speed if share is None else share[self._replicated]
            self._leveller = Leveller(mask, start, speed)
            self._on_group = [np.flatnonzero(mask[:, g]).tolist() for g in range(self.groups)]

    def _pairs(self) -> list[tuple[int, int]]:
        return [(hosts[0], hosts[1]) for hosts in self._hosts if len(hosts) == 2]

    def split(self, counts: Ints) -> Ints:
        """counts int64 [E] -> int64 [E, G]; rows sum to counts, only on ready replicas.

        Raises PlacementError when an active expert has no ready replica.
        """
        if len(self._missing) and counts[self._missing].any():
            lost = self._missing[counts[self._missing] > 0]
            raise PlacementError(f"experts {lost.tolist()} have tokens and no ready replica")
        out = np.zeros((self.experts, self.groups), np.int64)
        fixed = counts[self._single]
        out[self._single, self._single_home] = fixed
        if not len(self._replicated):
            return out
        tokens = counts[self._replicated]
        total = int(tokens.sum())
        if not total:
            return out
        pairs = np.bincount(self._single_home, fixed, self.groups)
        level_s = self._alpha_s + pairs * self._per_pair
        if self._priced:
            used = self._single_home[fixed > 0]
            level_s = level_s + self._gamma * np.bincount(used, minlength=self.groups)
        # no split ends below this: all groups level, no further replica opened
        bound = max(float((level_s @ self._speed + total) / self._rate), float(level_s.max()))
        if self._leveller is None:
            self._pour(out, tokens.tolist(), level_s.tolist(), bound)
        else:
            self._level(out, tokens, level_s, bound)
        return out

    # -- few replicated experts --------------------------------------------------------------

    def _pour(self, out: Ints, tokens: list[int], levels: list[float], bound: float) -> None:
        poured: list[list[int] | None] = [None] * len(tokens)
        active = [i for i, n in enumerate(tokens) if n]
        enough = bound * _CLOSE
        last = float("inf")
        for _ in range(_SWEEPS):
            for i in active:
                if i < self._twos:
                    poured[i] = self._pour_two(levels, i, tokens[i], poured[i], bound)
                else:
                    hosts = self._hosts[i]
                    poured[i] = self._pour_many(levels, hosts, tokens[i], poured[i], bound)
            top = max(levels)
            if top <= enough or top > last * _STILL:
                break
            last = top
        for i in active:
            parts = poured[i]
            assert parts is not None
            out[self._replicated[i], self._hosts[i]] = parts

    def _pour_two(
        self, levels: list[float], i: int, tokens: int, before: list[int] | None, bound: float
    ) -> list[int]:
        """Take one expert's tokens out of `levels` and pour them back over its two groups."""
        a, b, per_a, per_b, open_a, open_b = self._two[i]
        low_a, low_b = levels[a], levels[b]
        if before is not None:
            on_a, on_b = before
            if on_a:
                low_a -= on_a * per_a + open_a
            if on_b:
                low_b -= on_b * per_b + open_b
        base_a, base_b = low_a + open_a, low_b + open_b
        all_a, all_b = base_a + tokens * per_a, base_b + tokens * per_b
        on_a, best = (tokens, all_a) if all_a <= all_b else (0, all_b)
        if best > bound:
            cut = int((all_b - base_a) / (per_a + per_b) + 0.5)
            if 0 < cut < tokens:
                end_a, end_b = base_a + cut * per_a, base_b + (tokens - cut) * per_b
                if end_a < best and end_b < best:
                    levels[a], levels[b] = end_a, end_b
                    return [cut, tokens - cut]
        if on_a:
            levels[a], levels[b] = all_a, low_b
            return [tokens, 0]
        levels[a], levels[b] = low_a, all_b
        return [0, tokens]

    def _pour_many(
        self,
        levels: list[float],
        hosts: list[int],
        tokens: int,
        before: list[int] | None,
        bound: float,
    ) -> list[int]:
        """The same over any number of groups: open the lowest ones while that lowers the end."""
        per_pair, gamma = self._per_pair_s, self._gamma_s
        if before is not None:
            for g, n in zip(hosts, before, strict=True):
                if n:
                    levels[g] -= n * per_pair[g] + gamma[g]
        lows = [levels[g] + gamma[g] for g in hosts]
        pers = [per_pair[g] for g in hosts]
        ends = [low + tokens * per for low, per in zip(lows, pers, strict=True)]
        best = min(ends)
        parts = [0] * len(hosts)
        parts[ends.index(best)] = tokens
        if tokens > 1 and best > bound:
            rate = weight = 0.0
            opened: list[int] = []
            for j in sorted(range(len(hosts)), key=lows.__getitem__):
                if opened and lows[j] >= (tokens + weight) / rate:
                    break
                rate += 1.0 / pers[j]
                weight += lows[j] / pers[j]
                opened.append(j)
            if len(opened) > 1:
                tried = _whole(opened, lows, pers, (tokens + weight) / rate, tokens)
                if max(lows[j] + n * pers[j] for j, n in enumerate(tried) if n) < best:
                    parts = tried
        for g, n in zip(hosts, parts, strict=True):
            if n:
                levels[g] += n * per_pair[g] + gamma[g]
        return parts

    # -- many replicated experts -------------------------------------------------------------

    def _level(self, out: Ints, tokens: Ints, level_s: Floats, bound: float) -> None:
        assert self._leveller is not None
        cut = self._leveller.level(tokens, level_s, bound)  # [R, G]
        if self._priced:
            self._gather(cut)
        level_s = level_s + cut.sum(0) * self._per_pair
        if self._priced:
            level_s = level_s + self._gamma * (cut > 0).sum(0)
        self._fix(cut, level_s.tolist(), bound * _CLOSE)
        out[self._replicated] = cut

    def _gather(self, cut: Ints) -> None:
        """Pieces too small to pay for reading the weights join their expert's largest piece."""
        knee = self._gamma * self._speed  # tokens that take as long as opening a replica
        largest = cut.argmax(1)
        row = np.arange(len(cut))
        small = (cut > 0) & (cut < knee)
        small[row, largest] = False
        moved = np.where(small, cut, 0).sum(1)
        cut[small] = 0
        cut[row, largest] += moved

    def _fix(self, cut: Ints, levels: list[float], enough: float) -> None:
        """Whole tokens from the slowest group to where they end lower, a few times."""
        per_pair, gamma, hosts = self._per_pair_s, self._gamma_s, self._hosts
        for _ in range(_FIXES):
            top = max(levels)
            if top <= enough:
                return
            g = levels.index(top)
            best, found = top, None
            pieces = cut[:, g].tolist()
            for i in self._on_group[g]:
                have = pieces[i]
                if not have:
                    continue
                for h in hosts[i]:
                    gap = top - levels[h]
                    n = min(have, int(gap / (per_pair[g] + per_pair[h])) or 1)
                    opens = gamma[h] if gamma[h] and not cut[i, h] else 0.0
                    end = max(top - n * per_pair[g], levels[h] + n * per_pair[h] + opens)
                    if h != g and end < best:
                        best, found = end, (i, h, n, opens)
            if found is None:
                return
            i, h, n, opens = found
            cut[i, g] -= n
            cut[i, h] += n
            levels[g] -= n * per_pair[g] + (gamma[g] if not cut[i, g] else 0.0)
            levels[h] += n * per_pair[h] + opens


def _whole(
    opened: list[int], lows: list[float], pers: list[float], end: float, tokens: int
) -> list[int]:
    """Whole tokens for the opened hosts near level `end`; the rest where it ends lowest."""
    parts = [0] * len(lows)
    left = tokens
    for j in opened:
        n = min(left, max(0, int((end - lows[j]) / pers[j])))
        parts[j] = n
        left -= n
    while left:
        j = min(opened, key=lambda k: lows[k] + (parts[k] + 1) * pers[k])
        parts[j] += 1
        left -= 1
    return parts


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
