"""vLLM's Triton kernel for CUDA, `fused_experts(expert_map=...)`. Never run: no GPU was there.

It wants all experts of a call in one tensor, so replicas live in blocks of a few slots, each a
tensor; a message takes one call for each block that it touches, in which `expert_map` names the
slots of the message's experts and -1 those of other blocks, whose pairs come back as zeros.

Importing vLLM takes a group seconds and memory, hence only where the deployment asks for it
(`groups.vllm_kernels`); `grouped.py` is raymoe's own, measured on an H200.
"""

from __future__ import annotations

import importlib.util
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import ExpertMaths, LayerSpec

SLOTS = 8
"""Replicas of a block; memory for up to one block less one replica a layer lies idle."""
ALIGNED = 16
PLAIN_SILU = ExpertMaths(activation="silu")
Fused = Callable[..., Tensor]


def fits(layer: LayerSpec) -> bool:
    """Whether vLLM is installed and the layer has the plain maths."""
    if layer.maths != PLAIN_SILU or layer.sources[0].shape[0] % ALIGNED or layer.inner % ALIGNED:
        return False
    try:
        return importlib.util.find_spec("vllm") is not None
    except (ImportError, ValueError):
        return False


def fused_experts() -> Fused:
    """vLLM's function. ImportError where it has none."""
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts as found

    return found  # type: ignore[no-any-return]


class _Block:
    """Room for SLOTS replicas of one layer."""

    def __init__(self, up: int, hidden: int, inner: int, **where: Any) -> None:
        self.w13 = torch.empty(SLOTS, up, hidden, **where)
        self.w2 = torch.empty(SLOTS, hidden, inner, **where)
        self.free = set(range(SLOTS))


class Replica:
    """A slot of a block, given back when the last message that uses it is done with it."""

    __slots__ = ("__weakref__", "block", "slot")

    def __init__(self, block: _Block, slot: int) -> None:
        self.block, self.slot = block, slot
        weakref.finalize(self, block.free.add, slot)


class VllmCudaKernel:
    """Only for layers that `fits` accepts. `fused`: a stand-in, for tests on other devices."""

    def __init__(self, device: str, dtype: torch.dtype, fused: Fused | None = None) -> None:
        self._fused = fused or fused_experts()
        self._where: dict[str, Any] = {"device": device, "dtype": dtype}
        self._blocks: dict[str, list[_Block]] = {}  # by layer
        self._lock = threading.Lock()

    def prepare(self, layer: LayerSpec, record: ExpertRecord) -> Replica:
        """Waits for the device: a slot may have been another replica's until now."""
        up, down = record.tensors["up"], record.tensors["down"]
        with self._lock:
            blocks = self._blocks.setdefault(layer.name, [])
            block = next((b for b in blocks if b.free), None)
            if block is None:
                block = _Block(up.shape[1], up.shape[0], layer.inner, **self._where)
                blocks.append(block)
            replica = Replica(block, block.free.pop())
        if block.w13.is_cuda:
            torch.cuda.synchronize(block.w13.device)
        block.w13[replica.slot].copy_(up.T)
        block.w2[replica.slot].copy_(down.T)
        return replica

    def record(self, layer: LayerSpec, prepared: Replica, dtype: torch.dtype) -> ExpertRecord:
        matrices = {
            "up": prepared.block.w13[prepared.slot],
            "down": prepared.block.w2[prepared.slot],
        }
        return ExpertRecord(
            tensors={n: m.T.to("cpu", dtype).contiguous() for n, m in matrices.items()}
        )

    def run(
        self,
        layer: LayerSpec,
        replicas: list[Replica],
        counts: list[int],
        x: Tensor,
        token_of_pair: Tensor,
    ) -> Tensor:
        rows = x.index_select(0, token_of_pair)  # [P, D]
        if not len(rows):
            return rows
        experts = len(replicas)
        runs = torch.repeat_interleave(
            torch.arange(experts, dtype=torch.int32), torch.tensor(counts)
        )
        ids = runs.to(x.device).unsqueeze(1)  # [P, 1]: every pair a token with one expert
        ones = torch.ones(len(rows), 1, device=x.device)
        slots: dict[_Block, Tensor] = {}
        for number, replica in enumerate(replicas):
            of_block = slots.setdefault(
                replica.block, torch.full((experts,), -1, dtype=torch.int32)
            )
            of_block[number] = replica.slot
        total: Tensor | None = None
        for block, of_block in slots.items():
            part = self._fused(
                rows, block.w13, block.w2, ones, ids,
                global_num_experts=experts, expert_map=of_block.to(x.device),
            )  # fmt: skip
            total = part if total is None else total.add_(part)
        assert total is not None
        return total
