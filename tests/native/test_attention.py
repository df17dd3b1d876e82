"""Attention in C against plain attention in double precision."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import pytest
import torch
from torch import Tensor

from raymoe.engine.batch import DecodePlan
from raymoe.native import native

pytestmark = pytest.mark.skipif(native() is None, reason="no C compiler here")

TOKENS = 4  # of a block


def decode(
    spans: Rows[tuple[int, int]],  # first and own position of each row
    *,
    heads: int,
    shared: int,
    key_width: int,
    value_width: int,
    sinks: Tensor | None = None,
    cap: float = 0.0,
    large: float = 1.0,
) -> None:
    torch.manual_seed(len(spans) + heads + key_width)
    stored = max(key_width, value_width)
    counts = [last // TOKENS + 1 for _, last in spans]
    blocks = 1 + sum(counts)
    keys = torch.randn(blocks, shared, TOKENS, key_width)
    values = torch.randn(blocks, shared, TOKENS, stored)
    numbers = iter(np.random.default_rng(0).permutation(np.arange(1, blocks)).tolist())
    tables = [[next(numbers) for _ in range(count)] for count in counts]
    # As transformers hands them over: [1, heads, rows, D], heads of one token side by side.
    query = (large * torch.randn(1, len(spans), heads, key_width)).transpose(1, 2)
    key = torch.randn(1, len(spans), shared, key_width).transpose(1, 2)
    value = torch.randn(1, len(spans), shared, value_width).transpose(1, 2)
    records: list[int] = []
    listed: list[int] = []
    for (first, last), table in zip(spans, tables, strict=True):
        at = 4 * len(spans) + len(listed)
        records += (first, last, at, first // TOKENS)
        listed += table[first // TOKENS :]
    plan = DecodePlan(np.array(records + listed, dtype=np.int64), max(b - a for a, b in spans) + 1)
    out = torch.full((len(spans), heads, value_width), torch.nan)
    library = native()
    assert library is not None
    library.decode(
        plan.plan, len(spans), heads, shared, TOKENS, key_width, value_width, stored,
        query.data_ptr(), query.stride(2), query.stride(1),
        key.data_ptr(), key.stride(2), key.stride(1),
        value.data_ptr(), value.stride(2), value.stride(1),
        keys.data_ptr(), values.data_ptr(), out.data_ptr(),
        None if sinks is None else sinks.data_ptr(), 0.3, cap, plan.scratch,
    )  # fmt: skip
    for row, ((first, last), table) in enumerate(zip(spans, tables, strict=True)):
        seen = keys[table].transpose(0, 1).flatten(1, 2)[:, first : last + 1].double()
        mixed = values[table].transpose(0, 1).flatten(1, 2)[:, first : last + 1].double()
        assert torch.equal(seen[:, -1].float(), key[0, :, row])
        assert torch.equal(mixed[:, -1, :value_width].float(), value[0, :, row])
        group = heads // shared
        scores = torch.einsum(
            "sgd,std->sgt", query[0, :, row].double().view(shared, group, -1), seen
        )
        scores = (0.3 * scores).flatten(0, 1)  # [H, keys]
        if cap:
            scores = torch.tanh(scores / cap) * cap
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], -1)
        weights = torch.softmax(scores, -1)[:, : last + 1 - first].view(shared, group, -1)
        expected = torch.einsum("sgt,std->sgd", weights, mixed[..., :value_width])
        torch.testing.assert_close(out[row].double(), expected.flatten(0, 1), rtol=2e-5, atol=2e-5)


def test_ragged_rows_and_heads_that_share_keys() -> None:
    spans = [(0, 0), (0, 3), (0, 4), (0, 17), (0, 100)]
    for heads, shared in ((4, 4), (8, 2), (7, 1)):
        decode(spans, heads=heads, shared=shared, key_width=32, value_width=32)


def test_widths_of_all_kinds() -> None:
    for key_width, value_width in ((16, 16), (128, 128), (24, 16), (20, 20), (3, 1), (80, 40)):
        spans = [(0, 9), (0, 30)]
        decode(spans, heads=2, shared=1, key_width=key_width, value_width=value_width)


def test_windows_begin_anywhere_in_a_block() -> None:
    spans = [(first, 21) for first in (1, 3, 4, 5, 7, 8, 21)]
    decode(spans, heads=2, shared=2, key_width=16, value_width=16)


def test_sinks_caps_and_large_scores() -> None:
    shape = {"heads": 4, "shared": 2, "key_width": 32, "value_width": 32}
    spans = [(0, 2), (0, 40)]
    decode(spans, sinks=torch.tensor([-3.0, 0.0, 2.0, 60.0]), **shape)  # type: ignore[arg-type]
    decode(spans, cap=2.5, **shape)  # type: ignore[arg-type]
    decode(spans, large=300.0, **shape)  # type: ignore[arg-type]
