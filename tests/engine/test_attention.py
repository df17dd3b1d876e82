"""Attention over the paged cache against a plain computation over whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raymoe.engine import tables
from raymoe.engine.attention import AttentionCall, PackedStep
from raymoe.engine.batch import StepBatch
from raymoe.engine.blocks import BlockPool
from raymoe.engine.kv import KVCache, KVShape
from raymoe.engine.lanes import Lanes, Shelf
from raymoe.engine.sequence import Sequence, start_sequence
from raymoe.engine.tables import Reach
from tests.engine.support import request

H = 4


def truth_of(
    query: Tensor, key: Tensor, value: Tensor, reach: Reach, sinks: Tensor | None
) -> Tensor:
    """[N, H, D_k], [N, H_kv, D_k], [N, H_kv, D_v] of one whole sequence, position by position."""
    out = torch.empty(len(query), H, value.shape[-1])
    group = H // key.shape[1]
    for position in range(len(query)):
        first = reach.first(position)
        for head in range(H):
            keys = key[first : position + 1, head // group]
            scores = (keys @ query[position, head]) * query.shape[-1] ** -0.5
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1]])
            weights = scores.double().softmax(-1)[: position + 1 - first].float()
            out[position, head] = weights @ value[first : position + 1, head // group]
    return out


@pytest.mark.parametrize("reach", [Reach(), Reach(window=5), Reach(chunk=6)], ids=str)
@pytest.mark.parametrize(
    ("heads_kv", "widths"), [(2, (8, 8)), (1, (8, 8)), (4, (8, 6)), (2, (6, 8))], ids=str
)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(
    ("split", "budget"), [(0, 0), (1 << 30, 0), (0, 100_000), (1 << 30, 100_000), (0, 1000)]
)
def test_ragged_steps_equal_whole_sequences(
    reach: Reach, heads_kv: int, widths: tuple[int, int], sinks: bool, split: int, budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(tables, "SPLIT_BYTES", split)  # a bucket a length, or one for all
    torch.manual_seed(0)
    lengths = (3, 17, 9, 30)
    queries = [torch.randn(n, H, widths[0]) for n in lengths]
    keys = [torch.randn(n, heads_kv, widths[0]) for n in lengths]
    values = [torch.randn(n, heads_kv, widths[1]) for n in lengths]
    sink = torch.randn(H) if sinks else None
    truth = [truth_of(q, k, v, reach, sink) for q, k, v in zip(queries, keys, values, strict=True)]
    module = nn.Module()
    shape = KVShape(heads=heads_kv, key_dim=widths[0], value_dim=widths[1], dtype=torch.float32)
    pool = BlockPool(64, 4)
    lanes = Lanes(budget_tokens=budget, split_tokens=split // 64)
    cache = KVCache({module: shape}, 64, 4, torch.device("cpu"))
    sequences = [start_sequence(request(str(n), (0,) * n), n) for n in lengths]
    # Whole, in pieces, and token by token, together in steps.
    pieces = [[3], [4, 1, 1, 7, 1, 1, 1, 1], [9], [8, 8, 8, 1, 1, 1, 1, 1, 1]]
    for step in range(9):
        chunks = [
            (one, pieces[at][step]) for at, one in enumerate(sequences) if step < len(pieces[at])
        ]
        decode = [one for one, tokens in chunks if tokens == 1 and one.computed]
        shelves = lanes.place(decode)
        laned = [one for shelf in shelves for one in shelf.members]
        chunks = (
            [(one, 1) for one in laned]
            + [(one, 1) for one in decode if one not in laned]
            + [(one, tokens) for one, tokens in chunks if one not in decode]
        )
        for one, tokens in chunks:
            need = pool.blocks_of(one.computed + tokens) - len(one.blocks)
            one.blocks += pool.take(need)
        found = attended(
            cache, module, shelves, chunks, sequences, queries, keys, values, sink, reach
        )
        row = 0
        for one, tokens in chunks:
            at = sequences.index(one)
            expected = truth[at][one.computed : one.computed + tokens]
            assert torch.allclose(found[row : row + tokens], expected, atol=2e-6)
            one.computed += tokens
            row += tokens
    assert [one.computed for one in sequences] == list(lengths)


def attended(
    cache: KVCache, module: nn.Module, shelves: list[Shelf], chunks: list[tuple[Sequence, int]],
    sequences: list[Sequence], queries: list[Tensor], keys: list[Tensor], values: list[Tensor],
    sinks: Tensor | None, reach: Reach,
) -> Tensor:  # fmt: skip
    """[N, H, D_v] of one step, called as transformers calls it."""

    def packed(parts: list[Tensor]) -> Tensor:
        rows = [parts[sequences.index(one)][one.computed : one.computed + n] for one, n in chunks]
        return torch.cat(rows).transpose(0, 1).unsqueeze(0)  # [1, heads, N, D]

    options: dict[str, Any] = {"sliding_window": reach.window, "s_aux": sinks}
    call = AttentionCall(packed(queries), packed(keys), packed(values), None, options)
    batch = StepBatch(chunks, 4, torch.device("cpu"), shelves)
    return PackedStep(cache, batch, {module: reach.chunk}).attend(module, call)
