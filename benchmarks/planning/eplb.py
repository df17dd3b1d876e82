"""The baselines: DeepSeek's published greedy (EPLB), written afresh, all layers at once.

Replicate: one more slot to argmax(load / copies), until every slot is used. Pack: slots by falling
load to the least loaded group that has a slot left; every group ends with equally many. The
hierarchical form first packs groups of experts to nodes. `speeds` packs by load / speed instead.
"""

from __future__ import annotations

import numpy as np


def eplb(load: np.ndarray, slots: int, groups: int, speeds: np.ndarray | None = None) -> np.ndarray:
    """Global EPLB. load [L, E], slots a group -> share float64 [L, E, G] (equal per slot)."""
    slot_expert, copies = replicate(load, slots * groups)
    weight = np.take_along_axis(load / copies, slot_expert, 1)
    group = balanced_packing(weight, groups, speeds)
    share = np.zeros((*load.shape, groups))
    layer = np.arange(len(load))[:, None]
    np.add.at(share, (layer, slot_expert, group), np.take_along_axis(1.0 / copies, slot_expert, 1))
    return share


def replicate(load: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """(expert of each slot int [L, slots], copies int [L, E])."""
    layers, experts = load.shape
    copies = np.ones((layers, experts), np.int64)
    slot_expert = np.empty((layers, slots), np.int64)
    slot_expert[:, :experts] = np.arange(experts)
    row = np.arange(layers)
    for slot in range(experts, slots):
        pick = (load / copies).argmax(1)
        slot_expert[:, slot] = pick
        copies[row, pick] += 1
    return slot_expert, copies


def balanced_packing(
    weight: np.ndarray, packs: int, speeds: np.ndarray | None = None
) -> np.ndarray:
    """weight [L, N] -> pack of each item, every pack with N / packs items."""
    layers, items = weight.shape
    room = np.full((layers, packs), items // packs)
    held = np.zeros((layers, packs))
    pack = np.zeros((layers, items), np.int64)
    row = np.arange(layers)
    order = np.argsort(-weight, axis=1, kind="stable")
    for i in range(items):
        item = order[:, i]
        end = held.copy() if speeds is None else (held + weight[row, item][:, None]) / speeds
        end[room <= 0] = np.inf
        at = end.argmin(1)
        pack[row, item] = at
        held[row, at] += weight[row, item]
        room[row, at] -= 1
    return pack


def eplb_hierarchical(
    load: np.ndarray, replicas: int, expert_groups: int, nodes: int, gpus: int
) -> np.ndarray:
    """phy2log int [L, replicas] as in DeepSeek's README (for checking ours against it)."""
    layers, experts = load.shape
    size = experts // expert_groups
    per_node = replicas // nodes
    group_load = load.reshape(layers, expert_groups, size).sum(2)
    node = balanced_packing(group_load, nodes)  # [L, expert_groups]
    out = np.empty((layers, replicas), np.int64)
    for layer in range(layers):
        for n in range(nodes):
            mine = _in_pack_order(node[layer], group_load[layer], n)
            ids = np.concatenate([np.arange(g * size, (g + 1) * size) for g in mine])
            slot_expert, copies = replicate(load[layer : layer + 1, ids], per_node)
            weight = np.take_along_axis(load[layer : layer + 1, ids] / copies, slot_expert, 1)
            gpu = balanced_packing(weight, gpus // nodes)[0]
            order = np.concatenate(
                [_in_pack_order(gpu, weight[0], g) for g in range(gpus // nodes)]
            )
            out[layer, n * per_node : (n + 1) * per_node] = ids[slot_expert[0][order]]
    return out


def _in_pack_order(pack: np.ndarray, weight: np.ndarray, which: int) -> np.ndarray:
    """Items of a pack in the order they were put in: by falling weight."""
    order = np.argsort(-weight, kind="stable")
    return order[pack[order] == which]
