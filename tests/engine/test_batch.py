from __future__ import annotations

import torch

from raymoe.engine.batch import StepBatch
from raymoe.engine.blocks import BlockPool
from raymoe.engine.kv import KVShape
from raymoe.engine.lanes import Lanes
from raymoe.engine.sequence import Sequence, start_sequence
from raymoe.engine.tables import EVERYTHING, Reach
from tests.engine.support import request

CPU = torch.device("cpu")
WIDE = KVShape(heads=2, key_dim=64, value_dim=64, dtype=torch.float32)  # 1024 bytes a token
NARROW = KVShape(heads=1, key_dim=2, value_dim=2, dtype=torch.float32)


def decoding(pool: BlockPool, tokens: int) -> Sequence:
    one = start_sequence(request(prompt_ids=tuple(range(tokens))), 0)
    one.blocks = pool.take(pool.blocks_of(tokens))
    one.computed = tokens - 1
    return one


def test_reach() -> None:
    assert [Reach().first(p) for p in (0, 9)] == [0, 0]
    assert [Reach(window=3).first(p) for p in (0, 2, 3, 9)] == [0, 0, 1, 7]
    assert [Reach(chunk=4).first(p) for p in (0, 3, 4, 9)] == [0, 0, 4, 8]


def test_rows_lie_where_the_block_table_says() -> None:
    pool = BlockPool(20, 4)
    one = start_sequence(request(prompt_ids=(9, 8, 7, 6, 5, 4)), 0)
    one.blocks = [7, 3]
    batch = StepBatch([(decoding(pool, 5), 1), (one, 6)], 4, CPU)
    assert batch.input_ids.tolist() == [[4, 9, 8, 7, 6, 5, 4]]
    assert batch.position_ids.tolist() == [[4, 0, 1, 2, 3, 4, 5]]
    assert batch.pool_rows(1).tolist() == [2 * 4, 28, 29, 30, 31, 12, 13]
    # Head by head within a block: block 2, heads 0 and 1, offset 0 first.
    assert batch.pool_rows(2).tolist()[:4] == [16, 20, 56, 60]
    assert batch.decode_rows == 1


def test_rows_of_like_length_share_a_bucket_without_a_mask() -> None:
    pool = BlockPool(200, 4)
    chunks = [(decoding(pool, 10), 1) for _ in range(3)]
    (bucket,) = StepBatch(chunks, 4, CPU).buckets(EVERYTHING, WIDE)
    assert (bucket.first, bucket.last, bucket.start, bucket.stop) == (0, 3, 0, 10)
    assert bucket.mask is None


def test_padding_that_costs_more_than_a_call_opens_a_bucket() -> None:
    pool = BlockPool(2000, 4)
    chunks = [(decoding(pool, tokens), 1) for tokens in (900, 890, 20, 10)]
    batch = StepBatch(chunks, 4, CPU)
    spans = [(bucket.first, bucket.last) for bucket in batch.buckets(EVERYTHING, WIDE)]
    assert spans == [(0, 2), (2, 4)]
    assert len(batch.buckets(EVERYTHING, NARROW)) == 1  # a narrow layer: padding is cheap
    assert len(batch.buckets(Reach(window=8), WIDE)) == 1  # short views: nothing to pad


def test_a_window_reads_only_its_blocks() -> None:
    pool = BlockPool(200, 4)
    one = decoding(pool, 40)
    (bucket,) = StepBatch([(one, 1)], 4, CPU).buckets(Reach(window=6), WIDE)
    first, second = one.blocks[8:10]  # positions 34..39
    assert bucket.table.tolist() == [2 * first, 2 * second, 2 * first + 1, 2 * second + 1]
    assert (bucket.start, bucket.stop, bucket.mask) == (2, 8, None)


def test_a_first_chunk_reads_only_itself_and_a_later_one_its_past() -> None:
    pool = BlockPool(200, 4)
    one = start_sequence(request(prompt_ids=tuple(range(30))), 0)
    one.blocks = pool.take(8)
    (first,) = StepBatch([(one, 10)], 4, CPU).segments(EVERYTHING, 1)
    assert (first.table, first.mask, first.stop) == (None, None, 10)
    one.computed = 10
    (later,) = StepBatch([(one, 5)], 4, CPU).segments(EVERYTHING, 1)
    assert later.table is not None and later.mask is not None
    assert later.table.tolist() == one.blocks[:4]
    assert (later.mask == 0).sum(-1).tolist() == [11, 12, 13, 14, 15]


def test_a_single_token_between_chunks_is_not_a_decode_row() -> None:
    pool = BlockPool(200, 4)
    whole = start_sequence(request(prompt_ids=tuple(range(8))), 0)
    whole.blocks = pool.take(2)
    batch = StepBatch([(decoding(pool, 9), 1), (whole, 8), (decoding(pool, 5), 1)], 4, CPU)
    assert batch.decode_rows == 1
    assert [(each.first, each.last) for each in batch.segments(EVERYTHING, 1)] == [(1, 9), (9, 10)]


def test_lanes_come_first_and_the_rest_is_gathered() -> None:
    pool = BlockPool(200, 4)
    decode = [decoding(pool, tokens) for tokens in (9, 7, 12)]
    lanes = Lanes(budget_tokens=10_000, split_tokens=100)
    shelves = lanes.place(decode[:2])
    batch = StepBatch([(one, 1) for one in decode], 4, CPU, shelves)
    (rows,) = batch.shelf_rows(2, 3)
    assert (rows.first, rows.last, rows.keys) == (0, 2, 9)
    assert rows.rows.tolist() == [8, 64 + 8, 2 * 64 + 6, 3 * 64 + 6]
    turned = rows.turned_rows.view(2, 2, 3)  # lane, head, number of the key
    assert turned[1, 0].tolist() == [(6 + at) * 64 + 6 for at in range(3)]
    assert rows.mask is not None and (rows.mask[:, 0, 0] == 0).sum(-1).tolist() == [9, 7]
    assert [(lane, tokens) for lane, _, tokens in rows.fills] == [(0, 9), (1, 7)]
    (bucket,) = batch.buckets(EVERYTHING, WIDE)
    assert (bucket.first, bucket.last) == (2, 3)
    (windowed,) = batch.buckets(Reach(window=4), WIDE)  # a layer that sees less has no lanes
    assert (windowed.first, windowed.last) == (0, 3)
