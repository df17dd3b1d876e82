"""The index tensors of one step, computed once and used by every layer of the same kind."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from collections.abc import Sequence as Rows
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymoe.engine.kv import KVShape
from raymoe.engine.lanes import Shelf
from raymoe.engine.ready import ShelfRows
from raymoe.engine.sequence import Sequence
from raymoe.engine.tables import (
    EVERYTHING,
    Bucket,
    Reach,
    Segment,
    additive,
    buckets_of,
    by_head,
    segment_of,
)

Chunks = list[tuple[Sequence, int]]
"""(sequence, tokens) in packed order: decode rows (one token each) first, then prefill."""


class DecodePlan:
    """What `raymoe_decode` wants to know of a step's rows: addresses, and the memory behind."""

    __slots__ = ("_plan", "_scratch", "plan", "scratch")

    def __init__(self, plan: np.ndarray, longest: int) -> None:
        """plan: int64, see attention.c; longest: keys that one row sees at most."""
        self._plan = plan
        self._scratch = np.empty(longest, dtype=np.float32)
        self.plan = plan.ctypes.data
        self.scratch = self._scratch.ctypes.data


class StepBatch:
    """N packed tokens: first the members of `shelves`, then other decode rows, then prefill."""

    def __init__(
        self,
        chunks: Chunks,
        block_tokens: int,
        device: torch.device,
        shelves: Rows[Shelf] = (),
    ) -> None:
        self._device = device
        self._block_tokens = block_tokens
        self._chunks = chunks
        self._shelves = shelves
        leading = takewhile(lambda chunk: chunk[1] == 1 and chunk[0].computed, chunks)
        self._decode = [one for one, _ in leading]
        self._laned = sum(len(shelf.members) for shelf in shelves)
        assert self._decode[: self._laned] == [one for shelf in shelves for one in shelf.members]
        ids: list[int] = []
        positions: list[int] = []
        blocks: list[int] = []
        for sequence, tokens in chunks:
            start = sequence.computed
            span = range(start, start + tokens)
            ids += sequence.tokens[start : start + tokens]
            positions += span
            own = sequence.blocks
            blocks += [own[position // block_tokens] for position in span]
        self.decode_rows = len(self._decode)
        self.tokens = len(ids)
        packed = torch.tensor([ids, positions], dtype=torch.int64, device=device)
        self.input_ids = packed[:1]  # [1, N]
        self.position_ids = packed[1:]  # [1, N]
        self._block = np.array(blocks)[:, None]  # [N, 1]
        self._offset = np.array(positions)[:, None] % block_tokens
        self._made: dict[Hashable, Any] = {}

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return found

    def pool_rows(self, heads: int) -> Tensor:
        """Where each (token, head) goes in the pool, int64 [N * heads]."""

        def make() -> Tensor:
            rows = (self._block * heads + np.arange(heads)) * self._block_tokens + self._offset
            return torch.from_numpy(rows.reshape(-1)).to(self._device)

        rows: Tensor = self._once(("rows", heads), make)
        return rows

    def decode_plan(self, reach: Reach) -> DecodePlan:
        """All decode rows, for the C function and layers of this reach."""

        def make() -> DecodePlan:
            size = self._block_tokens
            records: list[int] = []
            blocks: list[int] = []
            at, longest = 4 * len(self._decode), 0
            for one in self._decode:
                position = one.computed
                first = reach.first(position)
                records += (first, position, at + len(blocks), first // size)
                blocks += one.blocks[first // size : position // size + 1]
                longest = max(longest, position + 1 - first)
            return DecodePlan(np.array(records + blocks, dtype=np.int64), longest)

        plan: DecodePlan = self._once(("plan", reach), make)
        return plan

    def shelf_rows(self, heads: int, key_dim: int) -> list[ShelfRows]:
        """The rows that have lanes, for layers that see everything."""

        def make() -> list[ShelfRows]:
            found, row = [], 0
            for shelf in self._shelves:
                found.append(self._shelf_rows(shelf, row, heads, key_dim))
                row += len(shelf.members)
            return found

        rows: list[ShelfRows] = self._once(("shelves", heads, key_dim), make)
        return rows

    def buckets(self, reach: Reach, shape: KVShape) -> list[Bucket]:
        """The decode rows to gather, for a layer of this reach and shape."""

        def make() -> list[Bucket]:
            row = self._laned if reach == EVERYTHING else 0
            return buckets_of(
                self._decode[row:], row, reach, self._block_tokens, shape.heads,
                shape.token_bytes, self._device,
            )  # fmt: skip

        found: list[Bucket] = self._once((reach, shape.heads, shape.token_bytes), make)
        return found

    def segments(self, reach: Reach, heads: int) -> list[Segment]:
        """The prefill chunks, for a layer of this reach."""

        def make() -> list[Segment]:
            found, row = [], self.decode_rows
            for one, tokens in self._chunks[self.decode_rows :]:
                found.append(
                    segment_of(one, tokens, row, reach, self._block_tokens, heads, self._device)
                )
                row += tokens
            return found

        found: list[Segment] = self._once((reach, heads), make)
        return found

    def _shelf_rows(self, shelf: Shelf, row: int, heads: int, key_dim: int) -> ShelfRows:
        members = shelf.members
        counts = np.array([one.computed + 1 for one in members])  # keys of each
        lane_heads = np.arange(len(members) * heads).reshape(-1, heads)
        at = (counts - 1)[:, None]
        rows = lane_heads * shelf.capacity + at
        numbers = np.arange(len(members) * heads * key_dim).reshape(len(members), -1)
        turned_rows = numbers * shelf.capacity + at
        keys = int(counts.max())
        mask, mask_by_head = None, torch.zeros(1, 1, 1, device=self._device)
        if counts.min() != keys:
            mask = additive(np.arange(keys) >= counts[:, None], self._device)[:, None, None]
            mask_by_head = mask.expand(-1, heads, -1, -1).reshape(-1, 1, keys)
        fills = []
        for lane in sorted(shelf.fresh):
            one = members[lane]
            used = one.blocks[: one.computed // self._block_tokens + 1]
            table = by_head(np.array([used], dtype=np.int64), heads, self._device)
            fills.append((lane, table, one.computed + 1))
        return ShelfRows(
            shelf=shelf,
            first=row,
            last=row + len(members),
            rows=torch.from_numpy(rows.reshape(-1)).to(self._device),
            turned_rows=torch.from_numpy(turned_rows.reshape(-1)).to(self._device),
            keys=keys,
            mask=mask,
            mask_by_head=mask_by_head,
            fills=fills,
        )
