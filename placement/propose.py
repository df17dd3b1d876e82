"""Proposals: for every layer the action that relieves its most pressed group most for its bytes.

First-order gains (placement/gains.py) of adding one of the group's busiest experts elsewhere, and
of swapping one with a lighter expert of another group, for all layers at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.gains import Gains
from placement.layout import Layout
from placement.pour import Poured
from placement.score import powered
from placement.types import Bools, Floats, Ints
from placement.victims import Victims

FAILS = 8  # a layer rests after so many proposals that did not pay
_TARGETS = 8  # groups looked at as new homes, least pressed first
_EXPERTS = 16  # experts of the pressed group looked at, busiest first
_HOPE = 0.3  # proposals promising this part of the margin are tried
_SOME = 6  # scenarios that swaps are estimated on: there are many swaps, and it is a first guess
_TOGETHER = 0.8  # what a replica on the same node is worth, where losses are to be survived


@dataclass(kw_only=True, eq=False)
class Proposal:
    net: float
    kind: int  # 0 add, 1 swap
    layer: int
    expert: int
    source: int
    target: int
    other: int
    price: float
    evicts: tuple[int, int, int] | None = None  # layer, expert, group given up
    instead: Proposal | None = None  # the swap to take when no bytes can be had


class Proposer:
    """Looks at a layout that its searcher changes: all arrays are shared, none is written but
    `fails`. tabu bool [L, E, G], fails int64 [L]."""

    def __init__(self, layout: Layout, tabu: Bools, fails: Ints) -> None:
        load, resident, rate = layout.load, layout.resident, layout.rate
        self.load, self.resident, self.allowed = load, resident, layout.allowed
        self.room, self.size, self.rate = layout.room, layout.size, rate
        self.price, self.margin, self.node = layout.price, layout.margin, layout.node
        self._held, self._tabu, self.fails = layout.held, tabu, fails
        layers, _, experts = load.shape
        self._groups = len(rate)
        self._mean_load = load.mean(1)
        # a group holds about so many experts of a layer: no need to look at more
        slots = float(resident.sum()) / max(layers * self._groups, 1)
        self._depth = int(min(_EXPERTS, np.ceil(1.5 * slots) + 2, experts))

    def propose(
        self, poured: Poured, score: Floats, copies: Ints, victims: Victims
    ) -> list[Proposal]:
        """The best action of each layer that promises to pay; others' `fails` say they rest."""
        live = np.flatnonzero(self.fails < FAILS)
        if not len(live):
            return []
        level = poured.level[live]  # [N, M, G]
        scale = np.maximum(level.max(2, keepdims=True), 1e-300)
        relative = level / scale
        pressure = powered(relative).mean(1)  # [N, G]
        source = pressure.argmax(1)
        size = self.size[live][:, None]
        has_room = (self.room[None, :] >= size) | victims.has_any[None, :]
        mean = relative.mean(1) + np.where(has_room, 0.0, 0.02) + np.where(self.allowed, 0, 1e6)
        mean[np.arange(len(live)), source] = np.inf
        width = min(_TARGETS, self._groups - 1)
        if width < 1:
            self.fails[:] = FAILS
            return []
        target = np.argpartition(mean, width - 1, axis=1)[:, :width]  # [N, T]
        flow, on_source = self._flows(poured, live, source, copies)  # [N, E, M]
        depth = self._depth
        busy = np.where(on_source, flow.mean(2), -1.0)
        expert = np.argpartition(-busy, depth - 1, axis=1)[:, :depth]  # [N, S]
        n = np.arange(len(live))[:, None]
        amount = np.where((busy[n, expert] > 0)[:, :, None], flow[n, expert], 0.0)  # [N, S, M]
        unit = np.maximum(scale[:, :, 0], 1e-300)  # [N, M]
        calc = Gains(self.rate, relative, unit, source, target)
        adds = calc.add(amount)  # [N, S, T]
        if self.node is not None:
            together = self.node[target] == self.node[source][:, None]
            adds = adds * np.where(together, _TOGETHER, 1.0)[:, None, :]
        price = self.size[live][:, None] * self.price[target]  # [N, T]
        closed = self.resident[live[:, None, None], expert[:, :, None], target[:, None, :]]
        closed = closed | self._tabu[live[:, None, None], expert[:, :, None], target[:, None, :]]
        closed |= ~self.allowed[target][:, None, :] | ~has_room[n, target][:, None, :]
        closed |= (amount.mean(2) <= 0)[:, :, None]
        add_net = np.where(closed, -np.inf, adds - price[:, None, :])
        best_add = add_net.reshape(len(live), -1).argmax(1)
        some = slice(None, None, -(-self.load.shape[1] // _SOME))
        calc = Gains(self.rate, relative[:, some], unit[:, some], source, target)
        swap_net, swap_price, partner = self._swaps(
            live, source, target, expert, amount[:, :, some], calc, copies, some
        )
        best_swap = swap_net.reshape(len(live), -1).argmax(1)
        found = []
        floor = _HOPE * self.margin * score  # the estimate is first order and cautious
        for i, layer in enumerate(live.tolist()):
            s, t = divmod(int(best_add[i]), width)
            s2, rest = divmod(int(best_swap[i]), width * partner.shape[2])
            t2, f2 = divmod(rest, partner.shape[2])
            add = Proposal(
                net=float(add_net[i, s, t]),
                kind=0,
                layer=layer,
                expert=int(expert[i, s]),
                source=int(source[i]),
                target=int(target[i, t]),
                other=-1,
                price=float(price[i, t]),
            )
            swap = Proposal(
                net=float(swap_net[i, s2, t2, f2]),
                kind=1,
                layer=layer,
                expert=int(expert[i, s2]),
                source=int(source[i]),
                target=int(target[i, t2]),
                other=int(partner[i, t2, f2]),
                price=float(swap_price[i, t2]),
            )
            best = add if add.net >= swap.net else swap
            if best.net <= floor[layer]:
                self.fails[layer] = FAILS
                continue
            if best is add and swap.net > floor[layer]:
                add.instead = swap
            found.append(best)
        return found

    def _flows(
        self, poured: Poured, live: Ints, source: Ints, copies: Ints
    ) -> tuple[Floats, Bools]:
        """Pairs/s of each expert on the pressed group, [N, E, M], and which experts are there."""
        on_source = self.resident[live, :, source]  # [N, E]
        single = on_source & (copies[live] == 1)
        flow = np.where(single[:, :, None], self.load[live].transpose(0, 2, 1), 0.0)
        if poured.rep.shape[1]:
            here = poured.hosts[live] == source[:, None, None]  # [N, R, C]
            part = (poured.flow[live] * here[:, :, None, :]).sum(3)  # [N, R, M]
            n, r = np.nonzero(here.any(2))
            flow[n, poured.rep[live][n, r]] = part[n, r]
        return flow, on_source

    def _swaps(
        self,
        live: Ints,
        source: Ints,
        target: Ints,
        expert: Ints,
        amount: Floats,
        calc: Gains,
        copies: Ints,
        some: slice,
    ) -> tuple[Floats, Floats, Ints]:
        """Net gains [N, S, T, F] of swapping expert s for the f-th lightest single of target t,
        over `some` of the scenarios."""
        n = np.arange(len(live))[:, None]
        single = copies[live] == 1
        there = self.resident[live[:, None], :, target] & single[:, None, :]  # [N, T, E]
        weight = np.where(there, self._mean_load[live][:, None, :], np.inf)
        depth = self._depth
        partner = np.argpartition(weight, depth - 1, axis=2)[:, :, :depth]  # [N, T, F]
        real = np.isfinite(np.take_along_axis(weight, partner, 2))
        back = self.load[live][:, some].transpose(0, 2, 1)[n[:, :, None], partner]  # [N, T, F, M]
        gain = calc.swap(amount, back)
        price = self.size[live][:, None] * (self.price[target] + self.price[source][:, None])
        can = single[n, expert][:, :, None, None] & real[:, None, :, :]
        can &= self.allowed[target][:, None, :, None] & self.allowed[source][:, None, None, None]
        tabu = self._tabu[live[:, None, None], expert[:, :, None], target[:, None, :]]
        can = can & ~tabu[..., None] & (amount.mean(2) > 0)[:, :, None, None]
        if self._held is not None:
            pinned, barred = self._held.pinned[live], self._held.barred[live]
            rows = np.arange(len(live))[:, None]
            can &= ~pinned[rows, expert, source[:, None]][:, :, None, None]
            stuck = pinned[rows[:, :, None], partner, target[:, :, None]]
            stuck |= barred[rows[:, :, None], partner, source[:, None, None]]
            can &= ~stuck[:, None]
        net = np.where(can, gain - price[:, None, :, None], -np.inf)
        return net, price, partner
