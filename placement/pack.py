"""Which experts get the extra replicas, and which groups hold them: all layers at once.

Extra replicas go to argmax(load / copies) (EPLB's rule; optimal for the largest load per copy).
Packing is longest-processing-time first on unequal machines: the biggest piece goes where it would
end first, never twice on a group, never beyond the group's replicas of the layer.
"""

from __future__ import annotations

import numpy as np

from placement.types import Bools, Floats, Ints


def replica_counts(load: Floats, extra: Ints, present: Bools, most: int) -> Ints:
    """Copies of each expert, int64 [N, E]: one each and `extra` [N] more where they help most.

    load [N, E]; present bool [N, E]; at most `most` copies (groups) of one expert.
    """
    rows, experts = load.shape
    copies = present.astype(np.int64)
    if not experts or not extra.size or int(extra.max()) <= 0:
        return copies
    # Giving out one by one to argmax(load / copies) is giving out the largest of load / 1,
    # load / 2, ...: so find the price that as many as `extra` of them exceed, by bisection.
    # A tiny slope breaks ties towards small ids.
    tie = 1e-9 * (load.max(1, keepdims=True) + 1e-30) * np.arange(experts, 0, -1) / experts
    weight = np.where(present, load + tie, 0.0)
    low, high = np.zeros((rows, 1)), weight.max(1, keepdims=True) * 1.0000001
    wanted = extra[:, None]
    for _ in range(44):
        price = (low + high) / 2
        given = np.minimum(np.ceil(weight / price) - 1, most - 1).clip(0)
        over = given.sum(1, keepdims=True) > wanted
        low, high = np.where(over, price, low), np.where(over, high, price)
    given = np.minimum(np.ceil(weight / high) - 1, most - 1).clip(0)
    copies += given.astype(np.int64)
    return copies


def pack(load: Floats, copies: Ints, caps: Ints, rate: Floats) -> Bools:
    """Place the copies, bool [N, E, G].

    load    float64 [N, E], tokens of each expert; it divides evenly over its copies here
    copies  int64 [N, E]; experts with 0 are left out
    caps    int64 [N, G], most replicas a group takes of this row; each row's caps must hold one
            replica of each expert. Extra copies that find no free group are left out.
    rate    float64 [G]
    """
    resident, _ = pack_levels(load, copies, caps, rate)
    return resident


def pack_levels(load: Floats, copies: Ints, caps: Ints, rate: Floats) -> tuple[Bools, Floats]:
    """`pack`, and the level of each group (tokens over rate, even shares), float64 [N, G]."""
    rows, experts = load.shape
    groups = len(rate)
    piece = load / np.maximum(copies, 1)
    total = int(copies.sum(1).max()) if rows else 0
    # the rows' pieces, biggest first; the second and later copies of an expert come right after
    # its first, and rows with fewer pieces end in padding (expert index E)
    order = np.argsort(-np.where(copies > 0, piece, -1.0), axis=1, kind="stable")
    run = np.take_along_axis(copies, order, 1)
    ends = np.cumsum(run, 1)
    step = np.arange(total)
    slot = np.stack([np.searchsorted(row, step, side="right") for row in ends])
    padded = np.concatenate([order, np.full((rows, 1), experts)], 1)
    expert_of_step = np.take_along_axis(padded, np.minimum(slot, experts), 1)  # [N, total]
    # single precision: the choice of a group needs no more, and the loop is bound by memory
    weights = np.concatenate([piece, np.zeros((rows, 1))], 1).astype(np.float32)
    row = np.arange(rows)
    busy = np.zeros((rows, groups), np.float32)
    room = caps.astype(np.int64).copy()
    free = room.sum(1)
    owed = (copies > 0).sum(1)  # experts not placed yet: their places are kept
    held = np.zeros((rows, experts + 1), np.int64)
    wide = np.zeros((rows, experts + 1, groups), np.bool_)
    slow = (1.0 / rate).astype(np.float32)
    full = np.where(room > 0, 0.0, np.inf).astype(np.float32)
    far, none = np.float32(np.inf), np.float32(0)
    for s in range(total):
        expert = expert_of_step[:, s]
        first = held[row, expert] == 0
        weight = weights[row, expert]
        end = busy + weight[:, None]
        end *= slow
        end += full
        again = np.flatnonzero(~first)
        if len(again):  # never two copies on a group
            end[again] += np.where(wide[again, expert[again]], far, none)
        group = end.argmin(1)
        placed = (expert < experts) & (first | (free > owed)) & (end[row, group] < np.inf)
        at, who, where = row[placed], expert[placed], group[placed]
        wide[at, who, where] = True
        busy[at, where] += weight[placed]
        room[at, where] -= 1
        full[at, where] = np.where(room[at, where] > 0, 0.0, np.inf)
        free[placed] -= 1
        held[at, who] += 1
        owed[placed & first] -= 1
    return wide[:, :experts], (busy * slow).astype(np.float64)
