"""The per-batch split: how many tokens of each expert go to which of its replicas.

The router knows a batch's counts before it sends anything, so it can level the groups of this
very batch. Minimises max_g alpha_g + n_g / speed_g + gamma_g * a_g (n_g pairs, a_g active
experts) by exact steps, one replicated expert at a time: with all others fixed, its tokens are
poured over its replicas (water-filling), opening a further replica only when that lowers the
level. Repeated until nothing moves or the level meets its lower bound.
"""

from __future__ import annotations

import numpy as np

from placement.errors import PlacementError
from placement.table import Table
from placement.types import Bools, Floats, Ints

_SWEEPS = 6
_CLOSE = 1.002  # stop within 0.2 % of the bound: a further sweep costs more than it gains


class LayerSplit:
    """One layer of a table, prepared for splitting batch after batch."""

    def __init__(self, resident: Bools, speed: Floats, alpha_s: Floats, gamma_s: Floats) -> None:
        """resident bool [E, G] (ready replicas); speed, alpha_s, gamma_s float64 [G]."""
        copies = resident.sum(1)
        self.experts, self.groups = resident.shape
        first = resident.argmax(1).astype(np.int64)
        self.home: Ints = np.where(copies > 0, first, -1)  # [E]
        self._rows = np.arange(self.experts)
        self._single = np.where(copies == 1, self.home, self.groups)  # others go to a spare column
        self._missing = np.flatnonzero(copies == 0)
        self._replicated = np.flatnonzero(copies > 1)
        # scalars in lists: with few replicated experts one numpy call costs as much as a whole step
        self._hosts = [np.flatnonzero(resident[e]).tolist() for e in self._replicated]
        self._per_pair_s: list[float] = (1.0 / speed).tolist()
        self._per_pair = 1.0 / speed
        self._alpha_s = alpha_s
        self._gamma_s: list[float] = gamma_s.tolist()
        self._gamma = gamma_s
        self._rate = float(speed.sum())

    def split(self, counts: Ints) -> Ints:
        """counts int64 [E] -> int64 [E, G]; rows sum to counts, only on ready replicas.

        Raises PlacementError when an active expert has no ready replica.
        """
        if len(self._missing) and counts[self._missing].any():
            lost = self._missing[counts[self._missing] > 0]
            raise PlacementError(f"experts {lost.tolist()} have tokens and no ready replica")
        out = np.zeros((self.experts, self.groups + 1), np.int64)
        out[self._rows, self._single] = counts
        if len(self._replicated):
            active = counts[self._replicated]
            if active.any():
                out[:, -1] = 0
                self._pour(out, active.tolist())
        return out[:, :-1]

    def _pour(self, out: Ints, tokens: list[int]) -> None:
        fixed = out[:, :-1]
        pairs = fixed.sum(0)
        level_s = self._alpha_s + pairs * self._per_pair + self._gamma * np.count_nonzero(fixed, 0)
        levels: list[float] = level_s.tolist()
        active = sorted(
            (i for i, n in enumerate(tokens) if n), key=lambda i: (-tokens[i], len(self._hosts[i]))
        )
        bound = max(max(levels), self._bound(level_s, float(sum(tokens))))
        poured: dict[int, list[int]] = {}
        for _ in range(_SWEEPS):
            moved = False
            for i in active:
                before = poured.get(i)
                after = self._pour_one(levels, self._hosts[i], tokens[i], before, bound)
                if after != before:
                    poured[i] = after
                    moved = True
            if not moved or max(levels) <= bound * _CLOSE:
                break
        for i, parts in poured.items():
            out[self._replicated[i], self._hosts[i]] = parts

    def _bound(self, level_s: Floats, tokens: float) -> float:
        """No split ends below this: all groups level, no further replica opened."""
        speed = 1.0 / self._per_pair
        return float(((level_s * speed).sum() + tokens) / self._rate)

    def _pour_one(
        self,
        levels: list[float],
        hosts: list[int],
        tokens: int,
        before: list[int] | None,
        bound_s: float,
    ) -> list[int]:
        """Take one expert's tokens out of `levels` and pour them back; returns [hosts] tokens."""
        per_pair, gamma = self._per_pair_s, self._gamma_s
        if before is not None:
            for g, n in zip(hosts, before, strict=True):
                if n:
                    levels[g] -= n * per_pair[g] + gamma[g]
        # all on the replica that ends lowest
        ends = [levels[g] + gamma[g] + tokens * per_pair[g] for g in hosts]
        best_s = min(ends)
        parts = [0] * len(hosts)
        parts[ends.index(best_s)] = tokens
        # a further replica costs a read of its weights: only to bring the slowest group down
        if tokens > 1 and best_s > bound_s:
            opened = sorted(range(len(hosts)), key=lambda j: levels[hosts[j]] + gamma[hosts[j]])
            rate = weight = 0.0
            for count, j in enumerate(opened, 1):
                g = hosts[j]
                base = levels[g] + gamma[g]
                if count > 1 and base >= best_s:
                    break
                rate += 1.0 / per_pair[g]
                weight += base / per_pair[g]
                end = (tokens + weight) / rate
                if count > 1 and end < best_s and end >= base:
                    tried = _whole(opened[:count], hosts, levels, per_pair, gamma, end, tokens)
                    level = max(
                        levels[hosts[k]] + gamma[hosts[k]] + n * per_pair[hosts[k]]
                        for k, n in tried.items()
                        if n
                    )
                    if level < best_s:
                        best_s = level
                        parts = [tried.get(k, 0) for k in range(len(hosts))]
        for g, n in zip(hosts, parts, strict=True):
            if n:
                levels[g] += n * per_pair[g] + gamma[g]
        return parts


def _whole(
    opened: list[int],
    hosts: list[int],
    levels: list[float],
    per_pair: list[float],
    gamma: list[float],
    end_s: float,
    tokens: int,
) -> dict[int, int]:
    """Whole tokens for the opened replicas near level `end_s`; the rest where it ends lowest."""
    parts: dict[int, int] = {}
    left = tokens
    for j in opened:
        g = hosts[j]
        n = min(left, max(0, int((end_s - levels[g] - gamma[g]) / per_pair[g])))
        parts[j] = n
        left -= n
    while left:
        j = min(
            opened,
            key=lambda k: levels[hosts[k]] + gamma[hosts[k]] + (parts[k] + 1) * per_pair[hosts[k]],
        )
        parts[j] += 1
        left -= 1
    return parts


class TableSplit:
    """All layers of a table, prepared once; `split` is the router's hot path."""

    def __init__(self, table: Table) -> None:
        self.layers = [
            LayerSplit(resident, table.speed, table.alpha_s, table.gamma_s)
            for resident in table.resident
        ]
        self.home: Ints = np.stack([layer.home for layer in self.layers])  # [L, E]

    def split(self, layer: int, counts: Ints) -> Ints:
        """counts int64 [E] of one layer -> tokens of each expert per group, int64 [E, G]."""
        return self.layers[layer].split(counts)
