"""Which keys the rows of a step see: block tables and masks of decode rows and prefill chunks."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from raymoe.engine.sequence import Sequence

SPLIT_BYTES = 192 << 10
"""Decode rows are attended in another call when padding them would read more than this per layer:
what one more call costs (35 us on the development machine, 16 KiB blocks, benchmarks/engine.py)."""


class Reach(NamedTuple):
    """How far back a layer looks: everything, the last `window` tokens, or its own `chunk`."""

    window: int | None = None
    chunk: int | None = None

    def first(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0 if self.window is None else max(0, position - self.window + 1)


EVERYTHING = Reach()


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Decode rows first..last-1, of about equal length, attended in one call.

    table: int64 [rows * H_kv * blocks] of the pool's (block, head) pairs; start, stop: the keys to
    use of the gathered ones; mask: additive [rows, 1, 1, stop - start], None when every key counts.
    """

    first: int
    last: int
    table: Tensor
    start: int
    stop: int
    mask: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """One prefill chunk: packed rows first..last-1.

    table: int64 [H_kv * blocks] covering what the chunk sees, None when that is only itself;
    stop: keys to use; mask: additive [rows, stop], None for plain causal.
    """

    first: int
    last: int
    table: Tensor | None
    stop: int
    mask: Tensor | None


def by_head(table: np.ndarray, heads: int, device: torch.device) -> Tensor:
    """Blocks [rows, blocks] -> the pool's (block, head) pairs, int64 [rows * heads * blocks]."""
    pairs = table[:, None, :] * heads + np.arange(heads)[:, None]  # [rows, heads, blocks]
    return torch.from_numpy(pairs.reshape(-1)).to(device)


def additive(hidden: np.ndarray, device: torch.device) -> Tensor:
    """A mask to add to scores: minus infinity where `hidden`."""
    mask = np.where(hidden, np.float32("-inf"), np.float32(0.0))
    return torch.from_numpy(mask).to(device)


def buckets_of(
    decode: Rows[Sequence],
    row: int,
    reach: Reach,
    block_tokens: int,
    heads: int,
    token_bytes: int,
    device: torch.device,
) -> list[Bucket]:
    """Cut decode rows, the first of which is packed row `row`, where padding would cost a call."""
    spans = []  # (first block, blocks) of what each row sees
    for one in decode:
        first = reach.first(one.computed) // block_tokens
        spans.append((first, one.computed // block_tokens + 1 - first))
    spare = SPLIT_BYTES // (token_bytes * block_tokens)
    cuts, widest, total = [0], 0, 0
    for at, (_, blocks) in enumerate(spans):
        widest, total = max(widest, blocks), total + blocks
        if widest * (at + 1 - cuts[-1]) - total > spare:
            cuts.append(at)
            widest, total = blocks, blocks
    cuts.append(len(spans))
    return [
        _bucket(decode[a:b], spans[a:b], row + a, reach, block_tokens, heads, device)
        for a, b in pairwise(cuts)
        if a < b
    ]


def _bucket(
    rows: Rows[Sequence],
    spans: Rows[tuple[int, int]],
    row: int,
    reach: Reach,
    block_tokens: int,
    heads: int,
    device: torch.device,
) -> Bucket:
    table = np.zeros((len(rows), max(blocks for _, blocks in spans)), dtype=np.int64)
    low = np.zeros(len(rows), dtype=np.int64)  # keys low..high-1 of each row count
    high = np.zeros(len(rows), dtype=np.int64)
    for at, (one, (first, blocks)) in enumerate(zip(rows, spans, strict=True)):
        table[at, :blocks] = one.blocks[first : first + blocks]
        low[at] = reach.first(one.computed) - first * block_tokens
        high[at] = one.computed + 1 - first * block_tokens
    start, stop = int(low.min()), int(high.max())
    mask = None
    if start != low.max() or stop != high.min():
        keys = np.arange(start, stop)
        hidden = (keys < low[:, None]) | (keys >= high[:, None])
        mask = additive(hidden, device)[:, None, None]
    return Bucket(
        first=row,
        last=row + len(rows),
        table=by_head(table, heads, device),
        start=start,
        stop=stop,
        mask=mask,
    )


def segment_of(
    sequence: Sequence,
    tokens: int,
    row: int,
    reach: Reach,
    block_tokens: int,
    heads: int,
    device: torch.device,
) -> Segment:
    """What the next `tokens` tokens of a sequence see, as packed rows from `row`."""
    start = sequence.computed
    end = start + tokens
    if start == 0 and reach.first(end - 1) == 0:
        return Segment(first=row, last=row + tokens, table=None, stop=tokens, mask=None)
    first = reach.first(start) // block_tokens
    keys = np.arange(first * block_tokens, end)
    positions = range(start, end)
    hidden = keys > np.array(positions)[:, None]
    if reach != EVERYTHING:
        hidden |= keys < np.array([reach.first(p) for p in positions])[:, None]
    table = np.array([sequence.blocks[first : -(-end // block_tokens)]], dtype=np.int64)
    return Segment(
        first=row,
        last=row + tokens,
        table=by_head(table, heads, device),
        stop=end - first * block_tokens,
        mask=additive(hidden, device),
    )
