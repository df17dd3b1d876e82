"""Second copies for the sake of survival: as many experts as memory allows live in two groups."""

from __future__ import annotations

import numpy as np

from placement.types import Bools, Fleet, Floats, Placement, bytes_by_group


def with_copies(
    placement: Placement,
    fleet: Fleet,
    copies: int,
    load: Floats | None = None,
    staying: Bools | None = None,
) -> Placement:
    """`placement` with more replicas, until every expert has `copies` or no group has room.

    load  float64 [L, E], heaviest first; None: all alike. A copy goes to the group with the most
    room to spare relative to its budget, on a node that has none of this expert if there is one.
    Bytes beyond the budgets (the reserve) are not touched, and nothing is taken away.
    """
    if copies <= 1:
        return placement
    resident = placement.resident.copy()
    layers, experts, _ = resident.shape
    weight = np.zeros((layers, experts)) if load is None else load
    budget = fleet.budget_bytes.astype(np.float64)
    room = budget - bytes_by_group(resident, fleet.expert_bytes)
    if staying is not None:
        room[~staying] = 0.0
    nodes = np.array([g.node for g in fleet.groups])
    elsewhere = nodes[:, None] != nodes[None, :]  # [G, G]
    for count in range(1, copies):
        cells = np.argwhere(resident.sum(2) == count)
        order = np.lexsort((cells[:, 1], cells[:, 0], -weight[cells[:, 0], cells[:, 1]]))
        for layer, expert in cells[order].tolist():
            size = int(fleet.expert_bytes[layer])
            held = resident[layer, expert]
            free = (room >= size) & ~held
            if not free.any():
                continue
            apart = free & elsewhere[:, held].all(1)
            group = int(np.where(apart if apart.any() else free, room / budget, -1.0).argmax())
            resident[layer, expert, group] = True
            room[group] -= size
    more = (resident & ~placement.resident).any(2, keepdims=True)
    by_speed = resident * fleet.pair_rate
    by_speed = by_speed / np.maximum(by_speed.sum(2, keepdims=True), 1e-300)
    return Placement(resident=resident, share=np.where(more, by_speed, placement.share))
