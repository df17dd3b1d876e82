"""A two-layer checkpoint of nothing but experts, and groups over it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from raymoe.checkpoint.record import load_expert
from raymoe.checkpoint.spec import ExpertMaths, LayerSpec, ModelSpec, Source
from raymoe.experts.shard import ExpertShard
from raymoe.group import GroupRuntime
from raymoe.links.handshake import Identity
from raymoe.links.link import SlotTerms
from raymoe.links.server import ServerConfig

SECRET = b"a secret of the tests only"
LAYERS, EXPERTS, HIDDEN, INNER, TOP_K = 2, 4, 16, 16, 2


def write_checkpoint(folder: Path) -> ModelSpec:
    """Random experts; layer 1 has one expert fewer than layer 0."""
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    specs = []
    for layer in range(LAYERS):
        experts = EXPERTS - layer
        for expert in range(experts):
            for name, shape in (("up", (HIDDEN, 2 * INNER)), ("down", (INNER, HIDDEN))):
                tensors[f"{layer}.{expert}.{name}"] = torch.randn(shape, generator=generator) * 0.2
        sources = tuple(
            Source(tensor=name, keys=(f"{layer}.{{}}.{name}",), pick="key", shape=shape)
            for name, shape in (("up", (HIDDEN, 2 * INNER)), ("down", (INNER, HIDDEN)))
        )
        maths = ExpertMaths(activation="silu")
        specs.append(
            LayerSpec(
                name=f"layers.{layer}.mlp",
                experts=experts,
                inner=INNER,
                maths=maths,
                sources=sources,
            )
        )
    save_file(tensors, folder / "model.safetensors")
    return ModelSpec(
        path=str(folder),
        family="test",
        fingerprint="feed",
        hidden=HIDDEN,
        top_k=TOP_K,
        attention="softmax",
        stored_dtype="float32",
        compute_dtype="float32",
        layer_specs=tuple(specs),
    )


def identity() -> Identity:
    return Identity(deployment="test", fingerprint="feed", wire_dtype="float32", hidden=HIDDEN)


def make_group(
    spec: ModelSpec, group_id: str, incarnation: int = 1, **options: Any
) -> GroupRuntime:
    """A group that anyone in this process can reach, and TCP for copies."""
    budget = options.pop("budget_bytes", sum(spec.expert_bytes) * spec.experts)
    config = ServerConfig(
        inproc=True, terms=SlotTerms(request_bytes=32 << 10, reply_bytes=32 << 10)
    )
    device = options.pop("device", "cpu")
    shard = options.pop("shard", None) or ExpertShard(spec, budget, device)
    return GroupRuntime(
        spec, group_id, incarnation, shard, identity(), SECRET, node="n", config=config, **options
    )


def reference(
    spec: ModelSpec, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The sum over each token's experts, one product at a time, [T, D]."""
    out, spec_json = torch.zeros_like(x), spec.to_json()
    for token, (experts, gates) in enumerate(zip(ids.tolist(), weights.tolist(), strict=True)):
        for expert, gate in zip(experts, gates, strict=True):
            record = _weights(spec_json, layer, expert)
            g, u = (x[token] @ record["up"]).chunk(2)
            out[token] += gate * ((torch.nn.functional.silu(g) * u) @ record["down"])
    return out


@lru_cache(maxsize=64)
def _weights(spec_json: str, layer: int, expert: int) -> dict[str, torch.Tensor]:
    return load_expert(ModelSpec.from_json(spec_json), layer, expert).tensors
