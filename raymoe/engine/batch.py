"""The index tensors of one step, computed once and used by every layer."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raymoe.engine.sequence import Sequence

SPLIT_BYTES = 192 << 10
"""A bucket is closed when padding its rows would copy more than this per layer: what one more
gather + attention call costs (35 us on the development machine, benchmarks/engine.py)."""

Chunks = list[tuple[Sequence, int]]
"""(sequence, tokens) in packed order: decode rows (one token each) first, then prefill."""


class Reach(NamedTuple):
    """How far back a layer looks: everything, the last `window` tokens, or its own `chunk`."""

    window: int | None = None
    chunk: int | None = None

    def first(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0 if self.window is None else max(0, position - self.window + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Decode rows first..last-1, of about equal length, attended in one call.

    table: int64 [rows * blocks]; start, stop: the keys to use of the gathered ones;
    mask: additive float [rows, 1, 1, stop - start], None when every key counts.
    """

    first: int
    last: int
    table: Tensor
    start: int
    stop: int
    mask: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One prefill chunk: packed rows first..last-1, at positions from `start`.

    table: int64 [blocks] covering what the chunk sees, None when that is only itself.
    mask: additive float [rows, keys], None for plain causal.
    """

    first: int
    last: int
    table: Tensor | None
    stop: int
    mask: Tensor | None


class StepBatch:
    """N packed tokens. Decode rows in falling order of length make the fewest buckets."""

    def __init__(self, chunks: Chunks, block_tokens: int, device: torch.device) -> None:
        self._device = device
        self._block_tokens = block_tokens
        self._chunks = chunks
        leading = takewhile(lambda chunk: chunk[1] == 1 and chunk[0].computed, chunks)
        self._decode = [one for one, _ in leading]
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for sequence, tokens in self._chunks:
            start = sequence.computed
            span = range(start, start + tokens)
            ids += sequence.tokens[start : start + tokens]
            positions += span
            blocks = sequence.blocks
            rows += [blocks[p // block_tokens] * block_tokens + p % block_tokens for p in span]
        self.decode_rows = len(self._decode)
        self.tokens = len(ids)
        packed = torch.tensor([ids, positions, rows], dtype=torch.int64, device=device)
        self.input_ids = packed[:1]  # [1, N]
        self.position_ids = packed[1:2]  # [1, N]
        self.pool_rows = packed[2]  # [N]
        self._buckets: dict[tuple[Reach, int], list[Bucket]] = {}
        self._segments: dict[Reach, list[Segment]] = {}

    def buckets(self, reach: Reach, token_bytes: int) -> list[Bucket]:
        """The decode rows' buckets, for a layer of this reach that stores `token_bytes` a token."""
        found = self._buckets.get((reach, token_bytes))
        if found is None:
            found = self._buckets[reach, token_bytes] = self._cut(reach, token_bytes)
        return found

    def segments(self, reach: Reach) -> list[Segment]:
        """The prefill chunks, for a layer of this reach."""
        found = self._segments.get(reach)
        if found is None:
            found, row = [], self.decode_rows
            for sequence, tokens in self._chunks[self.decode_rows :]:
                found.append(self._segment(reach, sequence, row, tokens))
                row += tokens
            self._segments[reach] = found
        return found

    def _cut(self, reach: Reach, token_bytes: int) -> list[Bucket]:
        size = self._block_tokens
        spans = []  # (first block, blocks) of what each row sees
        for one in self._decode:
            first = reach.first(one.computed) // size
            spans.append((first, one.computed // size + 1 - first))
        waste_blocks = SPLIT_BYTES // (token_bytes * size)
        found, begin, waste = [], 0, 0
        for row, (_, blocks) in enumerate(spans):
            waste += max(0, spans[begin][1] - blocks)
            if waste > waste_blocks:
                found.append(self._bucket(reach, spans, begin, row))
                begin, waste = row, 0
        if spans:
            found.append(self._bucket(reach, spans, begin, len(spans)))
        return found

    def _bucket(self, reach: Reach, spans: list[tuple[int, int]], begin: int, end: int) -> Bucket:
        size = self._block_tokens
        width = max(blocks for _, blocks in spans[begin:end])
        table = np.zeros((end - begin, width), dtype=np.int64)
        low = np.zeros(end - begin, dtype=np.int64)  # keys low..high-1 of each row count
        high = np.zeros(end - begin, dtype=np.int64)
        for row in range(begin, end):
            one, (first, blocks) = self._decode[row], spans[row]
            table[row - begin, :blocks] = one.blocks[first : first + blocks]
            low[row - begin] = reach.first(one.computed) - first * size
            high[row - begin] = one.computed + 1 - first * size
        start, stop = int(low.min()), int(high.max())
        mask = None
        if start != low.max() or stop != high.min():
            keys = np.arange(start, stop)
            hidden = (keys < low[:, None]) | (keys >= high[:, None])
            mask = self._additive(hidden)[:, None, None]
        return Bucket(
            first=begin,
            last=end,
            table=torch.from_numpy(table.reshape(-1)).to(self._device),
            start=start,
            stop=stop,
            mask=mask,
        )

    def _segment(self, reach: Reach, sequence: Sequence, row: int, tokens: int) -> Segment:
        size = self._block_tokens
        start = sequence.computed
        end = start + tokens
        queries = np.arange(start, end)
        lows = np.array([reach.first(p) for p in (start, end - 1)])
        if start == 0 and lows[1] == 0:
            return Segment(first=row, last=row + tokens, table=None, stop=tokens, mask=None)
        first = int(lows[0]) // size
        keys = np.arange(first * size, end)
        hidden = keys > queries[:, None]
        if reach != Reach():
            low = np.array([reach.first(p) for p in range(start, end)])
            hidden |= keys < low[:, None]
        table = sequence.blocks[first : -(-end // size)]
        return Segment(
            first=row,
            last=row + tokens,
            table=torch.tensor(table, dtype=torch.int64, device=self._device),
            stop=end - first * size,
            mask=self._additive(hidden),
        )

    def _additive(self, hidden: np.ndarray) -> Tensor:
        mask = np.where(hidden, np.float32("-inf"), np.float32(0.0))
        return torch.from_numpy(mask).to(self._device)
