"""Local search: from a layout to a better one, one paid action a layer and round.

Each round pours the scenarios over the current replicas, takes every layer's most pressed group,
and looks for the action that relieves it most for its bytes: ADD a replica of one of its experts
elsewhere (in free bytes, or in place of the replica that is missed least), or SWAP one of its
experts with a lighter one of another group. The winners of all layers are tried together; those
that do not earn their price when everything is poured again are undone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.dwell import Held
from placement.gains import Gains
from placement.pour import Poured, host_lists, merge, pour
from placement.score import layer_score, powered
from placement.types import Bools, Floats, Ints
from placement.victims import least_missed

_TARGETS = 8  # groups looked at as new homes, least pressed first
_EXPERTS = 16  # experts of the pressed group looked at, busiest first
_HOPE = 0.3  # proposals promising this part of the margin are tried
_FAILS = 8  # a layer rests after so many proposals that did not pay
_TOGETHER = 0.8  # what a replica on the same node is worth, where losses are to be survived
_REFRESH = 3  # the list of replicas to evict is made anew every so many rounds
_VICTIMS = 32  # replicas of a group looked at for eviction, least missed first


@dataclass(frozen=True, kw_only=True)
class Change:
    """One accepted action. `gain` and `price` in seconds of work a second (see Searcher)."""

    kind: str  # "add", "replace", "move", "swap"
    layer: int
    expert: int
    source: int  # the pressed group it relieves
    target: int  # where the new replica goes
    other_layer: int = -1  # replace, move: the replica given up; swap: the expert that comes back
    other_expert: int = -1
    loaded_bytes: int = 0
    gain: float = 0.0
    price: float = 0.0


@dataclass(kw_only=True, eq=False)
class _Proposal:
    net: float
    kind: int  # 0 add, 1 swap
    layer: int
    expert: int
    source: int
    target: int
    other: int
    price: float
    evicts: tuple[int, int, int] | None = None  # layer, expert, group given up
    instead: _Proposal | None = None  # the swap to take when no bytes can be had


class Searcher:
    """The layout being improved, and what changing it costs.

    load      float64 [L, M, E] scenarios in pairs/s
    resident  bool [L, E, G], changed in place (give a copy)
    allowed   bool [G], groups that may receive replicas
    room      int64 [G], bytes still free
    size      int64 [L], bytes of one replica
    rate      float64 [G] pairs/s; base float64 [G] work already there, in pairs/s
    price     float64 [G], what loading one byte onto the group costs, in seconds of work a second
    margin    least gain of an action over its price, as a part of the layer's time
    byte_limit  most bytes loaded in all; pool: most bytes by which the layout may grow
    node      int [G], given when a second replica shall rather be on another node
    held      copies that may not go, or not come back, yet
    """

    def __init__(
        self,
        *,
        load: Floats,
        resident: Bools,
        allowed: Bools,
        room: Ints,
        size: Ints,
        rate: Floats,
        base: Floats,
        price: Floats,
        margin: float,
        byte_limit: float = np.inf,
        pool: float = np.inf,
        node: Ints | None = None,
        held: Held | None = None,
    ) -> None:
        self.load, self.resident, self.allowed = load, resident, allowed
        self.room, self.size, self.rate, self.base = room, size, rate, base
        self.price, self.margin, self.byte_limit = price, margin, byte_limit
        self.pool = pool
        self.node = node
        self.layers, self.cases, self.experts = load.shape
        self.groups = len(rate)
        self.mean_load = load.mean(1)
        self.loaded = 0
        self.changes: list[Change] = []
        self.sweeps = 2 if resident.size < 500_000 else 1
        # a group holds about so many experts of a layer: no need to look at more
        slots = float(resident.sum()) / max(self.layers * self.groups, 1)
        self._depth = int(min(_EXPERTS, np.ceil(1.5 * slots) + 2, self.experts))
        self._held = held
        self._tabu = np.zeros(resident.shape, np.bool_) if held is None else held.barred.copy()
        self._fails = np.zeros(self.layers, np.int64)

    def run(self, rounds: int) -> None:
        """Improve for at most so many rounds, or until no action pays anywhere."""
        hosts, self._copies = host_lists(self.resident)
        poured = self._pour(hosts, self._copies, np.arange(self.layers))
        score = layer_score(poured.level, self.rate)
        self.first_score = score
        for turn in range(rounds):
            if turn % _REFRESH == 0:
                self._victims = least_missed(poured, self._copies, self.rate)
            proposals = self._choose(self._propose(poured, score), poured)
            if not proposals:
                if (self._fails >= _FAILS).all():
                    break
                continue
            poured, score = self._try(proposals, poured, score)
        self.score = score
        self.level = poured.level

    def _pour(self, hosts: Ints, copies: Ints, layers: Ints) -> Poured:
        return pour(self.load[layers], hosts, copies, self.rate, self.base, self.sweeps)

    # -- proposing ---------------------------------------------------------------------------

    def _propose(self, poured: Poured, score: Floats) -> list[_Proposal]:
        live = np.flatnonzero(self._fails < _FAILS)
        if not len(live):
            return []
        level = poured.level[live]  # [N, M, G]
        scale = np.maximum(level.max(2, keepdims=True), 1e-300)
        relative = level / scale
        pressure = powered(relative).mean(1)  # [N, G]
        source = pressure.argmax(1)
        size = self.size[live][:, None]
        has_room = (self.room[None, :] >= size) | self._victims.has_any[None, :]
        mean = relative.mean(1) + np.where(has_room, 0.0, 0.02) + np.where(self.allowed, 0, 1e6)
        mean[np.arange(len(live)), source] = np.inf
        width = min(_TARGETS, self.groups - 1)
        if width < 1:
            self._fails[:] = _FAILS
            return []
        target = np.argpartition(mean, width - 1, axis=1)[:, :width]  # [N, T]
        flow, on_source = self._flows(poured, live, source)  # [N, E, M]
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
        swap_net, swap_price, partner = self._swaps(live, source, target, expert, amount, calc)
        best_swap = swap_net.reshape(len(live), -1).argmax(1)
        found = []
        floor = _HOPE * self.margin * score  # the estimate is first order and cautious
        for i, layer in enumerate(live.tolist()):
            s, t = divmod(int(best_add[i]), width)
            s2, rest = divmod(int(best_swap[i]), width * partner.shape[2])
            t2, f2 = divmod(rest, partner.shape[2])
            add = _Proposal(
                net=float(add_net[i, s, t]),
                kind=0,
                layer=layer,
                expert=int(expert[i, s]),
                source=int(source[i]),
                target=int(target[i, t]),
                other=-1,
                price=float(price[i, t]),
            )
            swap = _Proposal(
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
                self._fails[layer] = _FAILS
                continue
            if best is add and swap.net > floor[layer]:
                add.instead = swap
            found.append(best)
        return found

    def _flows(self, poured: Poured, live: Ints, source: Ints) -> tuple[Floats, Bools]:
        """Pairs/s of each expert on the pressed group, [N, E, M], and which experts are there."""
        on_source = self.resident[live, :, source]  # [N, E]
        single = on_source & (self._copies[live] == 1)
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
    ) -> tuple[Floats, Floats, Ints]:
        """Net gains [N, S, T, F] of swapping expert s for the f-th lightest single of target t."""
        n = np.arange(len(live))[:, None]
        single = self._copies[live] == 1
        there = self.resident[live[:, None], :, target] & single[:, None, :]  # [N, T, E]
        weight = np.where(there, self.mean_load[live][:, None, :], np.inf)
        depth = self._depth
        partner = np.argpartition(weight, depth - 1, axis=2)[:, :, :depth]  # [N, T, F]
        real = np.isfinite(np.take_along_axis(weight, partner, 2))
        back = self.load[live].transpose(0, 2, 1)[n[:, :, None], partner]  # [N, T, F, M]
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

    # -- choosing and trying -----------------------------------------------------------------

    def _choose(self, proposals: list[_Proposal], poured: Poured) -> list[_Proposal]:
        """Proposals that can go together: bytes reserved, no layer touched twice."""
        proposals.sort(key=lambda p: (-p.net, p.layer))
        room, used = self.room.copy(), set[int]()
        acting = {p.layer: p.net for p in proposals}
        touched: set[int] = set()
        left, pool = self.byte_limit - self.loaded, self.pool
        taken = []
        for p in proposals:
            if p.layer in touched:
                continue
            size = int(self.size[p.layer])
            if p.kind == 0 and (room[p.target] < size or pool < size):
                self._evict(p, int(room[p.target]), pool, touched, acting, used)
                if not p.evicts:
                    if not p.instead:
                        self._reject(p)
                        continue
                    p = p.instead
            bytes_loaded = size * (2 if p.kind else 1)
            if bytes_loaded > left:
                self._fails[p.layer] = _FAILS
                continue
            if p.evicts:
                # what an eviction leaves over is not lent out before it has proved its worth
                freed = int(self.size[p.evicts[0]])
                same_group = freed if p.evicts[2] == p.target else 0
                room[p.target] = min(room[p.target], room[p.target] + same_group - size)
                pool = min(pool, pool + freed - size)
                touched.add(p.evicts[0])
            elif p.kind == 0:
                room[p.target] -= size
                pool -= size
            touched.add(p.layer)
            left -= bytes_loaded
            taken.append(p)
        return taken

    def _evict(
        self,
        p: _Proposal,
        room: int,
        pool: float,
        touched: set[int],
        acting: dict[int, float],
        used: set[int],
    ) -> None:
        """Name the replica to give up for an add: one on the same group when bytes are short
        there; when only the pool is short, the one missed least anywhere, or else the expert's
        own on the pressed group (it moves)."""
        known = self._victims
        size = int(self.size[p.layer])
        start, end = int(known.start[p.target]), int(known.start[p.target + 1])
        rows = range(start, min(start + _VICTIMS, end))
        for i in rows if room < size else known.ranked[:_VICTIMS].tolist():
            layer, expert, group = int(known.layer[i]), int(known.expert[i]), int(known.group[i])
            if p.net - float(known.missed[i]) <= 0:
                break
            if i in used or layer in touched or (layer == p.layer and expert == p.expert):
                continue
            if not self.resident[layer, expert, group] or self._copies[layer, expert] < 2:
                continue  # the list is a few rounds old
            if self._stays(layer, expert, group):
                continue
            freed = int(self.size[layer])
            if room + (freed if group == p.target else 0) < size or pool + freed < size:
                continue
            if layer != p.layer and acting.get(layer, 0.0) > p.net / 2:
                continue  # that layer has better to do this round
            p.evicts = (layer, expert, group)
            used.add(i)
            return
        alone = self._copies[p.layer, p.expert] == 1
        if room >= size and alone and not self._stays(p.layer, p.expert, p.source):
            p.evicts = (p.layer, p.expert, p.source)

    def _stays(self, layer: int, expert: int, group: int) -> bool:
        return self._held is not None and bool(self._held.pinned[layer, expert, group])

    def _reject(self, p: _Proposal) -> None:
        self._tabu[p.layer, p.expert, p.target] = True
        self._fails[p.layer] += 1

    def _try(
        self, proposals: list[_Proposal], poured: Poured, score: Floats
    ) -> tuple[Poured, Floats]:
        for p in proposals:
            self._apply(p)
        touched = {p.layer for p in proposals} | {p.evicts[0] for p in proposals if p.evicts}
        layers = np.array(sorted(touched))
        place = {layer: i for i, layer in enumerate(layers.tolist())}
        hosts, copies = host_lists(self.resident[layers])
        tried = self._pour(hosts, copies, layers)
        fresh = layer_score(tried.level, self.rate)
        taken = np.zeros(len(layers), np.bool_)
        for p in proposals:
            at = {p.layer} | ({p.evicts[0]} if p.evicts else set())
            gain = sum(float(score[layer] - fresh[place[layer]]) for layer in sorted(at))
            if gain - p.price > self.margin * float(score[p.layer]):
                self._accept(p, gain)
                taken[[place[layer] for layer in at]] = True
            else:
                self._undo(p)
                self._reject(p)
        if not taken.any():
            return poured, score
        score = score.copy()
        score[layers[taken]] = fresh[taken]
        self._copies[layers[taken]] = copies[taken]
        return merge(poured, tried, layers, taken), score

    def _apply(self, p: _Proposal) -> None:
        size = int(self.size[p.layer])
        cell = self.resident[p.layer]
        cell[p.expert, p.target] = True
        if p.kind:
            cell[p.expert, p.source] = False
            cell[p.other, p.target] = False
            cell[p.other, p.source] = True
            return
        self._take(p.target, size)
        if p.evicts:
            self.resident[p.evicts] = False
            self._take(p.evicts[2], -int(self.size[p.evicts[0]]))

    def _undo(self, p: _Proposal) -> None:
        size = int(self.size[p.layer])
        cell = self.resident[p.layer]
        cell[p.expert, p.target] = False
        if p.kind:
            cell[p.expert, p.source] = True
            cell[p.other, p.target] = True
            cell[p.other, p.source] = False
            return
        self._take(p.target, -size)
        if p.evicts:
            self.resident[p.evicts] = True
            self._take(p.evicts[2], int(self.size[p.evicts[0]]))

    def _take(self, group: int, size: int) -> None:
        self.room[group] -= size
        self.pool -= size

    def _accept(self, p: _Proposal, gain: float) -> None:
        loaded = int(self.size[p.layer]) * (2 if p.kind else 1)
        self.loaded += loaded
        self._fails[p.layer] = 0
        kind = "swap" if p.kind else ("replace" if p.evicts else "add")
        if p.evicts and p.evicts[:2] == (p.layer, p.expert):
            kind = "move"
        other = p.evicts[:2] if p.evicts else ((p.layer, p.other) if p.kind else (-1, -1))
        self.changes.append(
            Change(
                kind=kind,
                layer=p.layer,
                expert=p.expert,
                source=p.source,
                target=p.target,
                other_layer=other[0],
                other_expert=other[1],
                loaded_bytes=loaded,
                gain=gain,
                price=p.price,
            )
        )
