"""A target without the replicas that cannot be loaded where they were to be."""

from __future__ import annotations

import numpy as np

from placement.types import Bools, Fleet, Floats, Ints, Placement, bytes_by_group


def around(
    placement: Placement, fleet: Fleet, barred: Bools, ready: Bools, load: Floats, staying: Bools
) -> Placement:
    """`placement` without the barred replicas, bool [L, E, G]; experts that lose their last one
    get another home: where they are already, else the group that is done soonest with them among
    those with room, reserves included, else one that gives up spare replicas, or an expert that a
    third group has room for (one whose checkpoint cannot be read can still copy from others).

    What finds no other home keeps the one it had: it is tried there again and again.
    load: pairs/s [L, E], heaviest first; staying: bool [G], the groups that may take something.
    """
    out = placement.resident & barred
    resident = placement.resident & ~out
    homeless = out.any(2) & ~resident.any(2)
    open_to = ~barred & staying  # [L, E, G]
    sizes = fleet.expert_bytes
    held = bytes_by_group(resident, sizes)
    copies = np.maximum(resident.sum(2), 1)
    busy = np.einsum("leg,le->lg", resident, load / copies)
    cells = np.argwhere(homeless)
    hopeless: set[tuple[int, bytes]] = set()  # sizes, and groups that were looked at in vain
    order = np.argsort(-load[cells[:, 0], cells[:, 1]], kind="stable")
    for layer, expert in cells[order].tolist():
        size = int(sizes[layer])
        home = None
        end = (busy[layer] + load[layer, expert]) / fleet.pair_rate
        end = end + 1e-9 * held / np.maximum(fleet.budget_bytes, 1)  # idle ones spread by bytes
        may = open_to[layer, expert]
        for room in (fleet.budget_bytes - held, fleet.budget_bytes + fleet.reserve_bytes - held):
            for fits in (may & ready[layer, expert] & (room >= size), may & (room >= size)):
                if home is None and fits.any():
                    home = int(np.where(fits, end, np.inf).argmin())
        asked = size, may.tobytes()
        if home is None and asked not in hopeless:
            home = _make_room(resident, fleet, load, held, may, size)
            if home is None:
                home = _make_way(resident, fleet, load, held, may, size, open_to, ready)
        if home is None:
            hopeless.add(asked)
            resident[layer, expert] = placement.resident[layer, expert]
            held += np.where(resident[layer, expert], size, 0)
            continue
        resident[layer, expert, home] = True
        held[home] += size
        busy[layer, home] += load[layer, expert]
    changed = (resident != placement.resident).any(2, keepdims=True)
    by_speed = resident * fleet.pair_rate
    by_speed = by_speed / np.maximum(by_speed.sum(2, keepdims=True), 1e-300)
    return Placement(resident=resident, share=np.where(changed, by_speed, placement.share))


def _make_room(
    resident: Bools, fleet: Fleet, load: Floats, held: Ints, may: Bools, size: int
) -> int | None:
    """Takes the spare replicas that carry least from one of the groups `may`, until `size` bytes
    are free there; the group, or None when none has so many."""
    order: list[int] = np.argsort(held - fleet.budget_bytes, kind="stable").tolist()
    for group in order:
        if not may[group]:
            continue
        copies = resident.sum(2)
        layer, expert = np.nonzero(resident[:, :, group] & (copies > 1))
        room, out = int(fleet.budget_bytes[group] - held[group]), []
        for i in np.argsort(load[layer, expert] / copies[layer, expert], kind="stable").tolist():
            if room >= size:
                break
            room += int(fleet.expert_bytes[layer[i]])
            out.append((int(layer[i]), int(expert[i])))
        if room < size:
            continue
        for at in out:
            resident[at[0], at[1], group] = False
            held[group] -= int(fleet.expert_bytes[at[0]])
        return group
    return None


def _make_way(
    resident: Bools,
    fleet: Fleet,
    load: Floats,
    held: Ints,
    may: Bools,
    size: int,
    open_to: Bools,
    ready: Bools,
) -> int | None:
    """Moves an expert that others can copy from one of the groups `may` to a third that has room,
    so that `size` bytes are free; the group they are free in, or None."""
    sizes = fleet.expert_bytes
    room = fleet.budget_bytes - held
    takers = open_to & ~resident & (room >= sizes[:, None])[:, None, :]  # [L, E, G]
    others = takers.sum(2)
    single = resident.sum(2) == 1
    order: list[int] = np.argsort(-room, kind="stable").tolist()
    for group in order:
        if not may[group]:
            continue
        moves = resident[:, :, group] & ready[:, :, group] & single
        moves &= (others > takers[:, :, group]) & (room[group] + sizes[:, None] >= size)
        if not moves.any():
            continue
        lightest = int(np.where(moves, load, np.inf).argmin())
        layer, expert = (int(i) for i in np.unravel_index(lightest, load.shape))
        to = takers[layer, expert].copy()
        to[group] = False
        target = int(np.where(to, room, -1).argmax())
        resident[layer, expert, [group, target]] = [False, True]
        held[group] -= int(sizes[layer])
        held[target] += int(sizes[layer])
        return group
    return None
