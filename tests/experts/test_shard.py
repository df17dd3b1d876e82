"""The shard: budget, residency, both result modes, and changes while it computes."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import LayerSpec, ModelSpec
from raymoe.errors import CheckpointError, ConfigError
from raymoe.experts.kernels import IdentityKernel
from raymoe.experts.shard import ExpertShard
from tests.devices import DEVICES
from tests.experts.specs import model_spec, random_record, slow_ffn

SPEC = model_spec()
ONE = SPEC.expert_bytes[0]


def full_shard(spec: ModelSpec = SPEC, **settings: object) -> ExpertShard:
    shard = ExpertShard(spec, budget_bytes=1 << 30, **settings)  # type: ignore[arg-type]
    for layer in range(spec.layers):
        for expert in range(spec.experts):
            shard.add(layer, expert, random_record(spec, layer, expert))
    return shard


def message(runs: dict[int, list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """{expert: its tokens} -> expert_ids, counts, token_of_pair."""
    tokens = [token for of_expert in runs.values() for token in of_expert]
    return (
        torch.tensor(list(runs), dtype=torch.int32),
        torch.tensor([len(of_expert) for of_expert in runs.values()], dtype=torch.int32),
        torch.tensor(tokens, dtype=torch.int32),
    )


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None)
@given(
    runs=st.dictionaries(
        st.integers(0, 5), st.lists(st.integers(0, 6), min_size=1, max_size=9), max_size=6
    ),
    layer=st.integers(0, 1),
)
def test_both_modes_against_the_slow_way(
    device: str, runs: dict[int, list[int]], layer: int
) -> None:
    shard = full_shard(device=device)
    expert_ids, counts, token_of_pair = message(runs)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(len(runs)))
    weights = torch.rand(len(token_of_pair), generator=torch.Generator().manual_seed(7))
    truth = [
        slow_ffn(SPEC.layer_specs[layer].maths, random_record(SPEC, layer, expert), x[token])
        for expert, tokens in runs.items()
        for token in tokens
    ]
    rows = torch.full((len(truth), 32), torch.nan)
    assert shard.compute(layer, x, expert_ids, counts, token_of_pair, None, rows) == []
    if truth:
        torch.testing.assert_close(rows.double(), torch.stack(truth), rtol=1e-4, atol=1e-5)
    sums = torch.full((7, 32), torch.nan)
    assert shard.compute(layer, x, expert_ids, counts, token_of_pair, weights, sums) == []
    total = torch.zeros(7, 32, dtype=torch.float64)
    for pair, token in enumerate(token_of_pair.tolist()):
        total[token] += weights[pair].double() * truth[pair]
    torch.testing.assert_close(sums.double(), total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_wire_is_summed_in_float32(wire: torch.dtype, device: str) -> None:
    shard = full_shard(device=device)
    expert_ids, counts, token_of_pair = message({0: [0, 1], 3: [1, 0], 5: [1]})
    x = torch.randn(2, 32).to(wire)
    weights = torch.rand(5)
    exact, half = torch.empty(2, 32), torch.empty(2, 32, dtype=wire)
    shard.compute(0, x.float(), expert_ids, counts, token_of_pair, weights, exact)
    shard.compute(0, x, expert_ids, counts, token_of_pair, weights, half)
    assert torch.equal(half, exact.to(wire))
    rows = torch.empty(5, 32, dtype=wire)
    shard.compute(0, x, expert_ids, counts, token_of_pair, None, rows)
    assert rows.isfinite().all()


def test_results_may_be_written_into_shared_memory_views() -> None:
    """Links give tensors over a slot: not aligned to rows, longer than the message."""
    shard = full_shard()
    expert_ids, counts, token_of_pair = message({1: [0]})
    x = torch.randn(1, 32)
    slot = torch.zeros(4096, dtype=torch.uint8)
    out = slot[64 : 64 + 128].view(torch.float32).view(1, 32)
    plain = torch.empty(1, 32)
    shard.compute(0, x, expert_ids, counts, token_of_pair, torch.ones(1), plain)
    shard.compute(0, x, expert_ids, counts, token_of_pair, torch.ones(1), out)
    assert torch.equal(plain, out)
    assert not slot[:64].any() and not slot[192:].any()


def test_missing_experts_are_named_and_nothing_is_computed() -> None:
    shard = full_shard()
    shard.drop(0, 2)
    shard.drop(0, 4)
    expert_ids, counts, token_of_pair = message({1: [0], 2: [0], 4: [0]})
    out = torch.full((1, 32), 7.0)
    found = shard.compute(
        0, torch.ones(1, 32), expert_ids, counts, token_of_pair, torch.ones(3), out
    )
    assert found == [2, 4]
    assert (out == 7.0).all()
    assert shard.compute(
        1, torch.ones(1, 32), expert_ids, counts, token_of_pair, torch.ones(3), out
    ) == []  # fmt: skip


def test_budget_says_by_how_many_bytes_it_is_passed() -> None:
    shard = ExpertShard(SPEC, budget_bytes=2 * ONE + 100)
    shard.add(0, 0, random_record(SPEC, 0, 0))
    shard.add(1, 0, random_record(SPEC, 1, 0))
    with pytest.raises(ConfigError, match=f"needs {ONE} bytes, {ONE - 100} more than the budget"):
        shard.add(0, 1, random_record(SPEC, 0, 1))
    assert shard.resident_bytes == 2 * ONE
    assert not shard.has(0, 1)
    shard.drop(1, 0)
    shard.add(0, 1, random_record(SPEC, 0, 1))
    assert shard.resident_bytes == 2 * ONE


@pytest.mark.parametrize("spare", [-1, 0])
def test_budget_is_kept_to_the_byte(spare: int) -> None:
    shard = ExpertShard(SPEC, budget_bytes=ONE + spare)
    if spare < 0:
        with pytest.raises(ConfigError, match="1 more than the budget"):
            shard.add(0, 0, random_record(SPEC, 0, 0))
    else:
        shard.add(0, 0, random_record(SPEC, 0, 0))
    assert shard.has(0, 0) == (spare == 0)


def test_add_and_drop_can_be_repeated() -> None:
    shard = ExpertShard(SPEC, budget_bytes=ONE)
    for _ in range(2):
        shard.add(1, 3, random_record(SPEC, 1, 3))
        assert shard.resident_bytes == ONE
    expected = np.zeros((2, 6), dtype=bool)
    expected[1, 3] = True
    assert np.array_equal(shard.resident(), expected)
    for _ in range(2):
        shard.drop(1, 3)
        assert shard.resident_bytes == 0
    assert not shard.resident().any()


def test_failed_add_gives_its_bytes_back() -> None:
    class NoMemory(IdentityKernel):
        def prepare(self, layer: LayerSpec, record: ExpertRecord) -> ExpertRecord:
            raise MemoryError

    shard = ExpertShard(SPEC, budget_bytes=ONE, kernel=NoMemory())
    with pytest.raises(MemoryError):
        shard.add(0, 0, random_record(SPEC, 0, 0))
    assert shard.resident_bytes == 0
    assert not shard.has(0, 0)


def test_record_of_other_shapes_is_refused() -> None:
    shard = ExpertShard(SPEC, budget_bytes=ONE)
    with pytest.raises(CheckpointError, match=r"MoE layer 0 holds .*\(32, 32\).*\(64, 32\)"):
        shard.add(0, 0, random_record(model_spec(hidden=64), 0, 0))


def test_experts_that_cannot_be_are_missing_experts() -> None:
    expert_ids, counts, token_of_pair = message({-1: [0], 2: [0], 6: [0]})
    out = torch.empty(1, 32)
    found = full_shard().compute(
        0, torch.ones(1, 32), expert_ids, counts, token_of_pair, torch.ones(3), out
    )
    assert found == [-1, 6]


def test_resident_bytes_are_what_the_tensors_take() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        shard = full_shard(model_spec(stored="bfloat16"), dtype=dtype)
        taken = sum(t.nbytes for layer in shard._replicas for r in layer for t in r.values())
        assert shard.resident_bytes == taken


@pytest.mark.parametrize("device", DEVICES)
def test_record_for_a_peer_is_the_record_that_was_added(device: str) -> None:
    spec = model_spec(stored="bfloat16")
    shard = full_shard(spec, device=device)
    record = shard.record(1, 4)
    assert record is not None
    assert record.checksum == random_record(spec, 1, 4).checksum
    shard.drop(1, 4)
    assert shard.record(1, 4) is None


def test_identity_kernel_returns_weighted_inputs() -> None:
    shard = full_shard(kernel=IdentityKernel())
    expert_ids, counts, token_of_pair = message({0: [0, 1], 2: [1]})
    x = torch.randn(2, 32)
    out = torch.empty(2, 32)
    weights = torch.tensor([1.0, 0.25, 0.75])
    shard.compute(0, x, expert_ids, counts, token_of_pair, weights, out)
    assert torch.equal(out, x)


@pytest.mark.parametrize("device", DEVICES)
def test_experts_come_and_go_while_a_thread_computes(device: str) -> None:
    """A message is computed rightly or names what is missing; never a wrong number or a crash."""
    shard = full_shard(device=device)
    expert_ids, counts, token_of_pair = message({0: [0, 1], 1: [2], 3: [0, 3], 5: [1]})
    x, weights = torch.randn(4, 32), torch.rand(6)
    truth = torch.empty(4, 32)
    shard.compute(0, x, expert_ids, counts, token_of_pair, weights, truth)
    stop = threading.Event()
    rounds = [0]  # messages computed so far; each change waits for one more, so neither starves

    def wait_for_a_round() -> None:
        seen = rounds[0]
        while rounds[0] == seen and not stop.is_set():
            time.sleep(0)

    def change() -> None:
        while not stop.is_set():
            for expert in (1, 3):
                shard.drop(0, expert)
                wait_for_a_round()
                shard.add(0, expert, random_record(SPEC, 0, expert))
                wait_for_a_round()

    thread = threading.Thread(target=change)
    thread.start()
    done = missed = 0
    out = torch.empty(4, 32)
    deadline = time.monotonic() + 120
    try:
        while (done < 200 or missed < 50) and time.monotonic() < deadline:
            out.fill_(torch.nan)
            missing = shard.compute(0, x, expert_ids, counts, token_of_pair, weights, out)
            if missing:
                assert set(missing) <= {1, 3}
                missed += 1
                time.sleep(0.0005)  # a miss costs no product: without it the other thread starves
            else:
                assert torch.equal(out, truth)
                done += 1
            rounds[0] += 1
    finally:
        stop.set()
        thread.join()
    assert done >= 200 and missed >= 50
    assert shard.resident().all()
    assert shard.resident_bytes == 12 * ONE


def test_many_threads_adding_never_pass_the_budget() -> None:
    shard = ExpertShard(SPEC, budget_bytes=4 * ONE)
    refused = []

    def add(expert: int) -> None:
        try:
            shard.add(0, expert, random_record(SPEC, 0, expert))
        except ConfigError:
            refused.append(expert)

    threads = [threading.Thread(target=add, args=(expert,)) for expert in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 2
    assert shard.resident().sum() == 4
    assert shard.resident_bytes == 4 * ONE
