"""Where the pairs of a layout go, and a quick look at what one small change would make of it.

`pour` (placement/pour.py) levels all replicated experts anew. A change concerns one or two
experts; `gain` takes those out and pours only them, with all others left as they are: several
times cheaper, and seldom more than what pouring all would give.
"""

from __future__ import annotations

import numpy as np

from placement.layout import Layout
from placement.pour import FAR, Poured, fill, host_lists, pour
from placement.score import layer_score
from placement.types import Floats, Ints


class Flows:
    """Scenarios poured over a layout.

    hosts   int [L, E, C], groups of each expert, padded with G; copies int [L, E]
    pairs   float64 [L, M, G], pairs/s on each group
    part    float64 [L, E, M, G], of them those of each expert
    score   float64 [L], J of each layer
    """

    def __init__(self, layout: Layout) -> None:
        self.load, self.rate, self.base = layout.load, layout.rate, layout.base
        self.hosts, self.copies = host_lists(layout.resident, spare=1)
        layers, cases, experts = self.load.shape
        groups = len(self.rate)
        self.pairs: Floats = np.zeros((layers, cases, groups))
        self.part: Floats = np.zeros((layers, experts, cases, groups))
        self.score: Floats = np.zeros(layers)
        rows = np.arange(layers)
        poured = self.pour(rows, self.hosts, self.copies)
        self.score[:] = layer_score(poured.level, self.rate)
        self.put(rows, self.hosts, self.copies, poured, rows)

    def pour(self, layers: Ints, hosts: Ints, copies: Ints) -> Poured:
        """Pour everything over other host lists, hosts [N, E, C], of these layers [N]."""
        return pour(self.load[layers], hosts, copies, self.rate, self.base)

    def put(self, layers: Ints, hosts: Ints, copies: Ints, poured: Poured, rows: Ints) -> None:
        """Let layers [N] be as `rows` [N] of what was poured over these host lists."""
        groups = len(self.rate)
        wide, chosen = self.hosts.shape[2], hosts[rows]
        self.hosts[layers] = groups
        self.hosts[layers, :, : hosts.shape[2]] = chosen
        self.copies[layers] = copies[rows]
        if len(rows) and int(copies[rows].max()) >= wide:  # a place to spare, always
            more = np.full((*self.copies.shape, 1), groups)
            self.hosts = np.concatenate([self.hosts, more], 2)
        self.pairs[layers] = poured.pairs[rows]
        _, cases, experts = self.load.shape
        part = np.zeros((len(rows), experts, cases, groups + 1))
        n, e = np.nonzero(copies[rows] == 1)
        part[n, e, :, hosts[rows[n], e, 0]] = self.load[layers[n], :, e]
        n, r = np.nonzero((poured.hosts[rows] < groups).any(2))
        at = poured.hosts[rows[n], r][:, None, :]  # [V, 1, C]
        case = np.arange(cases)[None, :, None]
        expert = poured.rep[rows[n], r]
        part[n[:, None, None], expert[:, None, None], case, at] = poured.flow[rows[n], r]
        self.part[layers] = part[..., :-1]

    def changed(self, layers: Ints, experts: Ints, hosts: Ints) -> tuple[Ints, Ints]:
        """Host lists with these experts [V, 2] on these hosts [V, 2, C]: [V, E, C] and [V, E]."""
        all_hosts, copies = self.hosts[layers], self.copies[layers]
        for turn in (0, 1):
            v = np.flatnonzero(experts[:, turn] >= 0)
            all_hosts[v, experts[v, turn]] = hosts[v, turn]
            copies[v, experts[v, turn]] = (hosts[v, turn] < len(self.rate)).sum(1)
        return all_hosts, copies

    def gain(self, layer: Ints, experts: Ints, hosts: Ints) -> Floats:
        """By how much J falls, about, with these experts on these hosts and all else as it is.

        layer [V]; experts [V, 2], -1: none; hosts [V, 2, C], padded with G. Returns float64 [V].
        """
        groups = len(self.rate)
        # narrow ones first: what can go anywhere levels what cannot
        wide = (hosts < groups).sum(2) * (experts >= 0)
        late = wide[:, 0] > wide[:, 1]
        experts = np.where(late[:, None], experts[:, ::-1], experts)
        hosts = np.where(late[:, None, None], hosts[:, ::-1], hosts)
        pairs = self.pairs[layer]  # [V, M, G], a copy
        for turn in (0, 1):
            v = np.flatnonzero(experts[:, turn] >= 0)
            pairs[v] -= self.part[layer[v], experts[v, turn]]
        for turn in (0, 1):
            v = np.flatnonzero(experts[:, turn] >= 0)
            self._pour_one(pairs, v, hosts[v, turn], self.load[layer[v], :, experts[v, turn]])
        return self.score[layer] - layer_score(pairs / self.rate, self.rate)

    def _pour_one(self, pairs: Floats, rows: Ints, hosts: Ints, amount: Floats) -> None:
        """Pour one expert for each of `rows` [U]: hosts [U, C], amount [U, M], into `pairs`."""
        groups = len(self.rate)
        single = np.flatnonzero(hosts[:, 1] == groups)
        pairs[rows[single], :, hosts[single, 0]] += amount[single]
        wide = np.flatnonzero(hosts[:, 1] < groups)
        if not len(wide):
            return
        at = hosts[wide, : int((hosts[wide] < groups).sum(1).max())].T[:, :, None]  # [C, W, 1]
        far = np.where(at == groups, FAR, 0.0)
        inside = np.minimum(at, groups - 1)
        case = np.arange(pairs.shape[1])
        under = pairs[rows[wide][:, None], case, inside]  # [C, W, M]
        poured = fill(under, self.rate[inside], far, amount[wide])
        for host, part in zip(at[:, :, 0], poured, strict=True):
            real = np.flatnonzero(host < groups)  # padding must not write over a true host
            pairs[rows[wide[real]], :, host[real]] += part[real]
