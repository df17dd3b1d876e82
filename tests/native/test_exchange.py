"""The C exchange against the numpy one: the same messages, the same bytes, the same sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymoe.arena import Cutter
from raymoe.client.batch import Batch
from raymoe.dispatch import Message, count_experts, cut_messages
from raymoe.errors import FrameError
from raymoe.links.link import Slot
from raymoe.links.protocol import PARTIAL, ROWS, Call, Wire, Words, check_words
from raymoe.native import native

pytestmark = pytest.mark.skipif(native() is None, reason="no C compiler here")

batches = st.fixed_dictionaries(
    {
        "tokens": st.sampled_from([1, 2, 3, 7, 40, 200]),
        "top_k": st.integers(1, 4),
        "experts": st.integers(1, 12),
        "groups": st.integers(1, 5),
        "message_tokens": st.sampled_from([1, 2, 5, 64, 1000]),
        "by_pair": st.booleans(),
        "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
        "mode": st.sampled_from([PARTIAL, ROWS]),
        "seed": st.integers(0, 2**32 - 1),
    }
)


def draw(shape: dict[str, int], rng: np.random.Generator) -> tuple[Batch, np.ndarray]:
    """A batch, and a group for each pair or each expert."""
    wire = Wire(hidden=5, dtype=str(shape["dtype"]))
    ids = torch.from_numpy(rng.integers(0, shape["experts"], (shape["tokens"], shape["top_k"])))
    batch = Batch(
        0,
        torch.from_numpy(rng.standard_normal((shape["tokens"], 5), dtype=np.float32)),
        ids,
        torch.from_numpy(rng.random(ids.shape, dtype=np.float32)),
        wire,
        shape["mode"],
    )
    size = ids.numel() if shape["by_pair"] else shape["experts"]
    return batch, rng.integers(0, shape["groups"], size)


def both_cuts(
    cutter: Cutter, batch: Batch, groups_of: np.ndarray, shape: dict[str, int], load: np.ndarray
) -> tuple[list[Message], list[Message]]:
    sizes = {
        "top_k": batch.top_k,
        "tokens": batch.tokens,
        "experts": shape["experts"],
        "message_tokens": shape["message_tokens"],
    }
    made = cutter.cut(
        batch.expert_ids.data_ptr(),
        groups_of.ctypes.data,
        by_pair=bool(shape["by_pair"]),
        pairs=batch.open_pairs,
        groups=shape["groups"],
        load=load.ctypes.data,
        **sizes,
    )
    assert made is not None
    of_pair = groups_of if shape["by_pair"] else groups_of[batch.expert_of_pair]
    return made, cut_messages(batch.expert_of_pair, of_pair, **sizes)


@settings(max_examples=80, deadline=None)
@given(batches)
def test_messages_bytes_and_sums_equal_numpys(shape: dict[str, int]) -> None:
    rng = np.random.default_rng(shape["seed"])
    functions = native()
    assert functions is not None
    cutter = Cutter(functions)
    for _ in range(2):  # the second cut uses the first one's arena
        batch, groups_of = draw(shape, rng)
        load = np.zeros(shape["experts"], np.int64)
        made, wanted = both_cuts(cutter, batch, groups_of, shape, load)
        assert load.tolist() == count_experts(batch.expert_of_pair, shape["experts"]).tolist()
        assert len(made) == len(wanted)
        for mine, theirs in zip(made, wanted, strict=True):
            compare(mine, theirs)
            compare_bytes(batch, mine, theirs)
        compare_sums(batch, made, wanted, rng)
        arena = made[0].arena
        assert arena is not None
        cutter.give(arena)


def compare(mine: Message, theirs: Message) -> None:
    assert mine.group == theirs.group
    assert (mine.pair_count, mine.token_count, mine.expert_count) == (
        theirs.pair_count,
        theirs.token_count,
        theirs.expert_count,
    )
    for name in ("pairs", "tokens", "token_of_pair", "experts", "counts"):
        assert getattr(mine, name).tolist() == getattr(theirs, name).tolist(), name


def compare_bytes(batch: Batch, mine: Message, theirs: Message) -> None:
    """The request regions are the same up to the padding before x."""
    call = Call(0, batch.mode, mine.token_count, mine.expert_count, mine.pair_count)
    regions = [np.full(batch.wire.request_bytes(call), 7, np.uint8) for _ in range(2)]
    for message, region in zip((mine, theirs), regions, strict=True):
        batch.write(message, Slot(0, batch.wire, region, np.zeros(1 << 16, np.uint8)), call)
    assert regions[0].tolist() == regions[1].tolist()


def compare_sums(
    batch: Batch, made: list[Message], wanted: list[Message], rng: np.random.Generator
) -> None:
    if batch.mode != PARTIAL or batch.wire.dtype != "float32":
        assert not batch.add_at(made[0], 0)
        return
    twin = Batch(0, batch.hidden, batch.expert_ids, batch.gate_weights, batch.wire, PARTIAL)
    for mine, theirs in zip(made, wanted, strict=True):
        rows = rng.standard_normal((mine.token_count, 5), dtype=np.float32)
        assert batch.add_at(mine, rows.ctypes.data)
        twin.add(theirs, rows)
    assert torch.equal(batch.result(), twin.result())


@pytest.mark.parametrize("shape", [(2, 4), (3, 5), (3,)])
def test_a_batch_whose_shapes_do_not_fit_is_refused(shape: tuple[int, ...]) -> None:
    wire = Wire(hidden=5, dtype="float32")
    ids = torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not fit rows of 5"):
        Batch(0, torch.zeros(shape), ids, torch.zeros(2, 2), wire, PARTIAL)
    with pytest.raises(ValueError, match="do not fit"):
        Batch(0, torch.zeros(2, 5), ids, torch.zeros(2, 1), wire, PARTIAL)


def test_what_cannot_be_cut_is_numpys_and_counts_nothing() -> None:
    functions = native()
    assert functions is not None
    cutter = Cutter(functions)
    ids, load = np.array([0, 1, 2]), np.zeros(3, np.int64)
    sizes = {"pairs": 3, "top_k": 1, "tokens": 3, "groups": 2, "message_tokens": 9}
    where = ids.ctypes.data

    def cut(homes: list[int], experts: int) -> list[Message] | None:
        array = np.array(homes)
        return cutter.cut(
            where,
            array.ctypes.data,
            by_pair=False,
            experts=experts,
            load=load.ctypes.data,
            **sizes,
        )

    assert cut([0, -1, 1], 3) is None
    assert cut([0, 2, 1], 3) is None
    with pytest.raises(IndexError):
        cut([0, 1], 2)
    assert not load.any()
    assert cut([0, 1, 1], 3) is not None
    assert load.tolist() == [1, 1, 1]


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 6),
    pairs=st.integers(6, 12),
    mode=st.sampled_from([PARTIAL, ROWS]),
    spoil=st.tuples(st.integers(0, 30), st.sampled_from([-1, 0, 1, 7, 2**31 - 1, -(2**31)])),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_check_agrees_with_pythons(
    n: int, pairs: int, mode: int, spoil: tuple[int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    call = Call(0, mode, 3, n, pairs)
    words = 2 * n + (2 if mode == PARTIAL else 1) * pairs
    region = np.zeros(words, np.int32)
    region[:n] = rng.integers(0, 6, n)
    region[n : 2 * n] = 1
    region[2 * n - 1] = pairs - n + 1
    region[2 * n : 2 * n + pairs] = rng.integers(0, 3, pairs)
    if spoil[0] < words:
        region[spoil[0]] = spoil[1]
    functions = native()
    assert functions is not None
    copy = np.zeros(words, np.int32)
    found = functions.check(copy.ctypes.data, region.ctypes.data, n, pairs, 3, 6, mode == PARTIAL)
    assert copy.tolist() == region.tolist()
    assert WRONG[found] in refusal(region, call)
    raw = region.view(np.uint8)
    if found:
        with pytest.raises(FrameError, match=WRONG[found]):
            Words().take(raw, raw.ctypes.data, call, 6)
    else:
        arrays = Words().take(raw, raw.ctypes.data, call, 6).arrays(call)
        parts = [part.view(np.int32) for part in arrays if part is not None]
        assert np.concatenate(parts).tolist() == region.tolist()


WRONG = {0: "fine", 1: "expert", 2: "token", 3: "counts sum"}


def refusal(region: np.ndarray, call: Call) -> str:
    try:
        check_words(region, call, 6)
    except FrameError as error:
        return str(error)
    return "fine"
