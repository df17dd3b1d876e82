"""What operators have fixed: replicas that must be somewhere, and replicas that must not."""

from __future__ import annotations

import numpy as np

from placement.dwell import Held
from placement.types import Bools, Fleet, Placement, bytes_by_group

Cell = tuple[int, int, str]  # layer, expert, group id


def masks(cells: frozenset[Cell], shape: tuple[int, int, int], ids: tuple[str, ...]) -> Bools:
    """Cells of groups that are there, as bool [L, E, G]."""
    index = {group: g for g, group in enumerate(ids)}
    mask = np.zeros(shape, np.bool_)
    for layer, expert, group in cells:
        if group in index and layer < shape[0] and expert < shape[1]:
            mask[layer, expert, index[group]] = True
    return mask


def held_too(held: Held | None, pinned: Bools, barred: Bools) -> Held | None:
    """What a plan may not do for gain, with what operators have fixed."""
    if not pinned.any() and not barred.any():
        return held
    if held is None:
        return Held(pinned=pinned, barred=barred)
    return Held(pinned=held.pinned | pinned, barred=held.barred | barred)


def as_fixed(
    placement: Placement, fleet: Fleet, pinned: Bools, barred: Bools, staying: Bools
) -> Placement:
    """`placement` with the pinned replicas on groups that stay, as far as bytes allow (reserve
    included), and without the barred ones that another replica can stand in for."""
    resident = placement.resident.copy()
    memory = np.array([group.memory_bytes for group in fleet.groups])
    room = memory - bytes_by_group(resident, fleet.expert_bytes)
    for layer, expert, group in np.argwhere(pinned & ~resident & staying).tolist():
        size = int(fleet.expert_bytes[layer])
        if room[group] >= size:
            resident[layer, expert, group] = True
            room[group] -= size
    out = resident & barred & ((resident & ~barred).any(2, keepdims=True))
    resident &= ~out
    changed = (resident != placement.resident).any(2, keepdims=True)
    by_speed = resident * fleet.pair_rate
    by_speed = by_speed / np.maximum(by_speed.sum(2, keepdims=True), 1e-300)
    return Placement(resident=resident, share=np.where(changed, by_speed, placement.share))
