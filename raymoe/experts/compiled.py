"""The compiled kernel: raymoe/native/experts.c, for gated-SiLU experts on the CPU.

It reads each expert's weights once and in order, and gathers, activates, weights and sums on the
way, in float32. Weights that a checkpoint stores as bfloat16 stay so, which halves what a few
tokens an expert mostly cost: reading them. `benchmarks/kernels.py` compares the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import ExpertMaths, LayerSpec
from raymoe.native import Native, native

Replica = dict[str, Tensor]
PANEL = 32  # columns, as in experts.c
PLAIN_SILU = ExpertMaths(activation="silu")


def fits(layer: LayerSpec) -> bool:
    """Whether C has this layer's maths and shape, and there is a compiled library."""
    hidden = layer.sources[0].shape[0]
    shaped = hidden % PANEL == 0 and layer.inner % (PANEL // 2) == 0
    return shaped and layer.maths == PLAIN_SILU and native() is not None


class ReplicaTable:
    """The addresses of one layer's replicas, and the replicas, so that they stay."""

    __slots__ = ("address", "addresses", "replicas")

    def __init__(self, replicas: Sequence[Replica | None]) -> None:
        self.replicas = list(replicas)
        self.addresses = np.zeros((len(replicas), 2), np.int64)
        for expert, replica in enumerate(replicas):
            if replica is not None:
                self.addresses[expert] = replica["up"].data_ptr(), replica["down"].data_ptr()
        self.address: int = self.addresses.ctypes.data


class CompiledKernel:
    """Only for layers that `fits` accepts. One thread at a time."""

    def __init__(self, weights: torch.dtype = torch.float32) -> None:
        """weights: the dtype they are kept in, bfloat16 or float32."""
        functions = native()
        assert functions is not None
        self._native: Native = functions
        self.weights = weights
        self._narrow = int(weights is torch.bfloat16)
        self._scratch: dict[tuple[int, int], Tensor] = {}

    def prepare(self, layer: LayerSpec, record: ExpertRecord) -> Replica:
        up, down = (record.tensors[name].to(self.weights) for name in ("up", "down"))
        if self._narrow:
            return self._interleaved(up, down)
        hidden, half = up.shape[0], PANEL // 2
        panels = {
            # [F / 16, D, 2, 16]: each panel has 16 gate columns and their up columns
            "up": up.view(hidden, 2, layer.inner // half, half).permute(2, 0, 1, 3),
            "down": down.view(layer.inner, hidden // PANEL, PANEL).transpose(0, 1),
        }
        return {
            name: torch.empty(panel.shape, dtype=self.weights).copy_(panel)
            for name, panel in panels.items()
        }

    def record(self, layer: LayerSpec, prepared: Replica, dtype: torch.dtype) -> ExpertRecord:
        up, down = prepared["up"], prepared["down"]
        hidden = up.shape[1]
        if self._narrow:
            stored = self._uninterleaved(up, down)
        else:
            stored = {
                "up": up.permute(1, 2, 0, 3).reshape(hidden, -1),
                "down": down.transpose(0, 1).reshape(-1, hidden),
            }
        return ExpertRecord(tensors={n: t.to(dtype).contiguous() for n, t in stored.items()})

    def _interleaved(self, up: Tensor, down: Tensor) -> Replica:
        """[F / 16, D, 16, 2] and [D / 32, F, 16, 2]: in C, which takes a fifth of torch's time."""
        hidden, inner, half = up.shape[0], down.shape[0], PANEL // 2
        panels = {
            "up": torch.empty(inner // half, hidden, half, 2, dtype=self.weights),
            "down": torch.empty(hidden // PANEL, inner, half, 2, dtype=self.weights),
        }
        self._move(up.contiguous(), down.contiguous(), panels, back=0)
        return panels

    def _uninterleaved(self, up: Tensor, down: Tensor) -> dict[str, Tensor]:
        hidden, inner = up.shape[1], down.shape[1]
        stored = {
            "up": torch.empty(hidden, 2 * inner, dtype=self.weights),
            "down": torch.empty(inner, hidden, dtype=self.weights),
        }
        self._move(stored["up"], stored["down"], {"up": up, "down": down}, back=1)
        return stored

    def _move(self, up: Tensor, down: Tensor, panels: Replica, *, back: int) -> None:
        """Stored up [D, 2 F] and down [F, D] to the panels, or `back`."""
        (hidden, both), inner, half = up.shape, down.shape[0], PANEL // 2
        of_up, of_down = panels["up"], panels["down"]
        self._native.panels(
            up.data_ptr(), of_up.data_ptr(), hidden, both, len(of_up), half, inner, back
        )
        self._native.panels(
            down.data_ptr(), of_down.data_ptr(), inner, hidden, len(of_down), PANEL, half, back
        )

    def run(
        self,
        layer: LayerSpec,
        replicas: list[Replica],
        counts: list[int],
        x: Tensor,
        token_of_pair: Tensor,
    ) -> Tensor:
        x = x.contiguous()
        out = torch.empty(len(token_of_pair), x.shape[1])
        ids = torch.arange(len(replicas), dtype=torch.int32)
        words = torch.cat([ids, torch.tensor(counts, dtype=torch.int32), token_of_pair.int()])
        done = self.run_at(
            layer, self.table(replicas), words.data_ptr(), None, x.data_ptr(), out.data_ptr(),
            experts=len(replicas), tokens=len(x),
        )  # fmt: skip
        assert done == len(token_of_pair)
        return out

    def table(self, replicas: Sequence[Any]) -> ReplicaTable:
        """What `run_at` wants of a layer's replicas (None: not held)."""
        return ReplicaTable(replicas)

    def run_at(
        self,
        layer: LayerSpec,
        table: ReplicaTable,
        words: int,
        weights: int | None,
        x: int,
        out: int,
        *,
        experts: int,
        tokens: int,
        first: int = 0,
        budget_ns: int = 0,
    ) -> int:
        """One message at addresses, from pair `first` on, see raymoe_experts.

        The pair to go on with when `budget_ns` (0: none) is over; -1: an expert is not held.
        """
        hidden, inner = layer.sources[0].shape[0], layer.inner
        scratch = self._scratch.get((hidden, inner))
        if scratch is None:
            size = self._native.experts_scratch(hidden, inner)
            scratch = self._scratch[hidden, inner] = torch.empty(size)
        return self._native.experts(
            table.address, len(table.replicas), words, weights, x, out, scratch.data_ptr(),
            experts, tokens, hidden, inner, self._narrow, first, budget_ns,
        )  # fmt: skip
