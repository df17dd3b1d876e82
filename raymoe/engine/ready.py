"""The memory of lanes, and attention over it.

Letters: B lanes of a shelf, H query heads, H_kv key/value heads, g = H / H_kv, D_k and D_v widths.

In float32 on a CPU keys stand turned, [B, H_kv, D_k, capacity]: one token's scores are then a
product over contiguous rows, and two batched products with a softmax between them take two thirds
of the time of torch's fused attention (32 lanes of 110 keys, 4 heads of 32: 234 us against 361).
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from raymoe.engine.lanes import Shelf


@dataclass(frozen=True, kw_only=True, slots=True)
class ShelfRows:
    """Decode rows first..last-1 of a step, which are lanes 0..B-1 of a shelf.

    rows: int64 [B * H_kv], where new values (and keys) go in the flattened lanes; turned_rows:
    int64 [B * H_kv * D_k], the same for the numbers of turned keys; keys: how many a row may see;
    mask: additive [B, 1, 1, keys], None when all rows see all; mask_by_head: the same as
    [B * H_kv, 1, keys], of zeros when all see all; fills: (lane, its (block, head) pairs, tokens)
    of lanes to be filled first.
    """

    shelf: Shelf
    first: int
    last: int
    rows: Tensor
    turned_rows: Tensor
    keys: int
    mask: Tensor | None
    mask_by_head: Tensor
    fills: list[tuple[int, Tensor, int]]


class ReadyLanes:
    """The keys, or the values, of one layer's lanes."""

    def __init__(
        self, heads: int, width: int, dtype: torch.dtype, device: torch.device, *, turned: bool
    ) -> None:
        self.turned = turned
        self._heads = heads
        self._width = width
        self._dtype = dtype
        self._device = device
        self._lanes: dict[int, Tensor] = {}

    def of(self, shelf: Shelf) -> Tensor:
        """All lanes of a shelf, grown or shrunk to its rooms.

        [rooms, H_kv, capacity, D], or turned [rooms, H_kv, D, capacity].
        """
        found = self._lanes.get(shelf.capacity)
        if found is None or len(found) != shelf.rooms:
            size = (self._width, shelf.capacity) if self.turned else (shelf.capacity, self._width)
            grown = torch.zeros(
                shelf.rooms, self._heads, *size, dtype=self._dtype, device=self._device
            )
            if found is not None:
                kept = min(len(found), shelf.rooms)
                grown[:kept] = found[:kept]
            found = self._lanes[shelf.capacity] = grown
        return found

    def keep(self, capacities: Set[int]) -> None:
        """Free the memory of all other shelves."""
        for capacity in self._lanes.keys() - capacities:
            del self._lanes[capacity]

    def fill(self, shelf: Shelf, lane: int, stored: Tensor) -> None:
        """Copy a sequence's stored [H_kv, tokens, D] into its lane."""
        one = self.of(shelf)[lane]
        if self.turned:
            one = one.transpose(-1, -2)
        one[:, : stored.shape[1]] = stored
        one[:, stored.shape[1] :] = 0  # whatever was there must not reach this sequence

    def write(self, shelf: ShelfRows, new: Tensor) -> Tensor:
        """Write one token a lane, new [B, H_kv, D] -> the lanes in use, B first."""
        lanes = self.of(shelf.shelf)
        if self.turned:
            lanes.view(-1).index_copy_(0, shelf.turned_rows, new.reshape(-1))
        else:
            width = self._width
            lanes.view(-1, width).index_copy_(0, shelf.rows, new.reshape(-1, width))
        return lanes[: len(new)]


def attend_turned(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    shelf: ShelfRows,
    *,
    scale: float,
    cap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """query [B, H, D_k], keys [B, H_kv, D_k, capacity], values [B, H_kv, capacity, D] -> [B, H, D].

    sinks [H]: logits that take part in the softmax and add nothing.
    """
    rows, heads, width = query.shape
    shared = keys.shape[1]
    folded = query.reshape(rows * shared, heads // shared, width)  # the g heads of a key head
    turned = keys.flatten(0, 1)[:, :, : shelf.keys]
    mask = shelf.mask_by_head
    if cap is None:
        scores = torch.baddbmm(mask, folded, turned, alpha=scale)  # [B * H_kv, g, keys]
    else:
        scores = torch.tanh(torch.bmm(folded, turned) * (scale / cap)) * cap + mask
    out = torch.bmm(torch.softmax(scores, -1), values.flatten(0, 1)[:, : shelf.keys])
    out = out.view(rows, heads, -1)
    if sinks is not None:
        total = scores.logsumexp(-1).view(rows, heads)
        out = out * torch.sigmoid(total - sinks).unsqueeze(-1)
    return out
