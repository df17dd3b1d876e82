"""One suite for every kernel: what each has to do, whatever it computes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raymoe.checkpoint.spec import ExpertMaths, LayerSpec
from raymoe.experts.activations import ACTIVATIONS
from raymoe.experts.choose import candidates, make
from raymoe.experts.kernels import ExpertKernel
from raymoe.experts.plain import PlainKernel
from raymoe.experts.shard import ExpertShard
from raymoe.experts.vllm_cuda import VllmCudaKernel
from tests.experts.specs import model_spec, random_record, slow_ffn

FORMS = [
    *(ExpertMaths(activation=name) for name in ACTIVATIONS),
    ExpertMaths(activation="relu2", gated=False),
    ExpertMaths(activation="silu", gated=False, bias=True),
    ExpertMaths(activation="silu", bias=True),
    ExpertMaths(activation="silu", limit=0.5),
    ExpertMaths(activation="silu", limit=0.5, limit_after=True),
    ExpertMaths(activation="silu", limit=0.7, alpha=1.702, up_shift=1.0, bias=True),
]

HIDDEN, INNER = 320, 416  # two panels of 160; two of 208 for the gate and two for up
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""Relative error of a whole message; vLLM's kernel rounds the activations of bfloat16."""

STAND_IN = "vllm-cuda"
NAMES = ("plain", "panels", "compiled", "vllm-cpu", STAND_IN)


def name_of(maths: ExpertMaths) -> str:
    return "-".join(
        f"{field}={value}" for field, value in vars(maths).items() if value not in (None, False)
    )


def fused_stand_in(
    x: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, *,
    global_num_experts: int, expert_map: Tensor,
) -> Tensor:  # fmt: skip
    """What vLLM's fused_experts computes, pair by pair; zeros for what is mapped to -1."""
    assert len(expert_map) == global_num_experts and ids.shape == weights.shape == (len(x), 1)
    out = torch.zeros_like(x)
    for pair, slot in enumerate(expert_map[ids[:, 0].long()].tolist()):
        if slot >= 0:
            gate, up = (w1[slot] @ x[pair]).chunk(2)
            out[pair] = w2[slot] @ (torch.nn.functional.silu(gate) * up)
    return out * weights.to(out.dtype)


def kernel_for(name: str, layer: LayerSpec, dtype: torch.dtype) -> ExpertKernel | None:
    """A kernel of this name on the CPU; None when it is not for this layer, or not here."""
    if name == STAND_IN:
        plain = layer.maths == ExpertMaths(activation="silu")
        return VllmCudaKernel("cpu", dtype, fused_stand_in) if plain else None
    return make(name, dtype) if name in candidates(layer, dtype) else None


def check_maths(kernel: ExpertKernel, maths: ExpertMaths) -> None:
    """float32, number by number."""
    spec = model_spec(hidden=HIDDEN, inner=INNER, maths=maths)
    layer = spec.layer_specs[0]
    records = [random_record(spec, 0, expert) for expert in range(3)]
    replicas = [kernel.prepare(layer, record) for record in records]
    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
    token_of_pair = torch.tensor([2, 0, 1, 3, 3, 0], dtype=torch.int32)
    found = kernel.run(layer, replicas, [1, 3, 2], x, token_of_pair)
    truth = torch.stack(
        [
            slow_ffn(maths, records[expert], x[token])
            for expert, token in zip([0, 1, 1, 1, 2, 2], token_of_pair.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4)


def check_messages(kernel: ExpertKernel, dtype: torch.dtype, weighted: bool) -> None:
    """Through a shard, as messages come: runs of every length from one on, an empty one, long
    ones; experts that come and go in between."""
    spec = model_spec(hidden=96, inner=64, experts=18)
    draw = torch.Generator().manual_seed(0)
    counts = torch.tensor([*range(1, 15), 0, 95, 97, 33])
    experts = torch.randperm(18, generator=draw).to(torch.int32)
    x = torch.randn(50, 96, generator=draw).to(dtype)
    rows = torch.randint(0, 49, (int(counts.sum()),), generator=draw, dtype=torch.int32)
    weights = torch.rand(len(rows), generator=draw) if weighted else None
    outs: list[Tensor] = []
    sides: list[tuple[Any, torch.dtype]] = [(kernel, dtype), (PlainKernel(), torch.float32)]
    for one, of in sides:
        shard = ExpertShard(spec, 1 << 30, dtype=of, kernel=one)
        out = torch.full((50 if weighted else len(rows), 96), torch.nan, dtype=of)
        for expert in range(18):
            shard.add(0, expert, random_record(spec, 0, expert))
        for expert in (3, 4, 17, 0):  # others come where these were
            shard.drop(0, expert)
        assert shard.compute(0, x.to(of), experts, counts, rows, weights, out) == [
            e for e in experts.tolist() if e in (0, 3, 4, 17)
        ]
        for expert in (0, 17, 4, 3):
            shard.add(0, expert, random_record(spec, 0, expert))
        assert shard.compute(0, x.to(of), experts, counts, rows, weights, out) == []
        outs.append(out.double())
    assert (outs[0] - outs[1]).norm() < CLOSE[dtype] * outs[1].norm()
    if weighted:
        assert not outs[0][49].any()  # a row without pairs


def check_record(kernel: ExpertKernel, layer_spec: Any, stored: str) -> None:
    """A replica's record comes back bit for bit."""
    layer, record = layer_spec.layer_specs[0], random_record(layer_spec, 0, 0)
    back = kernel.record(layer, kernel.prepare(layer, record), getattr(torch, stored))
    assert back.checksum == record.checksum
    assert list(back.tensors) == list(record.tensors)
    assert all(tensor.is_contiguous() for tensor in back.tensors.values())
