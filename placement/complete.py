"""A home for the experts that have none, beside replicas that stay where they are."""

from __future__ import annotations

import numpy as np

from placement.types import Bools, Fleet, Floats, Placement


def complete(
    fleet: Fleet,
    held: Bools,
    load: Floats | None = None,
    *,
    use_reserve: bool = False,
    staying: Bools | None = None,
) -> Placement:
    """`held` bool [L, E, G] plus one replica of each expert that none of the groups holds.

    load  float64 [L, E], what the experts weigh; None: all alike. Heaviest first, each goes to the
    group that is done soonest with it among those with room (Graham's list scheduling on uniform
    machines). Budgets leave the reserve free unless `use_reserve`: losing a group is what it is
    for. An expert for which no group has room stays without a replica; the caller sees it in
    `resident`.
    """
    resident = held.copy()
    layers, experts, _ = held.shape
    weight = np.ones((layers, experts)) if load is None else np.asarray(load) + 1e-9
    sizes = fleet.expert_bytes
    budget = fleet.budget_bytes + (fleet.reserve_bytes if use_reserve else 0)
    room = budget - np.einsum("leg,l->g", held.astype(np.int64), sizes)  # [G] bytes
    if staying is not None:
        room = np.where(staying, room, 0)
    copies = np.maximum(held.sum(2), 1)
    missing = fleet.present(experts) & ~held.any(2)
    for layer in range(layers):
        busy = (weight[layer] / copies[layer]) @ held[layer]  # [G]
        size = int(sizes[layer])
        wanted = np.flatnonzero(missing[layer])
        for expert in wanted[np.argsort(-weight[layer, wanted], kind="stable")]:
            done = np.where(room >= size, (busy + weight[layer, expert]) / fleet.pair_rate, np.inf)
            group = int(done.argmin())
            if not np.isfinite(done[group]):
                continue
            resident[layer, expert, group] = True
            busy[group] += weight[layer, expert]
            room[group] -= size
    share = resident / np.maximum(resident.sum(2, keepdims=True), 1)
    return Placement(resident=resident, share=share)
