"""Messages of a shard on another device: cut into tiles, staged, summed."""

from __future__ import annotations

import pytest
import torch

from raymoe.checkpoint.spec import ExpertMaths
from raymoe.errors import ConfigError
from raymoe.experts import choose
from raymoe.experts.choose import candidates, choose_kernels, make
from raymoe.experts.devices import check_device
from raymoe.experts.grouped import EXACT, FEW, MANY, WIDE, tile_table, tiles_for
from raymoe.experts.plain import PlainKernel
from raymoe.experts.shard import ExpertShard
from raymoe.experts.staging import Pairs, Staging
from tests.devices import DEVICES, HAS_CUDA, ON_CUDA
from tests.experts.parity import FORMS, name_of
from tests.experts.specs import model_spec, random_record, slow_ffn

DTYPES = {"float32": 1e-5, "bfloat16": 2e-2}  # relative error of a whole message


def on_cuda(test):  # type: ignore[no-untyped-def]
    for mark in ON_CUDA:
        test = mark(test)
    return test


def test_tiles_cover_every_pair_once() -> None:
    counts = [1, 16, 0, 17, 40]
    table = tile_table(counts, 16).tolist()
    assert table == [
        [0, 0, 1], [1, 1, 16], [3, 17, 16], [3, 33, 1], [4, 34, 16], [4, 50, 16], [4, 66, 8]
    ]  # fmt: skip
    assert tile_table([], 16).shape == (0, 3)


def test_tiles_by_tokens_an_expert_and_dtype() -> None:
    assert tiles_for(8, 8, 768, torch.bfloat16) is FEW
    assert tiles_for(256, 64, 768, torch.bfloat16) is WIDE
    assert tiles_for(4096, 64, 768, torch.bfloat16) is MANY
    assert tiles_for(4096, 64, 768, torch.float32) is EXACT


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16])
def test_a_staged_shard_gives_what_the_cpu_gives(device: str, wire: torch.dtype) -> None:
    """Also with the CPU for a device, so that the way there is walked where there is no other."""
    spec = model_spec(hidden=48, inner=32)
    shards = [ExpertShard(spec, 1 << 30, on, kernel=PlainKernel(on)) for on in ("cpu", device)]
    shards[1]._staging = Staging(torch.device(device))
    for shard in shards:
        for expert in range(spec.experts):
            shard.add(0, expert, random_record(spec, 0, expert))
    draw = torch.Generator().manual_seed(0)
    for tokens in (1, 60, 7):
        counts = torch.tensor([1, 2 * tokens, 3], dtype=torch.int32)
        rows = torch.randint(0, tokens, (int(counts.sum()),), generator=draw, dtype=torch.int32)
        experts, x = torch.tensor([0, 2, 5]), torch.randn(tokens, 48, generator=draw).to(wire)
        for weights in (torch.rand(len(rows), generator=draw), None):
            found, truth = (
                torch.full((len(rows) if weights is None else tokens, 48), torch.nan, dtype=wire)
                for _ in shards
            )
            for shard, out in zip(shards, (truth, found), strict=True):
                assert shard.compute(0, x, experts, counts, rows, weights, out) == []
            near = 1e-5 if wire is torch.float32 else 1e-2
            torch.testing.assert_close(found, truth, rtol=near, atol=near)
    assert shards[1].compute(0, x, torch.tensor([0, 9]), counts, rows, None, found) == [9]


@pytest.mark.parametrize("device", DEVICES)
def test_pairs_are_weighed_token_by_token(device: str) -> None:
    draw = torch.Generator().manual_seed(0)
    rows = torch.tensor([3, 0, 3, 1, 3, 0], dtype=torch.int32)  # token 2 has none
    of_pair = torch.randn(6, 1500, generator=draw)
    weights = torch.rand(6, generator=draw)
    pairs = Pairs(rows, weights, 4, torch.device(device))
    truth = torch.zeros(4, 1500).index_add_(0, rows, of_pair * weights[:, None])
    for dtype in (torch.float32, torch.bfloat16):
        found = torch.full((4, 1500), torch.nan, dtype=dtype, device=device)
        pairs.weigh(of_pair.to(device), found)
        torch.testing.assert_close(found.cpu(), truth.to(dtype))
    assert torch.equal(pairs.token_of_pair.cpu(), rows)


def test_the_cpu_is_not_asked_for_room() -> None:
    check_device("cpu", 1 << 60, "a group")


@pytest.mark.skipif(HAS_CUDA, reason="this machine has the device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="'cuda' is not to be had"):
        check_device("cuda", 1, "a group")


@on_cuda
def test_a_device_that_is_too_small_or_not_there() -> None:
    with pytest.raises(ConfigError, match="free"):
        check_device("cuda", 1 << 50, "a group")
    with pytest.raises(ConfigError, match="'cuda:99'"):
        check_device("cuda:99", 1, "a group")


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["plain", "grouped"])
@pytest.mark.parametrize("maths", FORMS, ids=name_of)
def test_kernels_do_the_maths_on_the_device(name: str, maths: ExpertMaths, dtype: str) -> None:
    spec = model_spec(hidden=160, inner=112, maths=maths, stored=dtype)
    layer, kind = spec.layer_specs[0], getattr(torch, dtype)
    kernel = make(name, kind, "cuda")
    records = [random_record(spec, 0, expert) for expert in range(4)]
    replicas = [kernel.prepare(layer, record) for record in records]
    x = torch.randn(4, 160, generator=torch.Generator().manual_seed(1)).to(kind)
    rows = torch.tensor([2, 0, 1, 3, 3, 0], dtype=torch.int32)
    found = kernel.run(layer, replicas, [1, 3, 0, 2], x.cuda(), rows.cuda())
    truth = torch.stack(
        [
            slow_ffn(maths, records[expert], x[token].float())
            for expert, token in zip([0, 1, 1, 1, 3, 3], rows.tolist(), strict=True)
        ]
    )
    assert (found.cpu().double() - truth).norm() / truth.norm() < DTYPES[dtype]


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1, 7, 90])
def test_grouped_equals_plain_at_every_size_of_a_tile(dtype: str, scale: int) -> None:
    """Runs within a tile, of exactly one, over several, and none; unused memory is poisoned."""
    kind = getattr(torch, dtype)
    spec = model_spec(hidden=528, inner=272, experts=8, stored=dtype)
    layer = spec.layer_specs[0]
    counts = [0, scale, 1, 3 * scale, 16, 64, 0, 2]
    x = torch.randn(50, 528, generator=torch.Generator().manual_seed(2)).to(kind).cuda()
    rows = torch.randint(0, 50, (sum(counts),), dtype=torch.int32, device="cuda")
    found = {}
    for name in ("plain", "grouped"):
        kernel = make(name, kind, "cuda")
        replicas = [kernel.prepare(layer, random_record(spec, 0, e)) for e in range(8)]
        kernel.run(layer, replicas, counts, torch.full_like(x, torch.nan), rows)
        found[name] = kernel.run(layer, replicas, counts, x, rows).double().clone()
    assert (found["plain"] - found["grouped"]).norm() / found["plain"].norm() < DTYPES[dtype]


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_gets_a_kernel_that_was_timed(dtype: str) -> None:
    spec = model_spec(hidden=512, inner=256)
    kind = getattr(torch, dtype)
    assert candidates(spec.layer_specs[0], kind, "cuda") == ("plain", "grouped")
    assert len(choose_kernels(spec, "cuda", kind)) == spec.layers
    odd = model_spec(hidden=40, inner=24)  # rows that 16-byte loads do not fit
    assert candidates(odd.layer_specs[0], kind, "cuda") == ("plain",)


@on_cuda
def test_a_kernel_that_differs_or_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(PlainKernel):
        def run(self, *args: object) -> torch.Tensor:
            return super().run(*args) * 2  # type: ignore[arg-type]

    def made(name: str, dtype: torch.dtype, device: str) -> PlainKernel:
        return Wrong(device, dtype) if name == "grouped" else PlainKernel(device, dtype)

    monkeypatch.setattr(choose, "make", made)
    spec = model_spec(hidden=64, inner=32)
    args = (64, 32, spec.layer_specs[0].maths, torch.float32, ("plain", "grouped"), "cuda")
    assert choose.fastest.__wrapped__(*args) == "plain"


@on_cuda
def test_the_same_message_gives_the_same_sums() -> None:
    spec = model_spec(hidden=256, inner=128, experts=6, stored="bfloat16")
    shard = ExpertShard(spec, 1 << 30, "cuda", torch.bfloat16)
    for expert in range(6):
        shard.add(0, expert, random_record(spec, 0, expert))
    counts = torch.tensor([30, 30, 30, 30, 30, 30], dtype=torch.int32)
    rows = torch.arange(30, dtype=torch.int32).repeat(6)
    x, weights = torch.randn(30, 256), torch.rand(180)
    outs = [torch.empty(30, 256) for _ in range(8)]
    for out in outs:
        assert shard.compute(0, x, torch.arange(6), counts, rows, weights, out) == []
        assert torch.equal(out, outs[0])
