"""The replicas one process holds, within a byte budget, and the sum they compute for a message."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import ModelSpec
from raymoe.errors import CheckpointError, ConfigError
from raymoe.experts.choose import choose_kernels
from raymoe.experts.kernels import ExpertKernel, Prepared


class ExpertShard:
    """Replicas of experts of any layers. D hidden, P pairs, N rows of a message.

    `add` and `drop` may run in other threads while `compute` runs: each replaces its layer's list
    of replicas as a whole, and a running message keeps the list it began with. `compute` itself is
    for one thread at a time (a lock sees to it).
    """

    def __init__(
        self,
        spec: ModelSpec,
        budget_bytes: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        kernel: ExpertKernel | None = None,
    ) -> None:
        self.spec = spec
        self.budget_bytes = budget_bytes
        self._dtype = dtype
        self._kernels = (
            choose_kernels(spec, device, dtype) if kernel is None else [kernel] * spec.layers
        )
        self._bytes = spec.resident_bytes(str(dtype).removeprefix("torch."))
        self._replicas: list[list[Prepared | None]] = [[None] * n for n in spec.experts_of_layer]
        self._resident_bytes = 0
        self._change = threading.Lock()
        self._compute = threading.Lock()

    @property
    def resident_bytes(self) -> int:
        """Bytes of all replicas held, those being added counted already."""
        return self._resident_bytes

    def has(self, layer: int, expert: int) -> bool:
        return self._replicas[layer][expert] is not None

    def resident(self) -> np.ndarray:
        """bool [L, E]: what is held."""
        held = np.zeros((self.spec.layers, self.spec.experts), dtype=bool)
        for layer, replicas in enumerate(self._replicas):
            held[layer, : len(replicas)] = [replica is not None for replica in replicas]
        return held

    def add(self, layer: int, expert: int, record: ExpertRecord) -> None:
        """Hold a replica; nothing happens when it is held already.

        Raises ConfigError when it would pass the budget, by how many bytes, and CheckpointError
        when the record is not one of this layer's experts.
        """
        self._check(layer, record)
        needed = self._bytes[layer]
        with self._change:
            if self._replicas[layer][expert] is not None:
                return
            over = self._resident_bytes + needed - self.budget_bytes
            if over > 0:
                raise ConfigError(
                    f"expert {expert} of MoE layer {layer} needs {needed} bytes, "
                    f"{over} more than the budget of {self.budget_bytes} leaves"
                )
            self._resident_bytes += needed
        try:
            prepared = self._kernels[layer].prepare(self.spec.layer_specs[layer], record)
        except BaseException:
            with self._change:
                self._resident_bytes -= needed
            raise
        with self._change:
            if self._replicas[layer][expert] is not None:  # added twice at once
                self._resident_bytes -= needed
                return
            self._replace(layer, expert, prepared)

    def _check(self, layer: int, record: ExpertRecord) -> None:
        """A record may come from another group: its shapes must be this layer's."""
        wanted = {s.tensor: s.shape for s in self.spec.layer_specs[layer].sources}
        found = {name: tuple(tensor.shape) for name, tensor in record.tensors.items()}
        if found != wanted:
            raise CheckpointError(f"an expert of MoE layer {layer} holds {wanted}, got {found}")

    def drop(self, layer: int, expert: int) -> None:
        """Let a replica go; nothing happens when it is not held."""
        with self._change:
            if self._replicas[layer][expert] is not None:
                self._replace(layer, expert, None)
                self._resident_bytes -= self._bytes[layer]

    def _replace(self, layer: int, expert: int, prepared: Prepared | None) -> None:
        replicas = self._replicas[layer].copy()
        replicas[expert] = prepared
        self._replicas[layer] = replicas  # one store: a reader sees the old list or the new one

    def record(self, layer: int, expert: int) -> ExpertRecord | None:
        """The replica's record in the checkpoint's dtype, to be copied to another group."""
        prepared = self._replicas[layer][expert]
        if prepared is None:
            return None
        stored = getattr(torch, self.spec.stored_dtype)
        return self._kernels[layer].record(self.spec.layer_specs[layer], prepared, stored)

    def compute(
        self,
        layer: int,
        x: Tensor,
        expert_ids: Tensor,
        counts: Tensor,
        token_of_pair: Tensor,
        weights: Tensor | None,
        out: Tensor,
    ) -> list[int]:
        """Run one message's pairs through their experts.

        x [N, D]; expert_ids [n] and counts [n] give the runs of pairs, sorted by expert;
        token_of_pair [P] int32 rows of x; weights [P] float32.
        With weights: out [N, D] = sum over the pairs of a row of weight * FFN(x[row]), cast to
        out's dtype. Without: out [P, D], the unweighted row of each pair in the given order.

        Returns the experts that are not held; then nothing was computed. Empty when done.
        """
        of_layer, experts = self._replicas[layer], expert_ids.tolist()
        size = len(of_layer)
        replicas = [of_layer[expert] if 0 <= expert < size else None for expert in experts]
        if any(replica is None for replica in replicas):
            return [e for e, replica in zip(experts, replicas, strict=True) if replica is None]
        with self._compute, torch.inference_mode():
            if x.dtype != self._dtype:
                x = x.to(self._dtype)
            of_pair = self._kernels[layer].run(
                self.spec.layer_specs[layer], replicas, counts.tolist(), x, token_of_pair
            )  # [P, D], scratch
            if weights is None:
                out.copy_(of_pair)
            elif out.dtype == self._dtype:
                _sum(of_pair, weights, token_of_pair, out)
            else:
                total = torch.empty(out.shape, dtype=self._dtype, device=x.device)
                out.copy_(_sum(of_pair, weights, token_of_pair, total))
        return []


def _sum(of_pair: Tensor, weights: Tensor, token_of_pair: Tensor, out: Tensor) -> Tensor:
    """Weighted sum of rows [P, D] -> out [N, D]. Overwrites the rows."""
    of_pair.mul_(weights.unsqueeze(1))
    return out.zero_().index_add_(0, token_of_pair, of_pair)
