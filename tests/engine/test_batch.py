from __future__ import annotations

import torch

from raymoe.engine.batch import Reach, StepBatch
from raymoe.engine.blocks import BlockPool
from raymoe.engine.sequence import Sequence, start_sequence
from tests.engine.support import request

CPU = torch.device("cpu")


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
    assert batch.pool_rows.tolist() == [2 * 4, 28, 29, 30, 31, 12, 13]
    assert batch.decode_rows == 1


def test_rows_of_like_length_share_a_bucket_without_a_mask() -> None:
    pool = BlockPool(200, 4)
    chunks = [(decoding(pool, 10), 1) for _ in range(3)]
    (bucket,) = StepBatch(chunks, 4, CPU).buckets(Reach(), 1024)
    assert (bucket.first, bucket.last, bucket.start, bucket.stop) == (0, 3, 0, 10)
    assert bucket.mask is None


def test_padding_that_costs_more_than_a_call_opens_a_bucket() -> None:
    pool = BlockPool(2000, 4)
    chunks = [(decoding(pool, tokens), 1) for tokens in (900, 890, 20, 10)]
    batch = StepBatch(chunks, 4, CPU)
    spans = [(bucket.first, bucket.last) for bucket in batch.buckets(Reach(), 1024)]
    assert spans == [(0, 2), (2, 4)]
    assert len(batch.buckets(Reach(), 16)) == 1  # a narrow layer: padding is cheap
    assert len(batch.buckets(Reach(window=8), 1024)) == 1  # short views: nothing to pad


def test_a_window_reads_only_its_blocks() -> None:
    pool = BlockPool(200, 4)
    one = decoding(pool, 40)
    (bucket,) = StepBatch([(one, 1)], 4, CPU).buckets(Reach(window=6), 1024)
    assert bucket.table.tolist() == one.blocks[8:10]  # positions 34..39
    assert (bucket.start, bucket.stop, bucket.mask) == (2, 8, None)


def test_a_first_chunk_reads_only_itself_and_a_later_one_its_past() -> None:
    pool = BlockPool(200, 4)
    one = start_sequence(request(prompt_ids=tuple(range(30))), 0)
    one.blocks = pool.take(8)
    (first,) = StepBatch([(one, 10)], 4, CPU).segments(Reach())
    assert (first.table, first.mask, first.stop) == (None, None, 10)
    one.computed = 10
    (later,) = StepBatch([(one, 5)], 4, CPU).segments(Reach())
    assert later.table is not None and later.mask is not None
    assert later.table.tolist() == one.blocks[:4]
    assert (later.mask == 0).sum(-1).tolist() == [11, 12, 13, 14, 15]


def test_a_single_token_between_chunks_is_not_a_decode_row() -> None:
    pool = BlockPool(200, 4)
    whole = start_sequence(request(prompt_ids=tuple(range(8))), 0)
    whole.blocks = pool.take(2)
    batch = StepBatch([(decoding(pool, 9), 1), (whole, 8), (decoding(pool, 5), 1)], 4, CPU)
    assert batch.decode_rows == 1
    assert [(each.first, each.last) for each in batch.segments(Reach())] == [(1, 9), (9, 10)]
