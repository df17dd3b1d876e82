"""Water-filling: how the tokens of replicated experts level the groups, for many layers at once.

The planner's model of the per-batch split (placement/split.py): every expert's tokens go to those
of its replicas that end lowest. One expert at a time, with the others fixed, is exact; a few
sweeps over the replicated experts come close to the optimum. Vectorised over layers and
scenarios, so the Python loop is over the most experts any layer has replicated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.types import Bools, Floats, Ints

FAR = 1e18  # the level of a host that is only padding


@dataclass(kw_only=True, eq=False)
class Poured:
    """Levels and flows after pouring.

    pairs  float64 [L, M, G], pairs/s on each group
    level  float64 [L, M, G], pairs over rate: seconds of work a second
    rep    int [L, R], the replicated experts of each layer, padded with a free row
    hosts  int [L, R, C], their groups, padded with G
    flow   float64 [L, R, M, C], pairs/s of the expert on each of its groups
    """

    pairs: Floats
    level: Floats
    rep: Ints
    hosts: Ints
    flow: Floats


def pour(
    load: Floats, hosts: Ints, copies: Ints, rate: Floats, base: Floats, sweeps: int = 2
) -> Poured:
    """Pour the load over the replicas.

    load    float64 [L, M, E], pairs/s by layer, scenario, expert
    hosts   int [L, E, C], groups of each expert, padded with G
    copies  int [L, E]
    rate    float64 [G], pairs/s
    base    float64 [G], work already on each group (alpha), in pairs/s
    """
    layers, cases, _ = load.shape
    groups = len(rate)
    width = groups + 1
    # single replicas: straight to their group
    home = np.where(copies == 1, hosts[:, :, 0], groups)
    cell = (np.arange(layers * cases) * width).reshape(layers, cases, 1) + home[:, None, :]
    summed = np.bincount(cell.ravel(), load.ravel(), layers * cases * width)
    pairs: Floats = summed.astype(np.float64, copy=False).reshape(layers, cases, width)
    pairs[:, :, :groups] += base
    most = int((copies > 1).sum(1).max()) if copies.size else 0
    reach = max(int(copies.max()), 1) if copies.size else 1
    # Narrow first, widest last: what can go anywhere levels what cannot. Experts of a step have
    # about as many copies, so the steps of narrow ones work on narrow arrays.
    key = np.where(
        copies > 1, copies + load.mean(1) / (load.mean(1).max(initial=0.0) + 1e-300) / 2, 0.0
    )
    rep = np.argsort(-key, axis=1, kind="stable")[:, :most][:, ::-1]  # [L, R]
    row = np.arange(layers)[:, None]
    is_rep = copies[row, rep] > 1
    host = np.where(is_rep[:, :, None], hosts[row, rep, :reach], groups)  # [L, R, C]
    amount = load[row[:, :, None], np.arange(cases)[None, :, None], rep[:, None, :]]  # [L, M, R]
    amount = np.ascontiguousarray(np.where(is_rep[:, None, :], amount, 0.0).transpose(2, 0, 1))
    rate_of = np.append(rate, 1.0)
    offset = (np.arange(layers)[:, None] * cases + np.arange(cases)) * width  # [L, M]
    flows = np.zeros((most, reach, layers, cases))
    flat = pairs.reshape(-1)
    steps = []
    for r, copied in enumerate(copies[row, rep].max(0, initial=1).tolist()):
        groups_of_step = host[:, r, :copied].T[:, :, None]  # [c, L, 1]
        far = np.where(groups_of_step == groups, FAR, 0.0)
        at = groups_of_step + offset  # [c, L, M]
        steps.append((at, rate_of[groups_of_step], far, amount[r]))
    for sweep in range(sweeps):
        for r, (at, rates, far, tokens) in enumerate(steps):
            under = flat[at]
            out = flows[r, : len(at)]
            if sweep:
                under -= out
            poured = fill(under, rates, far, tokens)
            out[:] = poured
            under += poured
            flat[at] = under
    pairs = pairs[:, :, :groups]
    flow = flows.transpose(2, 0, 3, 1)
    return Poured(pairs=pairs, level=pairs / rate, rep=rep, hosts=host, flow=flow)


def merge(old: Poured, new: Poured, layers: Ints, taken: Bools) -> Poured:
    """`old` with the rows of `layers` where `taken` (bool, one for each) replaced by `new`'s."""
    count = max(old.rep.shape[1], new.rep.shape[1])
    reach = max(old.hosts.shape[2], new.hosts.shape[2])
    groups = old.pairs.shape[2]
    at, source = layers[taken], np.flatnonzero(taken)
    pairs, level = old.pairs.copy(), old.level.copy()
    pairs[at], level[at] = new.pairs[source], new.level[source]
    cases = old.flow.shape[2]
    rep = np.zeros((len(pairs), count), np.int64)
    hosts = np.full((len(pairs), count, reach), groups, np.int64)
    flow = np.zeros((len(pairs), count, cases, reach))
    kept = np.ones(len(pairs), np.bool_)
    kept[at] = False
    for part, rows, origin in (
        (old, np.flatnonzero(kept), np.flatnonzero(kept)),
        (new, at, source),
    ):
        r, c = part.hosts.shape[1:]
        rep[rows, count - r :] = part.rep[origin]
        hosts[rows, count - r :, :c] = part.hosts[origin]
        flow[rows, count - r :, :, :c] = part.flow[origin]
    return Poured(pairs=pairs, level=level, rep=rep, hosts=hosts, flow=flow)


def fill(under: Floats, rates: Floats, far: Floats, amount: Floats) -> Floats:
    """Pour `amount` [...] over hosts [C, ...] that hold `under` pairs: pairs for each host.

    The level is the smallest (amount + held by a set of hosts) / (their rate), found from above:
    start with all hosts, leave out those that stick out, again. Three rounds settle nearly all
    cases; what is left is scaled so that the amounts always sum up.
    """
    start = under / rates + far
    weight = rates * (far < FAR / 2)
    for _ in range(min(len(start), 3)):
        level = (amount + (weight * start).sum(0)) / np.maximum(weight.sum(0), 1e-300)
        weight = rates * (start < level)
    poured: Floats = np.maximum(level - start, 0.0)
    poured *= rates
    total = poured.sum(0)
    poured *= amount / np.maximum(total, 1e-300)
    return poured


def host_lists(resident: Bools, spare: int = 0) -> tuple[Ints, Ints]:
    """resident bool [L, E, G] -> (hosts int [L, E, C] padded with G, copies int [L, E])."""
    layers, experts, groups = resident.shape
    copies = resident.sum(2, dtype=np.int64)
    most = max(int(copies.max()) if copies.size else 1, 1) + spare
    hosts = np.full((layers, experts, most), groups, np.int64)
    layer, expert, group = np.nonzero(resident)
    start = np.cumsum(copies.ravel()) - copies.ravel()
    rank = np.arange(len(group)) - start[layer * experts + expert]
    hosts[layer, expert, rank] = group
    return hosts, copies


def even_shares(load: Floats, resident: Bools, rate: Floats, base: Floats) -> Floats:
    """Shares float64 [L, E, G] that level the groups for the load [L, E]; by speed where idle."""
    layers, experts, groups = resident.shape
    hosts, copies = host_lists(resident)
    sweeps = 4 if resident.size < 500_000 else 2
    poured = pour(load[:, None, :], hosts, copies, rate, base, sweeps)
    # written by replica: most of the array is empty
    share = np.zeros(layers * experts * (groups + 1))
    speeds = np.append(rate, 0.0)[hosts]  # [L, E, C]
    speeds /= np.maximum(speeds.sum(2, keepdims=True), 1e-300)
    first = np.arange(layers * experts).reshape(layers, experts) * (groups + 1)
    share[first[:, :, None] + hosts] = speeds
    flow = poured.flow[:, :, 0, :]
    total = flow.sum(2)
    layer, r = np.nonzero(total > 0)
    part = flow[layer, r] / total[layer, r][:, None]
    share[first[layer, poured.rep[layer, r]][:, None] + poured.hosts[layer, r]] = part
    out: Floats = share.reshape(layers, experts, groups + 1)[:, :, :groups]
    return out
