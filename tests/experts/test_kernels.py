"""What is particular to a kernel, and the choice between them; what all do is in test_parity.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from raymoe.checkpoint.record import ExpertRecord
from raymoe.errors import FrameError
from raymoe.experts import choose, compiled, panels
from raymoe.experts.choose import candidates
from raymoe.experts.compiled import CompiledKernel
from raymoe.experts.panels import PanelKernel, panel_width
from raymoe.experts.plain import PlainKernel
from raymoe.experts.shard import ExpertShard
from raymoe.native import native
from tests.experts.parity import HIDDEN, INNER, check_record
from tests.experts.specs import SILU, model_spec, random_record

COMPILED = [CompiledKernel()] if native() is not None else []
NARROW = [CompiledKernel(torch.bfloat16)] if native() is not None else []


@pytest.mark.skipif(not NARROW, reason="no C compiler here")
def test_bfloat16_record_comes_back_from_bfloat16() -> None:
    spec = model_spec(hidden=HIDDEN, inner=INNER, stored="bfloat16")
    check_record(NARROW[0], spec, "bfloat16")


@pytest.mark.skipif(not COMPILED, reason="no C compiler here")
@pytest.mark.parametrize(("hidden", "inner"), [(32, 16), (256, 128), (96, 48)])
@pytest.mark.parametrize("weighted", [True, False])
def test_compiled_equals_plain(hidden: int, inner: int, weighted: bool) -> None:
    """Runs of every size of a register tile, of a block of them, and just over."""
    spec = model_spec(hidden=hidden, inner=inner, experts=18)
    layer = spec.layer_specs[0]
    assert compiled.fits(layer)
    draw = torch.Generator().manual_seed(0)
    counts = [*range(1, 15), 0, 95, 97, 200]
    experts = torch.randperm(18, generator=draw).to(torch.int32)
    x = torch.randn(50, hidden, generator=draw)
    rows = torch.randint(0, 49, (sum(counts),), generator=draw, dtype=torch.int32)
    weights = torch.rand(len(rows), generator=draw) if weighted else None
    found, truth = (torch.full((50 if weighted else len(rows), hidden), torch.nan) for _ in "12")
    for kernel, out in ((COMPILED[0], found), (PlainKernel(), truth)):
        shard = ExpertShard(spec, 1 << 30, kernel=kernel)
        for expert in range(18):
            shard.add(0, expert, random_record(spec, 0, expert))
        arguments = (x, experts, torch.tensor(counts), rows, weights, out)
        assert shard.compute(0, *arguments) == []
        shard.drop(0, 3)
        assert shard.compute(0, *arguments) == [3]
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
    if weighted:
        assert not found[49].any()  # a row without pairs


@pytest.mark.skipif(not COMPILED, reason="no C compiler here")
@pytest.mark.parametrize(("hidden", "inner"), [(32, 16), (256, 128), (96, 48), (64, 160)])
def test_weights_kept_as_bfloat16_give_the_same_bits(hidden: int, inner: int) -> None:
    spec = model_spec(hidden=hidden, inner=inner, experts=5, stored="bfloat16")
    layer = spec.layer_specs[0]
    assert "compiled bfloat16" in candidates(layer, torch.float32, stored="bfloat16")
    assert "compiled" in candidates(layer, torch.float32, stored="float16")
    draw = torch.Generator().manual_seed(0)
    counts = [1, 7, 12, 13, 200]
    x = torch.randn(50, hidden, generator=draw)
    rows = torch.randint(0, 50, (sum(counts),), generator=draw, dtype=torch.int32)
    wide, narrow = (
        kernel.run(
            layer,
            [kernel.prepare(layer, random_record(spec, 0, expert)) for expert in range(5)],
            counts,
            x,
            rows,
        )
        for kernel in (COMPILED[0], NARROW[0])
    )
    assert torch.equal(wide, narrow)
    held = NARROW[0].prepare(layer, random_record(spec, 0, 0))
    assert sum(tensor.nbytes for tensor in held.values()) == 2 * layer.parameters


@pytest.mark.skipif(not COMPILED, reason="no C compiler here")
def test_compiled_silu_at_its_ends() -> None:
    """One expert with unit weights returns silu(x) * x: very small, very large, not a number."""
    spec = model_spec(hidden=32, inner=16, experts=1)
    eye = torch.eye(32, 16)
    record = ExpertRecord(tensors={"up": torch.cat([eye, eye], 1), "down": eye.T.contiguous()})
    values = torch.tensor([-1e4, -100.0, -88.0, -87.0, -1e-30, 0.0, 1e-30, 0.5, 88.0, 1e4, 1e18])
    x = torch.zeros(2, 32)
    x[0, : len(values)] = values
    x[1, 0] = torch.nan
    kernel, rows = COMPILED[0], torch.arange(2, dtype=torch.int32)
    replica = kernel.prepare(spec.layer_specs[0], record)
    found = kernel.run(spec.layer_specs[0], [replica], [2], x, rows)
    truth = torch.nn.functional.silu(values.double()) * values.double()
    torch.testing.assert_close(found[0, : len(values)].double(), truth, rtol=1e-6, atol=1e-30)
    assert found[1].isnan().all()


@pytest.mark.skipif(not COMPILED, reason="no C compiler here")
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_message_in_pieces_gives_the_same_bits(
    weighted: bool, stored: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when another message is computed between the pieces, and an expert is dropped."""
    spec = model_spec(hidden=64, inner=32, experts=6, stored=stored)
    kernel = (COMPILED if stored == "float32" else NARROW)[0]
    draw = torch.Generator().manual_seed(0)
    counts = torch.tensor([7, 0, 300, 1, 40, 2])
    x = torch.randn(50, 64, generator=draw)
    rows = torch.randint(0, 50, (350,), generator=draw, dtype=torch.int32)
    weights = torch.rand(350, generator=draw) if weighted else None
    shard = ExpertShard(spec, 1 << 30, kernel=kernel)
    for expert in range(6):
        shard.add(0, expert, random_record(spec, 0, expert))
    ids = torch.arange(6, dtype=torch.int32)

    def message(between: Callable[[], None] | None = None) -> torch.Tensor:
        out = torch.full((50 if weighted else 350, 64), torch.nan)
        assert shard.compute(0, x, ids, counts, rows, weights, out, between) == []
        return out

    whole, inner = message(), []
    monkeypatch.setattr("raymoe.experts.shard.SLICE_NS", 1)

    def between() -> None:
        if len(inner) < 3:
            inner.append(message())
        else:
            shard.drop(0, 4)  # the message began with it
            inner.append(whole)

    assert torch.equal(message(between), whole)
    assert len(inner) >= 6 and all(torch.equal(one, whole) for one in inner)


@pytest.mark.skipif(not COMPILED, reason="no C compiler here")
def test_compiled_refuses_what_would_read_out_of_bounds() -> None:
    spec = model_spec(hidden=32, inner=16)
    shard = ExpertShard(spec, 1 << 30, kernel=COMPILED[0])
    for expert in range(spec.experts):
        shard.add(0, expert, random_record(spec, 0, expert))
    x, out = torch.zeros(2, 32), torch.zeros(2, 32)
    good = {
        "expert_ids": torch.tensor([0, 1]),
        "counts": torch.tensor([1, 1]),
        "token_of_pair": torch.tensor([0, 1], dtype=torch.int32),
        "weights": torch.ones(2),
        "out": out,
    }
    assert shard.compute(0, x, **good) == []
    bad = [
        {"counts": torch.tensor([1, 2])},
        {"token_of_pair": torch.tensor([0, 2], dtype=torch.int32)},
        {"weights": torch.ones(1)},
        {"out": torch.zeros(1, 32)},
    ]
    for change in bad:
        with pytest.raises((FrameError, ValueError)):
            shard.compute(0, x, **{**good, **change})


def test_prepared_replica_does_not_share_the_records_memory() -> None:
    spec = model_spec(hidden=HIDDEN, inner=INNER)
    for kernel in (PlainKernel(), PanelKernel()):
        record = random_record(spec, 0, 0)
        replica = kernel.prepare(spec.layer_specs[0], record)
        before = replica["up"].clone()
        record.tensors["up"].zero_()
        assert torch.equal(replica["up"], before)


@pytest.mark.parametrize(
    ("columns", "width"),
    [
        (HIDDEN, 160),
        (INNER, 208),
        (2048, 256),
        (1408, 176),
        (2880, 240),
        (768, 256),
        (96, 96),
        (64, 64),
        (48, 0),
        (257, 0),
    ],
)
def test_panel_width_divides(columns: int, width: int) -> None:
    assert panel_width(columns) == width
    assert width == 0 or columns % width == 0


def test_small_matrices_stay_plain() -> None:
    assert not panels.fits(model_spec(hidden=256, inner=128).layer_specs[0])
    assert panels.fits(model_spec(hidden=1024, inner=1024).layer_specs[0])
    assert not panels.fits(model_spec(hidden=1000, inner=1024).layer_specs[0])


def test_choice_by_timing_gives_a_kernel_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = model_spec(hidden=512, inner=64)
    for name, kind in {"panels": PanelKernel, "plain": PlainKernel}.items():
        monkeypatch.setattr(choose, "fastest", lambda *_, name=name: name)
        kernels = choose.choose_kernels(spec, "cpu", torch.float32)
        assert [type(kernel) for kernel in kernels] == [kind] * spec.layers


def test_timing_runs_every_candidate() -> None:
    names = choose.candidates(model_spec(hidden=512, inner=64).layer_specs[0], torch.float32)
    assert set(names) - {"compiled"} == {"plain", "panels"}
    found = choose.fastest.__wrapped__(512, 64, SILU, torch.float32, names)
    assert found in names


def test_scratch_grows_and_results_stay_right() -> None:
    spec = model_spec(hidden=HIDDEN, inner=INNER)
    layer, record = spec.layer_specs[0], random_record(spec, 0, 0)
    for kernel in (PlainKernel(), PanelKernel()):
        replica = kernel.prepare(layer, record)
        for pairs in (3, 200, 0, 3, 5, 1000, 3):  # the same runs again after growing
            x = torch.randn(pairs + 1, HIDDEN)
            ids = torch.arange(pairs, dtype=torch.int32)
            some = [replica] if pairs else []
            found = kernel.run(layer, some, [pairs] if pairs else [], x, ids)
            gate, up = (x[:pairs] @ record.tensors["up"]).chunk(2, dim=-1)
            truth = (torch.nn.functional.silu(gate) * up) @ record.tensors["down"]
            torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-4)
