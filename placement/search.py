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

from placement.layout import Layout
from placement.pour import Poured, host_lists, merge, pour
from placement.propose import FAILS, Proposal, Proposer
from placement.score import layer_score
from placement.types import Floats, Ints
from placement.victims import least_missed

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


class Searcher:
    """Changes the layout it is given, in place."""

    def __init__(self, layout: Layout) -> None:
        load, resident, held = layout.load, layout.resident, layout.held
        self.load, self.resident, self._held = load, resident, held
        self.room, self.size = layout.room, layout.size
        self.rate, self.base = layout.rate, layout.base
        self.margin, self.byte_limit = layout.margin, layout.byte_limit
        self.pool = layout.pool
        self.layers, self.cases, self.experts = load.shape
        self.groups = len(self.rate)
        self.loaded = 0
        self.changes: list[Change] = []
        self.sweeps = 2 if resident.size < 500_000 else 1
        self._tabu = np.zeros(resident.shape, np.bool_) if held is None else held.barred.copy()
        self._fails = np.zeros(self.layers, np.int64)
        self._proposer = Proposer(layout, self._tabu, self._fails)

    def run(self, rounds: int) -> None:
        """Improve for at most so many rounds, or until no action pays anywhere."""
        hosts, self._copies = host_lists(self.resident)
        poured = self._pour(hosts, self._copies, np.arange(self.layers))
        score = layer_score(poured.level, self.rate)
        self.first_score = score
        for turn in range(rounds):
            if turn % _REFRESH == 0:
                self._victims = least_missed(poured, self._copies, self.rate)
            found = self._proposer.propose(poured, score, self._copies, self._victims)
            proposals = self._choose(found)
            if not proposals:
                if (self._fails >= FAILS).all():
                    break
                continue
            poured, score = self._try(proposals, poured, score)
        self.score = score
        self.level = poured.level

    def _pour(self, hosts: Ints, copies: Ints, layers: Ints) -> Poured:
        return pour(self.load[layers], hosts, copies, self.rate, self.base, self.sweeps)

    # -- choosing and trying -----------------------------------------------------------------

    def _choose(self, proposals: list[Proposal]) -> list[Proposal]:
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
                self._fails[p.layer] = FAILS
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
        p: Proposal,
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

    def _reject(self, p: Proposal) -> None:
        self._tabu[p.layer, p.expert, p.target] = True
        self._fails[p.layer] += 1

    def _try(
        self, proposals: list[Proposal], poured: Poured, score: Floats
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

    def _apply(self, p: Proposal) -> None:
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

    def _undo(self, p: Proposal) -> None:
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

    def _accept(self, p: Proposal, gain: float) -> None:
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
