"""Polish a layout by trying many small changes at random: swap, move, or another expert's copy.

The guided search (placement/search.py) takes what relieves the most pressed group most, and stops
where no such action pays. Much is left then when copies are few: a layer that can hardly split
must be packed for all loads that may come. So: in each round some candidates for every layer,
looked at quickly (placement/flows.py); the most promising are poured over all scenarios, and the
best of each layer is taken when it pays. Now and then layers trade: one gives up a copy so that
another may have one. With the forecast's scenarios this holds on the windows that follow
(docs/planning.md).

Only for fleets of a size where thousands of candidates can be looked at in the time of a plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.flows import Flows
from placement.layout import Layout
from placement.pour import Poured
from placement.score import layer_score
from placement.search import Change
from placement.tries import ANOTHER, DROP, MOVE, SWAP, Drawer, Tries
from placement.types import Floats, Ints

_EACH = 32  # candidates of a layer and round
_POURED = 3  # of them poured in full, the most promising
_HOPE = 0.02  # a first look may say so much too little, as a part of the layer's score
_RESTS = 15  # a layer rests after so many rounds in which nothing paid
_TRADES = 5  # rounds between two trades of copies
_KIND = {SWAP: "swap", MOVE: "move", ANOTHER: "replace"}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Best:
    """The most promising candidates [V], with everything poured.

    hosts, copies  their host lists [V, E, C], [V, E]; gain float64 [V], the fall of J
    """

    tries: Tries
    hosts: Ints
    copies: Ints
    poured: Poured
    gain: Floats


class Polisher:
    """Changes the layout it is given, in place.

    With `layout.node` no change brings all copies of an expert onto one node.
    """

    def __init__(self, layout: Layout, seed: int = 0) -> None:
        self.layout = layout
        self.resident, self.room = layout.resident, layout.room
        self.pool, self.loaded = layout.pool, 0
        self.changes: list[Change] = []
        self._fails = np.zeros(len(layout.load), np.int64)
        self._flows = Flows(layout)
        self._drawer = Drawer(layout, self._flows, seed)
        self.score = self._flows.score

    def run(self, rounds: int, rests: int = _RESTS, trades: bool = True) -> None:
        """So many rounds of candidates for every layer.

        rests   a layer rests after so many rounds in which nothing paid
        trades  False: every layer keeps its number of copies
        """
        if len(self.layout.rate) < 2:
            return
        for turn in range(rounds):
            live = np.flatnonzero(self._fails < rests)
            if not len(live):
                return
            if trades and turn % _TRADES == _TRADES - 1:
                self._trade()
            self._fails[live] += 1
            self._change(self._drawer.draw(live, _EACH))

    # -- within a layer ----------------------------------------------------------------------

    def _change(self, drawn: Tries) -> None:
        """Of each layer the best candidate, if it pays."""
        best = self._best(drawn, _POURED)
        tries, gain = best.tries, best.gain
        worth = gain - tries.price
        done: set[int] = set()
        taken = []
        for i in np.argsort(-worth, kind="stable").tolist():
            layer = int(tries.layer[i])
            if layer in done or worth[i] <= self.layout.margin * self.score[layer]:
                continue
            done.add(layer)
            if self._apply(tries, i, float(gain[i])):
                taken.append(i)
        self._put(best, taken)

    def _best(self, tries: Tries, most: int) -> _Best:
        """The most promising of each layer, at most so many."""
        experts, hosts = tries.hosts(self._flows, len(self.layout.rate))
        hope = self._flows.gain(tries.layer, experts, hosts) - tries.price
        order = np.lexsort((-hope, tries.layer))
        layer = tries.layer[order]
        rank = np.arange(len(layer)) - np.searchsorted(layer, layer)
        worthy = hope[order] > -_HOPE * self.score[layer]
        worthy |= tries.kind[order] == DROP  # no drop gains anything
        chosen = order[(rank < most) & worthy]
        tries = tries.some(chosen)
        hosts, copies = self._flows.changed(tries.layer, experts[chosen], hosts[chosen])
        poured = self._flows.pour(tries.layer, hosts, copies)
        gain = self.score[tries.layer] - layer_score(poured.level, self.layout.rate)
        return _Best(tries=tries, hosts=hosts, copies=copies, poured=poured, gain=gain)

    def _apply(self, tries: Tries, i: int, gain: float) -> bool:
        """Change the layout and the free bytes; False when another layer took them first."""
        kind, layer = int(tries.kind[i]), int(tries.layer[i])
        e, f = int(tries.expert[i]), int(tries.other[i])
        g, h = int(tries.source[i]), int(tries.target[i])
        size = int(self.layout.size[layer])
        loads = size * (2 if kind == SWAP else 1)
        if kind != SWAP and self.room[h] + (size if g == h else 0) < size:
            return False
        if self.loaded + loads > self.layout.byte_limit:
            return False
        self.loaded += loads
        cell = self.resident[layer]
        cell[e, g] = False
        if kind == SWAP:
            cell[e, h], cell[f, h], cell[f, g] = True, False, True
        else:
            cell[e if kind == MOVE else f, h] = True
            self.room[g] += size
            self.room[h] -= size
        other = e if kind == ANOTHER else f
        self.changes.append(
            Change(
                kind=_KIND[kind],
                layer=layer,
                expert=f if kind == ANOTHER else e,
                source=g,
                target=h,
                other_layer=layer if other >= 0 else -1,
                other_expert=other,
                loaded_bytes=loads,
                gain=gain,
                price=float(tries.price[i]),
            )
        )
        return True

    def _put(self, best: _Best, taken: list[int]) -> None:
        """Let the flows follow the candidates that were taken, at most one of a layer."""
        if not taken:
            return
        at = np.array(taken)
        layers = best.tries.layer[at]
        self._fails[layers] = 0
        self._flows.put(layers, best.hosts, best.copies, best.poured, at)
        self.score[layers] -= best.gain[at]

    # -- between layers ----------------------------------------------------------------------

    def _trade(self) -> None:
        """Copies where they gain most, in free bytes or for copies of other layers that are
        missed least."""
        every = np.arange(len(self.layout.load))
        more = self._best(self._drawer.draw_adds(every, _EACH), 1)
        fewer = self._best(self._drawer.draw_drops(every, _EACH), 1)
        adds, gain = more.tries, more.gain
        drops, loss = fewer.tries, fewer.gain  # below 0
        cheapest = np.argsort(-loss, kind="stable").tolist()
        given: list[int] = []
        taken: list[int] = []
        touched: set[int] = set()
        for i in np.argsort(adds.price - gain, kind="stable").tolist():
            layer = int(adds.layer[i])
            need = float(adds.price[i]) + self.layout.margin * float(self.score[layer])
            if gain[i] <= need or layer in touched:
                continue
            j = self._payment(adds, i, drops, cheapest, touched)
            if j is None or (j >= 0 and gain[i] + loss[j] <= need):
                continue
            lost = float(loss[j]) if j >= 0 else 0.0
            self._exchange(adds, i, drops, j, float(gain[i]) + lost)
            taken.append(i)
            touched.add(layer)
            if j >= 0:
                given.append(j)
                touched.add(int(drops.layer[j]))
        self._put(more, taken)
        self._put(fewer, given)

    def _payment(
        self, adds: Tries, i: int, drops: Tries, cheapest: list[int], touched: set[int]
    ) -> int | None:
        """The drop that makes room for an add; -1: none is needed; None: there is none."""
        layer, h = int(adds.layer[i]), int(adds.target[i])
        size = int(self.layout.size[layer])
        if self.loaded + size > self.layout.byte_limit:
            return None
        if self.room[h] >= size and self.pool >= size:
            return -1
        for j in cheapest:
            other = int(drops.layer[j])
            freed = int(self.layout.size[other])
            there = freed if int(drops.source[j]) == h else 0
            enough = self.room[h] + there >= size and self.pool + freed >= size
            if enough and other != layer and other not in touched:
                return j
        return None

    def _exchange(self, adds: Tries, i: int, drops: Tries, j: int, gain: float) -> None:
        layer, expert = int(adds.layer[i]), int(adds.other[i])
        size, target = int(self.layout.size[layer]), int(adds.target[i])
        other_layer = other = -1
        if j >= 0:
            other_layer, other = int(drops.layer[j]), int(drops.expert[j])
            group, freed = int(drops.source[j]), int(self.layout.size[other_layer])
            self.resident[other_layer, other, group] = False
            self.room[group] += freed
            self.pool += freed
        self.resident[layer, expert, target] = True
        self.room[target] -= size
        self.pool -= size
        self.loaded += size
        self.changes.append(
            Change(
                kind="add" if j < 0 else "replace",
                layer=layer,
                expert=expert,
                source=int(adds.source[i]),
                target=target,
                other_layer=other_layer,
                other_expert=other,
                loaded_bytes=size,
                gain=gain,
                price=float(adds.price[i]),
            )
        )
