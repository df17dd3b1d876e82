"""Benefit curves: a layer's time by the number of extra replicas (CRAFT's idea, on unequal groups).

For each count the layer is packed afresh for the expected load and then replayed on the scenarios
with the per-batch split; the score is the mean time of its slowest group. Counts between the
measured ones are interpolated; every curve is made to fall.
"""

from __future__ import annotations

import numpy as np

from placement.pack import pack_levels, replica_counts
from placement.pour import host_lists, pour
from placement.types import Bools, Floats, Ints

_CELLS = 3_200_000  # rows x groups x experts of one pass: bounds the time and the memory


_FEW = 3  # points of a curve below which nothing is replayed


def menu(groups: int, layers: int, experts: int, most: int) -> Ints:
    """The replica counts to measure: every one while that is cheap, else denser at the low end."""
    rows = max(int(_CELLS // max(layers * groups * experts, 1)), 3)
    if most + 1 <= rows:
        return np.arange(most + 1)
    return np.unique(np.round(most * (np.linspace(0, 1, rows) ** 1.5)).astype(np.int64))


def curves(
    load: Floats,
    scenarios: Floats,
    present: Bools,
    caps: Ints,
    rate: Floats,
    base: Floats,
    counts: Ints,
) -> Floats:
    """Time of each layer with 0, 1, ... counts[-1] extra replicas, float64 [L, counts[-1] + 1].

    load [L, E], scenarios [M, L, E] in pairs/s; caps int64 [K, L, G], most replicas of the layer
    a group takes with counts[k] extras; counts int64 [K], rising, the first 0.
    """
    layers, experts = load.shape
    k, groups = len(counts), len(rate)
    loads = np.broadcast_to(load, (k, layers, experts)).reshape(k * layers, experts)
    here = np.broadcast_to(present, (k, layers, experts)).reshape(k * layers, experts)
    copies = replica_counts(loads, np.repeat(counts, layers), here, groups)
    resident, level = pack_levels(loads, copies, caps.reshape(k * layers, groups), rate)
    if k <= _FEW:  # a large fleet: the packing's own levels, without a replay
        return _every(level.max(1).reshape(k, layers), counts)
    hosts, held = host_lists(resident)
    cases = np.broadcast_to(scenarios[None], (k, *scenarios.shape)).transpose(0, 2, 1, 3)
    poured = pour(cases.reshape(k * layers, -1, experts), hosts, held, rate, base)
    return _every(poured.level.max(2).mean(1).reshape(k, layers), counts)


def _every(time: Floats, counts: Ints) -> Floats:
    """Times [K, L] at `counts`, made to fall and interpolated: [L, counts[-1] + 1]."""
    time = np.minimum.accumulate(time, 0)
    every = np.arange(int(counts[-1]) + 1)
    return np.stack([np.interp(every, counts, column) for column in time.T])
