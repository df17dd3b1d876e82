"""Levelling a batch: whole tokens from the slowest group along replicas to groups with time left.

Groups are nodes; expert tokens on g that could as well be computed on h are an edge g -> h. The
slowest group pushes tokens along a shortest path of edges to the group with the most time left
(augmenting paths, as in Ford and Fulkerson's maximum flow). When none is reachable that ends
below the mean of all that are, no split of divisible tokens ends sooner.

Scalars in lists and one flat view of the result: an array call costs as much as a whole step here.
"""

from __future__ import annotations

from dataclasses import dataclass

_CLOSE = 1.004  # stop within 0.4 % of the bound: a further step costs more than it gains
_PUSHES = 6  # pushes of tokens, for each group


Hop = tuple[int, list[tuple[int, int]]]  # a group, and the cells of tokens that may go there


@dataclass(frozen=True, kw_only=True)
class Ways:
    """Where tokens can go instead, prepared once for a layer.

    per_pair, gamma  seconds of a pair, and of a further active expert, by group
    edges  for each g: for each h with shared experts, h and the experts' cells (row * G + g,
           row * G + h) in the flat result
    """

    per_pair: list[float]
    gamma: list[float]
    edges: list[list[Hop]]
    priced: bool

    @classmethod
    def of(
        cls, rows: list[int], hosts: list[list[int]], per_pair: list[float], gamma: list[float]
    ) -> Ways:
        """rows: the experts' rows in the result; hosts: their groups."""
        groups = len(per_pair)
        shared: list[dict[int, list[tuple[int, int]]]] = [{} for _ in range(groups)]
        for row, own in zip(rows, hosts, strict=True):
            first = row * groups
            for g in own:
                for h in own:
                    if g != h:
                        shared[g].setdefault(h, []).append((first + g, first + h))
        return cls(
            per_pair=per_pair,
            gamma=gamma,
            edges=[sorted(found.items()) for found in shared],
            priced=any(gamma),
        )


def close(bound: float, ways: Ways) -> float:
    """The level that is good enough: near the bound, or within one step of it."""
    step = min(ways.per_pair) + min(ways.gamma)
    return max(bound * _CLOSE, bound + 0.999 * step)


def even_out(cells: memoryview, levels: list[float], ways: Ways, bound: float) -> None:
    """Push tokens until the slowest group is near `bound`, or nothing helps. Both change in place.

    cells   flat int64 view of the tokens [E, G]
    levels  seconds at which each group ends
    """
    enough = close(bound, ways)
    for _ in range(_PUSHES * len(levels)):
        top = max(levels)
        if top <= enough:
            return
        g = levels.index(top)
        path = _beside(cells, levels, ways, g, bound)
        if path is None:
            path, mean = _far(cells, levels, ways, g)
            bound = max(bound, mean)
            enough = max(enough, close(bound, ways))
        if path is not None and _push(cells, levels, ways, g, path, bound):
            continue
        if not ways.priced or not _relocate(cells, levels, ways, g):
            return


def _beside(
    cells: memoryview, levels: list[float], ways: Ways, g: int, bound: float
) -> list[Hop] | None:
    """From g to the neighbour that ends first, if that is before the bound."""
    low, found = bound - ways.per_pair[g] * 0.5, None
    for hop in ways.edges[g]:
        if levels[hop[0]] < low:
            for at, _ in hop[1]:
                if cells[at]:
                    low, found = levels[hop[0]], hop
                    break
    return None if found is None else [found]


def _far(
    cells: memoryview, levels: list[float], ways: Ways, g: int
) -> tuple[list[Hop] | None, float]:
    """A shortest path from g to the group that ends first of all it can reach, and the level at
    which all of those would end if they could be made level."""
    before: dict[int, tuple[int, Hop]] = {}
    queue = [g]
    for node in queue:  # breadth first; only along groups that have tokens to give
        for hop in ways.edges[node]:
            if hop[0] not in before and hop[0] != g and any(cells[at] for at, _ in hop[1]):
                before[hop[0]] = node, hop
                queue.append(hop[0])
    per_pair = ways.per_pair
    rate = sum(1.0 / per_pair[h] for h in queue)
    mean = sum(levels[h] / per_pair[h] for h in queue) / rate
    last = min(queue, key=levels.__getitem__)
    if last == g or levels[last] >= mean:
        return None, mean
    path: list[Hop] = []
    while last != g:
        last, hop = before[last]
        path.append(hop)
    return path[::-1], mean


def _push(
    cells: memoryview, levels: list[float], ways: Ways, g: int, path: list[Hop], bound: float
) -> bool:
    """As many tokens along the path as bring g to the bound, or both ends level; False when not
    even one of them would bring the slowest group down."""
    per_g, end = ways.per_pair[g], path[-1][0]
    top, low, per_end = levels[g], levels[end], ways.per_pair[end]
    opens = ways.gamma[end]
    even = (top - low - opens) / (per_g + per_end)
    n = int(min((top - bound) / per_g + 0.999, even))
    if n < 1:
        if low + opens + per_end >= top:
            return False
        n = 1
    for _, shared in path[1:]:
        n = min(n, sum([cells[at] for at, _ in shared]))
    if len(path) == 1:
        return _move(cells, levels, ways, g, path[0], n) > 0
    n = min(n, sum([cells[at] for at, _ in path[0][1]]))
    node = g
    for hop in path:
        _move(cells, levels, ways, node, hop, n)
        node = hop[0]
    return levels[g] < top and max(levels) <= top


def _relocate(cells: memoryview, levels: list[float], ways: Ways, g: int) -> bool:
    """All tokens of one expert from g to where they end first: closes it on g."""
    best, found = levels[g] * (1 - 1e-9), None
    for hop in ways.edges[g]:
        h, shared = hop
        low, per, opens = levels[h], ways.per_pair[h], ways.gamma[h]
        for cell in shared:
            have = cells[cell[0]]
            if have:
                end = low + have * per + (0.0 if cells[cell[1]] else opens)
                if end < best:
                    best, found = end, (h, cell, have)
    if found is None:
        return False
    return _move(cells, levels, ways, g, (found[0], [found[1]]), found[2]) > 0


def _move(cells: memoryview, levels: list[float], ways: Ways, g: int, hop: Hop, wanted: int) -> int:
    """Move so many tokens, or as many as there are, from g; best all of one expert."""
    h, shared = hop
    left = wanted
    for at_g, at_h in shared:
        have = cells[at_g]
        if not have:
            continue
        n = have if have < left else left
        if not cells[at_h]:
            levels[h] += ways.gamma[h]
        if n == have:
            levels[g] -= ways.gamma[g]
        cells[at_g] = have - n
        cells[at_h] += n
        left -= n
        if not left:
            break
    moved = wanted - left
    levels[g] -= moved * ways.per_pair[g]
    levels[h] += moved * ways.per_pair[h]
    return moved
