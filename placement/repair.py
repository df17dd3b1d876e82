"""Make a layout legal again: every expert placed, nobody over budget, nothing on leaving groups.

Runs before the search when groups died, left, drained or lost memory; returns at once when the
layout is legal. What it does needs no gain: these actions are owed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.errors import DoesNotFit
from placement.types import Bools, Fleet, Floats, Ints, bytes_by_group


@dataclass(frozen=True, kw_only=True)
class Owed:
    """A replica that had to be placed (`placed`) or given up, whatever it gains."""

    kind: str  # "restore", "leave", "shrink", "budget"
    layer: int
    expert: int
    group: int
    loaded_bytes: int = 0


def repair(
    resident: Bools, fleet: Fleet, present: Bools, load: Floats, staying: Bools
) -> list[Owed]:
    """Repair `resident` [L, E, G] in place; load [L, E]; staying bool [G] (False: draining).

    Raises DoesNotFit when the staying groups cannot hold one replica of each expert.
    """
    owed: list[Owed] = []
    resident &= present[:, :, None]
    budget = np.where(staying, fleet.budget_bytes, 0)
    _check_total(fleet, present, budget)
    held = bytes_by_group(resident, fleet.expert_bytes)
    busy = _busy(resident, load)
    for group in np.flatnonzero(held > budget).tolist():
        _shrink(resident, fleet, load, group, int(budget[group]), held, bool(staying[group]), owed)
    missing = np.argwhere(present & ~resident.any(2))
    if len(missing):
        size = fleet.expert_bytes[missing[:, 0]]
        weight = load[missing[:, 0], missing[:, 1]]
        for i in np.lexsort((-weight, -size)).tolist():
            layer, expert = (int(v) for v in missing[i])
            _restore(resident, fleet, load, busy, held, budget, layer, expert, owed)
    return owed


def thin_out(resident: Bools, fleet: Fleet, load: Floats, extra_bytes: int) -> list[Owed]:
    """Drop spare replicas, in place, until they fill at most `extra_bytes` beyond one of each.

    Those that carry least for their bytes go first.
    """
    owed: list[Owed] = []
    size = fleet.expert_bytes
    spare = np.maximum(resident.sum(2, dtype=np.int64) - 1, 0)  # [L, E]
    over = int((spare.sum(1) * size).sum()) - extra_bytes
    while over > 0:
        part = np.where(spare > 0, load / (spare + 1) / size[:, None], np.inf)
        layer, expert = (int(i) for i in np.unravel_index(part.argmin(), part.shape))
        hosts = np.flatnonzero(resident[layer, expert])
        group = int(hosts[fleet.pair_rate[hosts].argmin()])
        resident[layer, expert, group] = False
        spare[layer, expert] -= 1
        over -= int(size[layer])
        owed.append(Owed(kind="budget", layer=layer, expert=expert, group=group))
    return owed


def _check_total(fleet: Fleet, present: Bools, budget: Ints) -> None:
    needed = int((present.sum(1) * fleet.expert_bytes).sum())
    if needed > int(budget.sum()):
        missing = needed - int(budget.sum())
        raise DoesNotFit(
            f"one replica of each expert needs {needed} bytes, the staying groups have "
            f"{int(budget.sum())}: {missing} bytes are missing; add a group",
            missing,
        )


def _busy(resident: Bools, load: Floats) -> Floats:
    """Load of each group when experts divide evenly, float64 [L, G]."""
    copies = np.maximum(resident.sum(2), 1)
    busy: Floats = np.einsum("leg,le->lg", resident, load / copies)
    return busy


def _shrink(
    resident: Bools,
    fleet: Fleet,
    load: Floats,
    group: int,
    budget: int,
    held: Ints,
    staying: bool,
    owed: list[Owed],
) -> None:
    """Drop replicas from a group until it is within its budget: spare ones first, light first."""
    layer, expert = np.nonzero(resident[:, :, group])
    copies = resident[layer, expert].sum(1)
    weight = load[layer, expert] / np.maximum(copies, 1)
    for i in np.lexsort((weight, copies < 2)).tolist():
        if held[group] <= budget:
            return
        at = int(layer[i]), int(expert[i])
        resident[at[0], at[1], group] = False
        held[group] -= int(fleet.expert_bytes[at[0]])
        owed.append(
            Owed(kind="shrink" if staying else "leave", layer=at[0], expert=at[1], group=group)
        )


def _restore(
    resident: Bools,
    fleet: Fleet,
    load: Floats,
    busy: Floats,
    held: Ints,
    budget: Ints,
    layer: int,
    expert: int,
    owed: list[Owed],
) -> None:
    """Place one missing expert where it ends first, evicting spare replicas if it must."""
    size = int(fleet.expert_bytes[layer])
    end = (busy[layer] + load[layer, expert]) / fleet.pair_rate
    end = end + 1e-9 * held / np.maximum(budget, 1)  # idle experts spread by bytes
    fits = budget - held >= size
    if not fits.any():
        _make_room(resident, fleet, load, held, budget, size, owed)
        fits = budget - held >= size
    group = int(np.where(fits, end, np.inf).argmin())
    resident[layer, expert, group] = True
    busy[layer, group] += load[layer, expert]
    held[group] += size
    owed.append(Owed(kind="restore", layer=layer, expert=expert, group=group, loaded_bytes=size))


def _make_room(
    resident: Bools,
    fleet: Fleet,
    load: Floats,
    held: Ints,
    budget: Ints,
    size: int,
    owed: list[Owed],
) -> None:
    """Evict the lightest spare replicas of the group that gets `size` free bytes at least load."""
    copies = resident.sum(2)
    best: tuple[float, int, list[tuple[int, int]]] | None = None
    for group in np.flatnonzero(budget >= size).tolist():
        layer, expert = np.nonzero(resident[:, :, group] & (copies > 1))
        weight = load[layer, expert] / copies[layer, expert]
        room, lost, out = int(budget[group] - held[group]), 0.0, []
        for i in np.argsort(weight, kind="stable").tolist():
            if room >= size:
                break
            room += int(fleet.expert_bytes[layer[i]])
            lost += float(weight[i])
            out.append((int(layer[i]), int(expert[i])))
        if room >= size and (best is None or lost < best[0]):
            best = lost, group, out
    if best is None:
        short = size - int((budget - held).max())
        raise DoesNotFit(
            f"an expert of {size} bytes finds no group with so many bytes free, though the total "
            f"would do: give one group {short} more memory_bytes",
            short,
        )
    chosen = best[1]
    for lost_layer, lost_expert in best[2]:
        resident[lost_layer, lost_expert, chosen] = False
        held[chosen] -= int(fleet.expert_bytes[lost_layer])
        owed.append(Owed(kind="shrink", layer=lost_layer, expert=lost_expert, group=chosen))
