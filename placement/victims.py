"""Which replicas would be missed least: the ones to give up when bytes are short."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.pour import Poured
from placement.score import POWER, norms, powered
from placement.types import Bools, Floats, Ints


@dataclass(frozen=True, kw_only=True, eq=False)
class Victims:
    """Replicas of replicated experts, sorted by group and then by how much they would be missed.

    missed   float64 [V], rise of the layer's score when the replica goes (first order)
    layer, expert, group  int64 [V]
    start    int64 [G + 1], where each group's part begins
    ranked   int64 [V], all of them, least missed first
    """

    missed: Floats
    layer: Ints
    expert: Ints
    group: Ints
    start: Ints
    ranked: Ints

    @property
    def has_any(self) -> Bools:
        """Groups with at least one, bool [G]."""
        found: Bools = self.start[1:] > self.start[:-1]
        return found


def least_missed(poured: Poured, copies: Ints, rate: Floats) -> Victims:
    """copies int64 [L, E], rate float64 [G]. The replica's tokens would go to the other hosts."""
    groups = len(rate)
    rep, hosts = poured.rep, poured.hosts
    row = np.arange(len(copies))[:, None]
    if not rep.shape[1]:
        none = np.zeros(0, np.int64)
        start = np.zeros(groups + 1, np.int64)
        return Victims(
            missed=np.zeros(0), layer=none, expert=none, group=none, start=start, ranked=none
        )
    rates = np.append(rate, 0.0)[hosts]  # [L, R, C]
    others = np.maximum(rates.sum(2, keepdims=True) - rates, 1e-300)
    level = poured.level.mean(1)  # [L, G]; the mean over scenarios is near enough here
    top = np.maximum(level.max(1), 1e-300)[:, None, None]
    flow = poured.flow.mean(2) / top  # [L, R, C]
    wide = np.concatenate([level, np.zeros((len(level), 1))], 1)
    held = wide[row[:, :, None], hosts] / top  # [L, R, C]
    work = held * rates
    around = (work.sum(2, keepdims=True) - work) / others
    left = held - flow / np.maximum(rates, 1e-300)
    change = others * (powered(around + flow / others) - powered(around))
    change += rates * (powered(left) - powered(held))
    norm = np.maximum(norms(level / top[:, 0], rate), 1e-3)[:, None, None]
    slope = top * norm ** (1 - POWER) / (POWER * rate.sum())
    # a replica that carries nothing yet may still be of use: the busier, the more
    missed = np.maximum(change * slope, 0.0) + 1e-3 * flow * top / rate.sum()
    is_rep = copies[row, rep] > 1
    layer, r, c = np.nonzero((hosts < groups) & is_rep[:, :, None])
    group, value = hosts[layer, r, c], missed[layer, r, c]
    order = np.lexsort((value, group))
    return Victims(
        missed=value[order],
        layer=layer[order],
        expert=rep[layer, r][order],
        group=group[order],
        start=np.searchsorted(group[order], np.arange(groups + 1)),
        ranked=np.argsort(value[order], kind="stable"),
    )
