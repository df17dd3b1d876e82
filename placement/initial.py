"""The placement at start: one replica of each expert, by bytes and speed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from placement.errors import DoesNotFit
from placement.types import Fleet, Ints, Placement, check_load


def place_at_start(
    fleet: Fleet, load: npt.ArrayLike | None = None, experts: int | None = None
) -> Placement:
    """One replica of every expert; faster groups get more load, no group more than its budget.

    load     tokens of each expert [L, E]; None: all experts of a layer equally busy
    experts  E, when neither the load nor `fleet.experts_of_layer` says it

    Raises DoesNotFit (with the bytes) when the fleet cannot hold one of each.
    """
    if load is None:
        present = fleet.present(experts)
        weight = present.astype(np.float64)
    else:
        weight = check_load(load, fleet.layers)
        present = fleet.present(weight.shape[1])
        # an idle expert still costs a little, so that idle ones spread instead of piling up
        total = np.where(present, weight, 0).sum(1, keepdims=True)
        floor = np.where(total > 0, total, 1.0) / present.sum(1, keepdims=True) * 1e-3
        weight = np.where(present, np.maximum(weight, floor), 0.0)
    resident = np.zeros((*present.shape, len(fleet.groups)), np.bool_)
    left = fleet.budget_bytes.copy()
    owed = present.sum(1) * fleet.expert_bytes
    check_fits(fleet, int(owed.sum()))
    rate = fleet.pair_rate
    # big experts first: with unequal sizes the small ones fill what is left
    for layer in np.argsort(-fleet.expert_bytes, kind="stable"):
        size = int(fleet.expert_bytes[layer])
        room = _fair_room(left, size, int(present[layer].sum()), int(owed.sum()), rate)
        owed[layer] = 0
        busy = np.zeros(len(rate))
        for expert in np.argsort(-weight[layer], kind="stable"):
            if not present[layer, expert]:
                continue
            end = np.where(room > 0, (busy + weight[layer, expert]) / rate, np.inf)
            group = int(end.argmin())
            if not np.isfinite(end[group]):
                group = int(left.argmax())
            if left[group] < size:
                raise DoesNotFit(
                    f"one replica of each expert fits in total but not in pieces of {size} bytes: "
                    f"give one group {size - int(left[group])} more memory_bytes",
                    size - int(left[group]),
                )
            resident[layer, expert, group] = True
            busy[group] += weight[layer, expert]
            room[group] -= 1
            left[group] -= size
    return Placement(resident=resident, share=resident.astype(np.float64))


def check_fits(fleet: Fleet, needed_bytes: int) -> None:
    """Raise DoesNotFit when one replica of each expert exceeds the fleet's budget."""
    have = int(fleet.budget_bytes.sum())
    if needed_bytes > have:
        missing = needed_bytes - have
        raise DoesNotFit(
            f"one replica of each expert needs {needed_bytes} bytes, the groups have {have} "
            f"(memory_bytes less reserve_bytes): {missing} bytes are missing; add a group",
            missing,
        )


def _fair_room(
    left: Ints, size: int, experts: int, owed: int, rate: npt.NDArray[np.float64]
) -> Ints:
    """Most replicas of this layer each group may take, int64 [G], leaving later layers a place.

    A fast group would fill up on the first layers and leave the last ones to the slow groups. So
    a group gives a layer at most its even part of the bytes it has left, except that the layer
    must find a place somewhere.
    """
    whole: Ints = left // size
    part = np.minimum(
        whole, np.ceil(left * (experts * size / max(owed, 1)) / size).astype(np.int64)
    )
    short = experts - int(part.sum())
    for group in np.argsort(-rate, kind="stable"):
        more = min(max(short, 0), int(whole[group] - part[group]))
        part[group] += more
        short -= more
    return part
