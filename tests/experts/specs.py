"""Specs and records of experts that exist in no checkpoint, and their maths done slowly."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import ExpertMaths, LayerSpec, ModelSpec, Source

SILU = ExpertMaths(activation="silu")


def model_spec(
    *, hidden: int = 32, inner: int = 16, experts: int = 6, layers: int = 2,
    maths: ExpertMaths = SILU, stored: str = "float32",
) -> ModelSpec:  # fmt: skip
    up = inner * (2 if maths.gated else 1)
    shapes: dict[str, tuple[int, ...]] = {"up": (hidden, up), "down": (inner, hidden)}
    if maths.bias:
        shapes |= {"up_bias": (up,), "down_bias": (hidden,)}
    layer = LayerSpec(
        name="0",
        experts=experts,
        inner=inner,
        maths=maths,
        sources=tuple(
            Source(tensor=name, keys=(), pick="key", shape=shape) for name, shape in shapes.items()
        ),
    )
    return ModelSpec(
        path="nowhere",
        family="made_up",
        fingerprint="0",
        hidden=hidden,
        top_k=2,
        attention="softmax",
        stored_dtype=stored,
        compute_dtype="float32",
        layer_specs=tuple(replace(layer, name=str(number)) for number in range(layers)),
    )


def random_record(spec: ModelSpec, layer: int, expert: int) -> ExpertRecord:
    """Always the same for the same (layer, expert)."""
    draw = torch.Generator().manual_seed(1000 * layer + expert)
    stored = getattr(torch, spec.stored_dtype)
    return ExpertRecord(
        tensors={
            source.tensor: (torch.randn(source.shape, generator=draw) / 8).to(stored)
            for source in spec.layer_specs[layer].sources
        }
    )


def slow_ffn(maths: ExpertMaths, record: ExpertRecord, row: Tensor) -> Tensor:
    """One row [D] through one expert, number by number where the maths are unusual; float64."""
    weights = {name: tensor.double() for name, tensor in record.tensors.items()}
    first = row.double() @ weights["up"] + weights.get("up_bias", torch.zeros(1).double())
    if maths.gated:
        half = len(first) // 2
        pairs = zip(first[:half].tolist(), first[half:].tolist(), strict=True)
        inner = [_gated(maths, gate, up) for gate, up in pairs]
    else:
        inner = [_activation(maths, value) for value in first.tolist()]
    second = torch.tensor(inner, dtype=torch.float64) @ weights["down"]
    return second + weights.get("down_bias", torch.zeros(1).double())


def _gated(maths: ExpertMaths, gate: float, up: float) -> float:
    if maths.limit is not None:
        up = max(-maths.limit, min(maths.limit, up))
        if not maths.limit_after:
            gate = min(gate, maths.limit)
    gate = _activation(maths, gate)
    if maths.limit is not None and maths.limit_after:
        gate = min(gate, maths.limit)
    return gate * (up + maths.up_shift)


def _activation(maths: ExpertMaths, x: float) -> float:
    if maths.activation == "silu":
        return x / (1 + math.exp(-maths.alpha * x))
    if maths.activation == "gelu":
        return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))
    if maths.activation in ("gelu_tanh", "gelu_new"):
        return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if maths.activation == "quick_gelu":
        return x / (1 + math.exp(-1.702 * x))
    if maths.activation == "relu":
        return max(0.0, x)
    assert maths.activation == "relu2"
    return max(0.0, x) ** 2
