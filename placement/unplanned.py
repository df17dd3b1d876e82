"""Placements and loads that no plan made: other groups, nothing measured yet, what is there."""

from __future__ import annotations

import numpy as np

from placement.actions import Snapshot
from placement.forecast import Forecast
from placement.types import Bools, Fleet, Placement


def regroup(placement: Placement, old: tuple[str, ...], new: tuple[str, ...]) -> Placement:
    """The placement in another order of groups; new groups are empty, lost ones left out."""
    index = {group: g for g, group in enumerate(old)}
    layers, experts, _ = placement.resident.shape
    resident = np.zeros((layers, experts, len(new)), np.bool_)
    share = np.zeros((layers, experts, len(new)))
    for g, group in enumerate(new):
        if group in index:
            resident[:, :, g] = placement.resident[:, :, index[group]]
            share[:, :, g] = placement.share[:, :, index[group]]
    total = share.sum(2, keepdims=True)
    even = resident / np.maximum(resident.sum(2, keepdims=True), 1)
    share = np.where(total > 1e-12, share / np.maximum(total, 1e-300), even)
    return Placement(resident=resident, share=share)


def uniform(fleet: Fleet, experts: int) -> Forecast:
    """Every expert equally busy, the fleet half busy: what to plan for before any traffic."""
    present = fleet.present(experts)
    each = 0.5 * float(fleet.pair_rate.sum()) / float(present.sum())
    load = np.where(present, each, 0.0)
    return Forecast(load=load, scenarios=load[None], spread=np.zeros_like(load))


def observed(snapshot: Snapshot) -> Placement:
    """What is ready now, as a placement."""
    resident: Bools = snapshot.ready.copy()
    share = resident * snapshot.fleet.pair_rate
    share = share / np.maximum(share.sum(2, keepdims=True), 1e-300)
    return Placement(resident=resident, share=share)
