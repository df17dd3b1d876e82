"""Polish a layout by trying many small changes at random: swap, move, or another expert's copy.

The guided search (placement/search.py) takes what relieves the most pressed group most, and stops
where no such action pays. Much is left then when copies are few: a layer that can hardly split
must be packed for all loads that may come. So: in each round some candidates for every layer, all
poured over all scenarios at once, and the best of each layer taken when it pays. With the
forecast's scenarios this holds on the windows that follow (docs/planning.md).

Only for fleets of a size where thousands of candidates can be poured in the time of a plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.layout import Layout
from placement.pour import host_lists, pour
from placement.score import layer_score
from placement.types import Bools, Floats, Ints

_EACH = 16  # candidates of a layer and round
_RESTS = 15  # a layer rests after so many rounds in which nothing paid
_PRESSED = 0.6  # part of them that relieve the slowest group of some scenario


@dataclass(frozen=True, kw_only=True)
class Step:
    """One accepted change: expert from source to target; `other` comes back, or gave way."""

    kind: str
    layer: int
    expert: int
    source: int
    target: int
    other: int
    gain: float
    price: float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tries:
    """Candidates [N, K]: the first expert's copy on `source`, and what becomes of it."""

    kind: Ints  # 0 swap, 1 move, 2 another expert's copy instead
    expert: Ints
    source: Ints
    target: Ints
    other: Ints
    price: Floats
    valid: Bools


class Polisher:
    """Changes the layout it is given, in place.

    With `layout.node` no change brings all copies of an expert onto one node.
    """

    def __init__(self, layout: Layout, seed: int = 0) -> None:
        load, resident = layout.load, layout.resident
        rate, base = layout.rate, layout.base
        self.load, self.resident, self.allowed = load, resident, layout.allowed
        self.room, self.size, self.rate, self.base = layout.room, layout.size, rate, base
        self.price, self.margin, self.byte_limit = layout.price, layout.margin, layout.byte_limit
        self.node, self.held = layout.node, layout.held
        self.layers, self.cases, self.experts = load.shape
        self.groups = len(rate)
        self.loaded = 0
        self.steps: list[Step] = []
        self._fails = np.zeros(self.layers, np.int64)
        self._rng = np.random.default_rng(seed)
        self._hosts, self._copies = host_lists(resident, spare=1)
        poured = pour(load, self._hosts, self._copies, rate, base)
        self._level = poured.level
        self.score = layer_score(self._level, rate)

    def run(self, rounds: int) -> None:
        """So many rounds of candidates for every layer."""
        if self.groups < 2:
            return
        for _ in range(rounds):
            live = np.flatnonzero(self._fails < _RESTS)
            if not len(live):
                return
            tries = self._draw(live)
            hosts, copies = self._changed(tries, live)
            n, k = tries.kind.shape
            load = np.broadcast_to(self.load[live, None], (n, k, *self.load.shape[1:]))
            poured = pour(
                load.reshape(n * k, self.cases, self.experts),
                hosts.reshape(n * k, self.experts, -1),
                copies.reshape(n * k, self.experts),
                self.rate,
                self.base,
            )
            level = poured.level.reshape(n, k, self.cases, self.groups)
            score = layer_score(poured.level, self.rate).reshape(n, k)
            self._take(live, tries, score, level, hosts, copies)

    # -- candidates --------------------------------------------------------------------------

    def _draw(self, live: Ints) -> _Tries:
        """Candidates of the layers `live` [N], arrays [N, K]."""
        rng, groups = self._rng, self.groups
        shape = (len(live), _EACH)
        row = live[:, None]
        case = rng.integers(self.cases, size=shape)
        level = self._level[row, case]  # [L, K, G]
        pressed = rng.random(shape) < _PRESSED
        source = np.where(pressed, level.argmax(2), rng.integers(groups, size=shape))
        # the better of two groups drawn
        one, two = rng.integers(groups, size=(2, *shape))
        at = np.take_along_axis
        lower = at(level, one[..., None], 2) <= at(level, two[..., None], 2)
        target = np.where(lower[..., 0], one, two)
        layer, group, expert = np.nonzero(self.resident.transpose(0, 2, 1))
        start = np.searchsorted(layer * groups + group, np.arange(self.layers * groups + 1))
        first = self._one_of(start, expert, row * groups + source)
        second = self._one_of(start, expert, row * groups + target)
        kind = rng.choice(3, size=shape, p=(0.5, 0.2, 0.3))
        other = np.where(kind == 2, rng.integers(self.experts, size=shape), second)
        return self._checked(row, kind, first, source, target, other)

    def _one_of(self, start: Ints, expert: Ints, bucket: Ints) -> Ints:
        """A random expert of each bucket (layer and group); -1 where it is empty."""
        count = start[bucket + 1] - start[bucket]
        pick = start[bucket] + (self._rng.random(bucket.shape) * count).astype(np.int64)
        return np.where(count > 0, expert[np.minimum(pick, len(expert) - 1)], -1)

    def _checked(
        self, row: Ints, kind: Ints, expert: Ints, source: Ints, target: Ints, other: Ints
    ) -> _Tries:
        e, f = np.maximum(expert, 0), np.maximum(other, 0)
        res, size = self.resident, self.size[row]
        swap, move, another = kind == 0, kind == 1, kind == 2
        valid = (expert >= 0) & self.allowed[target]
        on_target = np.where(another, res[row, f, target], res[row, e, target])
        valid &= ~on_target & (f != e)
        valid &= ~swap | ((other >= 0) & ~res[row, f, source] & self.allowed[source])
        valid &= ~another | ((self._copies[row, e] > 1) & (self._copies[row, f] > 0))
        freed = np.where(another & (source == target), size, 0)
        valid &= swap | (self.room[target] + freed >= size)
        valid &= another | (source != target)
        price = size * np.where(swap, self.price[target] + self.price[source], self.price[target])
        if self.node is not None:
            lost = np.where(another, -1, source)  # another expert's copy leaves nothing behind
            valid &= ~self._huddled(row, np.where(another, f, e), target, lost)
            valid &= ~swap | ~self._huddled(row, f, source, target)
        if self.held is not None:
            pinned, barred = self.held.pinned, self.held.barred
            came = np.where(another, f, e)
            valid &= ~pinned[row, e, source] & ~barred[row, came, target]
            valid &= ~swap | (~pinned[row, f, target] & ~barred[row, f, source])
        return _Tries(
            kind=kind,
            expert=e,
            source=source,
            target=target,
            other=np.where(move, -1, f),
            price=price.astype(np.float64),
            valid=valid,
        )

    def _huddled(self, row: Ints, expert: Ints, came: Ints, left: Ints) -> Bools:
        """Whether several copies would all be on one node, with one on `came`, none on `left`."""
        assert self.node is not None
        after = self.resident[row, expert]  # [N, K, G], a copy
        np.put_along_axis(after, came[:, :, None], True, 2)
        n, k = np.nonzero(left >= 0)
        after[n, k, left[n, k]] = False
        there: Ints = np.take(self.node, came)  # [N, K]
        elsewhere = self.node != there[:, :, None]
        found: Bools = (after.sum(2) > 1) & ~(after & elsewhere).any(2)
        return found

    def _changed(self, tries: _Tries, live: Ints) -> tuple[Ints, Ints]:
        """Host lists of every candidate: hosts [N, K, E, C], copies [N, K, E]."""
        hosts = np.repeat(self._hosts[live, None], _EACH, 1)
        copies = np.repeat(self._copies[live, None], _EACH, 1)
        for kind in (0, 1, 2):
            n, k = np.nonzero(tries.valid & (tries.kind == kind))
            e, f = tries.expert[n, k], tries.other[n, k]
            g, h = tries.source[n, k], tries.target[n, k]
            slot = (hosts[n, k, e] == g[:, None]).argmax(1)
            if kind < 2:
                hosts[n, k, e, slot] = h
            if kind == 0:
                back = (hosts[n, k, f] == h[:, None]).argmax(1)
                hosts[n, k, f, back] = g
            if kind == 2:
                last = copies[n, k, e] - 1
                hosts[n, k, e, slot] = hosts[n, k, e, last]
                hosts[n, k, e, last] = self.groups
                hosts[n, k, f, copies[n, k, f]] = h
                copies[n, k, e] -= 1
                copies[n, k, f] += 1
        return hosts, copies

    # -- taking ------------------------------------------------------------------------------

    def _take(
        self, live: Ints, tries: _Tries, score: Floats, level: Floats, hosts: Ints, copies: Ints
    ) -> None:
        """The best candidate of each layer, if it pays and its bytes are still there."""
        old = self.score[live]
        net = np.where(tries.valid, old[:, None] - score - tries.price, -np.inf)
        best = net.argmax(1)
        row = np.arange(len(live))
        worth = net[row, best]
        pays = worth > self.margin * old
        self._fails[live] += 1
        taken = [
            n
            for n in np.flatnonzero(pays)[np.argsort(-worth[pays], kind="stable")].tolist()
            if self._apply(tries, int(live[n]), n, int(best[n]), float(old[n] - score[n, best[n]]))
        ]
        at = np.array(taken, np.int64)
        layers, k = live[at], best[at]
        self._fails[layers] = 0
        self._hosts[layers], self._copies[layers] = hosts[at, k], copies[at, k]
        self._level[layers], self.score[layers] = level[at, k], score[at, k]
        if int(self._copies.max(initial=0)) >= self._hosts.shape[2]:
            self._hosts, self._copies = host_lists(self.resident, spare=1)

    def _apply(self, tries: _Tries, layer: int, n: int, k: int, gain: float) -> bool:
        """Change the layout and the free bytes; False when another layer took them first."""
        kind, size = int(tries.kind[n, k]), int(self.size[layer])
        e, f = int(tries.expert[n, k]), int(tries.other[n, k])
        g, h = int(tries.source[n, k]), int(tries.target[n, k])
        loads = size * (2 if kind == 0 else 1)
        if kind and self.room[h] + (size if g == h else 0) < size:
            return False
        if self.loaded + loads > self.byte_limit:
            return False
        self.loaded += loads
        cell = self.resident[layer]
        cell[e, g] = False
        if kind == 0:
            cell[e, h], cell[f, h], cell[f, g] = True, False, True
        else:
            cell[e if kind == 1 else f, h] = True
            self.room[g] += size
            self.room[h] -= size
        self.steps.append(
            Step(
                kind=("swap", "move", "replace")[kind],
                layer=layer,
                expert=f if kind == 2 else e,
                source=g,
                target=h,
                other=e if kind == 2 else f,
                gain=gain,
                price=float(tries.price[n, k]),
            )
        )
        return True
