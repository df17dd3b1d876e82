"""Small changes of a layout, drawn at random: candidates for placement/polish.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.flows import Flows
from placement.layout import Layout
from placement.types import Bools, Floats, Ints

SWAP, MOVE, ANOTHER, ADD, DROP = range(5)
_PRESSED = 0.6  # part of them that relieve the slowest group of some scenario


@dataclass(frozen=True, kw_only=True, eq=False)
class Tries:
    """Candidates [V], each of one layer.

    SWAP     `expert` from source to target, `other` back
    MOVE     `expert` from source to target
    ANOTHER  the copy of `expert` on source goes, one of `other` comes on target
    ADD      a copy of `other` on target, to relieve source; `expert` is -1
    DROP     the copy of `expert` on source goes; `other` is -1
    """

    layer: Ints
    kind: Ints
    expert: Ints
    source: Ints
    target: Ints
    other: Ints
    price: Floats

    def some(self, chosen: Ints | Bools) -> Tries:
        names = self.__dataclass_fields__
        return Tries(**{name: getattr(self, name)[chosen] for name in names})

    def hosts(self, flows: Flows, groups: int) -> tuple[Ints, Ints]:
        """(experts [V, 2], their hosts [V, 2, C] padded with `groups`), -1 where there is none."""
        one, two = np.maximum(self.expert, 0), np.maximum(self.other, 0)
        g, h = self.source[:, None], self.target[:, None]
        kind = self.kind[:, None]
        first, second = flows.hosts[self.layer, one], flows.hosts[self.layer, two]
        gone = np.where(kind < ANOTHER, h, groups)
        first = np.where(first == g, gone, first)
        second = np.where((kind == SWAP) & (second == h), g, second)
        free = np.arange(second.shape[1]) == flows.copies[self.layer, two][:, None]
        comes = (kind == ANOTHER) | (kind == ADD)
        second = np.where(comes & free, h, second)
        hosts = np.sort(np.stack([first, second], 1), axis=2)
        return np.stack([self.expert, self.other], 1), hosts


class Drawer:
    """Draws candidates that keep to every constraint but the free bytes of the whole fleet."""

    def __init__(self, layout: Layout, flows: Flows, seed: int) -> None:
        self._layout, self._flows = layout, flows
        self._rng = np.random.default_rng(seed)

    def draw(self, live: Ints, each: int) -> Tries:
        """Swaps, moves and copies instead of others for the layers `live` [N]."""
        rng, layout = self._rng, self._layout
        groups = len(layout.rate)
        layer, source, target = self._groups(live, each)
        start, expert = self._by_group()
        first = self._one_of(start, expert, layer * groups + source)
        second = self._one_of(start, expert, layer * groups + target)
        kind = rng.choice(3, size=len(layer), p=(0.5, 0.2, 0.3))
        anyone = rng.integers(layout.load.shape[2], size=len(layer))
        other = np.where(kind == ANOTHER, anyone, second)
        return self._checked(layer, kind, first, source, target, other)

    def draw_adds(self, live: Ints, each: int) -> Tries:
        """Copies of experts of slow groups, to be put elsewhere."""
        layer, source, target = self._groups(live, each)
        start, expert = self._by_group()
        other = self._one_of(start, expert, layer * len(self._layout.rate) + source)
        kind = np.full(len(layer), ADD)
        return self._checked(layer, kind, np.full(len(layer), -1), source, target, other)

    def draw_drops(self, live: Ints, each: int) -> Tries:
        """Copies that might go, their expert having others."""
        several = self._layout.resident & (self._flows.copies > 1)[:, :, None]
        layer, expert, group = np.nonzero(several)
        start = np.searchsorted(layer, np.arange(len(several) + 1))
        row = np.repeat(live, each)
        pick = self._one_of(start, np.arange(len(layer)), row)
        row, pick = row[pick >= 0], pick[pick >= 0]
        kind, none = np.full(len(row), DROP), np.full(len(row), -1)
        return self._checked(row, kind, expert[pick], group[pick], group[pick], none)

    def _groups(self, live: Ints, each: int) -> tuple[Ints, Ints, Ints]:
        """(layers, groups to relieve, groups that could take something), `each` for a layer."""
        rng, groups = self._rng, len(self._layout.rate)
        layer = np.repeat(live, each)
        size = len(layer)
        case = rng.integers(self._flows.pairs.shape[1], size=size)
        level = self._flows.pairs[layer, case] / self._layout.rate  # [V, G]
        pressed = rng.random(size) < _PRESSED
        source = np.where(pressed, level.argmax(1), rng.integers(groups, size=size))
        # the better of two groups drawn
        one, two = rng.integers(groups, size=(2, size))
        row = np.arange(size)
        return layer, source, np.where(level[row, one] <= level[row, two], one, two)

    def _by_group(self) -> tuple[Ints, Ints]:
        """(start [L * G + 1], experts): which experts each group of each layer holds."""
        layers, _, groups = self._layout.resident.shape
        layer, group, expert = np.nonzero(self._layout.resident.transpose(0, 2, 1))
        start = np.searchsorted(layer * groups + group, np.arange(layers * groups + 1))
        return start, expert

    def _one_of(self, start: Ints, item: Ints, bucket: Ints) -> Ints:
        """A random item of each bucket; -1 where it is empty."""
        count = start[bucket + 1] - start[bucket]
        pick = start[bucket] + (self._rng.random(bucket.shape) * count).astype(np.int64)
        if not len(item):
            return np.full(bucket.shape, -1)
        return np.where(count > 0, item[np.minimum(pick, len(item) - 1)], -1)

    def _checked(
        self, row: Ints, kind: Ints, expert: Ints, source: Ints, target: Ints, other: Ints
    ) -> Tries:
        """Those that are possible."""
        layout, copies = self._layout, self._flows.copies
        e, f = np.maximum(expert, 0), np.maximum(other, 0)
        res, size = layout.resident, layout.size[row]
        swap, move, another = kind == SWAP, kind == MOVE, kind == ANOTHER
        add, drop = kind == ADD, kind == DROP
        comes = another | add
        valid = ((expert >= 0) | add) & ((other >= 0) | move | drop)
        valid &= layout.allowed[target] | drop
        on_target = np.where(comes, res[row, f, target], res[row, e, target])
        valid &= (~on_target | drop) & ((f != e) | add | drop)
        valid &= ~swap | (~res[row, f, source] & layout.allowed[source])
        valid &= ~(another | drop) | (copies[row, e] > 1)
        valid &= ~comes | (copies[row, f] > 0)
        freed = np.where(another & (source == target), size, 0)
        valid &= swap | add | drop | (layout.room[target] + freed >= size)
        valid &= (source != target) | another | drop
        if layout.node is not None:
            valid &= drop | ~self._huddled(
                row, np.where(comes, f, e), target, np.where(comes, -1, source)
            )
            valid &= ~swap | ~self._huddled(row, f, source, target)
            valid &= ~(another | drop) | ~self._huddled(row, e, np.full(len(row), -1), source)
        if layout.held is not None:
            pinned, barred = layout.held.pinned, layout.held.barred
            came = np.where(comes, f, e)
            valid &= add | ~pinned[row, e, source]
            valid &= drop | ~barred[row, came, target]
            valid &= ~swap | (~pinned[row, f, target] & ~barred[row, f, source])
        both = np.where(swap, layout.price[source], 0.0)
        price = np.where(drop, 0.0, size * (layout.price[target] + both))
        tries = Tries(
            layer=row,
            kind=kind,
            expert=np.where(add, -1, e),
            source=source,
            target=target,
            other=np.where(move | drop, -1, f),
            price=price,
        )
        return tries.some(valid)

    def _huddled(self, row: Ints, expert: Ints, came: Ints, left: Ints) -> Bools:
        """Whether several copies would all be on one node, with one more on `came` and none on
        `left`; -1: nowhere."""
        node = self._layout.node
        assert node is not None
        after = self._layout.resident[row, expert]  # [V, G], a copy
        v = np.flatnonzero(came >= 0)
        after[v, came[v]] = True
        v = np.flatnonzero(left >= 0)
        after[v, left[v]] = False
        there = node[after.argmax(1)][:, None]
        found: Bools = (after.sum(1) > 1) & ~(after & (node != there)).any(1)
        return found
