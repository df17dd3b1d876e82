"""The replicas one process holds, within a byte budget, and the sum they compute for a message."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import ModelSpec
from raymoe.errors import CheckpointError, ConfigError
from raymoe.experts.choose import choose_kernels
from raymoe.experts.compiled import CompiledKernel, ReplicaTable
from raymoe.experts.kernels import ExpertKernel, Prepared
from raymoe.experts.staging import Pairs, Staging
from raymoe.links.protocol import PARTIAL, ROWS, Call, check_words

SLICE_NS = 4_000_000  # of a message that may be interrupted
Between = Callable[[], None]


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
        *,
        vllm_on_cuda: bool = False,
    ) -> None:
        """`kernel`: for every layer; None: chosen for each, see `choose_kernels`."""
        self.spec = spec
        self.vllm_on_cuda = vllm_on_cuda
        self.budget_bytes = budget_bytes
        self.device = device
        self.dtype = self._dtype = dtype
        self._kernels = (
            choose_kernels(spec, device, dtype, vllm_on_cuda=vllm_on_cuda)
            if kernel is None
            else [kernel] * spec.layers
        )
        # Never more than the planner reckons with (`spec.expert_bytes`), half of it where a kernel
        # keeps bfloat16 weights as they are stored.
        self._bytes = [
            layer.parameters * getattr(kernel, "weights", dtype).itemsize
            for layer, kernel in zip(spec.layer_specs, self._kernels, strict=True)
        ]
        self._replicas: list[list[Prepared | None]] = [[None] * n for n in spec.experts_of_layer]
        # of layers whose kernel takes addresses; replaced with the list of replicas
        self._compiled = [k if isinstance(k, CompiledKernel) else None for k in self._kernels]
        self._tables: list[ReplicaTable | None] = [
            None if k is None else k.table(replicas)
            for k, replicas in zip(self._compiled, self._replicas, strict=True)
        ]
        on = torch.device(device)
        self._staging = None if on.type == "cpu" else Staging(on)
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
        compiled = self._compiled[layer]
        if compiled is not None:
            self._tables[layer] = compiled.table(replicas)

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
        between: Between | None = None,
    ) -> list[int]:
        """Run one message's pairs through their experts.

        x [N, D]; expert_ids [n] and counts [n] give the runs of pairs, sorted by expert;
        token_of_pair [P] int32 rows of x; weights [P] float32.
        With weights: out [N, D] = sum over the pairs of a row of weight * FFN(x[row]), cast to
        out's dtype. Without: out [P, D], the unweighted row of each pair in the given order.

        `between` is called now and then where the kernel allows it (compiled): other messages may
        be computed in it, by this thread. Sums are the same with it and without.

        All in host memory, and `out` is written on return. Of a shard on another device x and out
        may both lie there instead: then it is written in the order of the device's stream.

        Returns the experts that are not held; then nothing was computed. Empty when done.
        """
        table, experts = self._tables[layer], expert_ids.tolist()
        of_layer = self._replicas[layer] if table is None else table.replicas
        size = len(of_layer)
        replicas = [of_layer[expert] if 0 <= expert < size else None for expert in experts]
        if any(replica is None for replica in replicas):
            return [e for e, replica in zip(experts, replicas, strict=True) if replica is None]
        if table is not None and experts:
            exact = out.dtype is self._dtype and out.is_contiguous()
            total = out if exact else torch.empty(out.shape, dtype=self._dtype)
            x = x.to(self._dtype).contiguous()
            self._compute_compiled(
                layer, table, x, expert_ids, counts, token_of_pair, weights, total, between
            )
            if not exact:
                out.copy_(total)
            return []
        if self._staging is not None:
            self._compute_staged(
                self._staging, layer, replicas, counts, x, token_of_pair, weights, out
            )
            return []
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

    def _compute_staged(
        self,
        staging: Staging,
        layer: int,
        replicas: list[Prepared],
        counts: Tensor,
        x: Tensor,
        token_of_pair: Tensor,
        weights: Tensor | None,
        out: Tensor,
    ) -> None:
        """On another device than the CPU."""
        with self._compute, torch.inference_mode(), staging.on_device():
            host = x.device.type == "cpu"
            there = (staging.up(x) if host else x).to(self._dtype)
            pairs = Pairs(token_of_pair, weights, len(x), staging.device)
            of_pair = self._kernels[layer].run(
                self.spec.layer_specs[layer], replicas, counts.tolist(), there, pairs.token_of_pair
            )  # [P, D], scratch
            rows = staging.room(out) if host else out
            if weights is None:
                rows.copy_(of_pair)
            else:
                pairs.weigh(of_pair, rows)
            if host:
                staging.down(rows, out)

    def compute_at(
        self,
        call: Call,
        words: int,
        weights: int | None,
        x: int,
        out: int,
        between: Between | None = None,
    ) -> bool:
        """`compute` on addresses, all float32 and int32, for a message that has been checked.

        `words` are expert_ids [n], counts [n], token_of_pair [P]; weights [P] or None. False, and
        nothing has been computed, when some expert is not held or the layer's kernel is not
        compiled: `compute` tells which.
        """
        table = self._tables[call.layer]
        return table is not None and self._run_at(table, call, words, weights, x, out, between)

    def _run_at(
        self,
        table: ReplicaTable,
        call: Call,
        words: int,
        weights: int | None,
        x: int,
        out: int,
        between: Between | None,
    ) -> bool:
        compiled = self._compiled[call.layer]
        assert compiled is not None
        layer, done = self.spec.layer_specs[call.layer], 0
        budget_ns = 0 if between is None else SLICE_NS
        while True:
            with self._compute:
                done = compiled.run_at(
                    layer, table, words, weights, x, out,
                    experts=call.experts, tokens=call.tokens, first=done, budget_ns=budget_ns,
                )  # fmt: skip
            if done < 0 or done >= call.pairs or between is None:
                return done >= 0
            between()

    def _compute_compiled(
        self,
        layer: int,
        table: ReplicaTable,
        x: Tensor,
        expert_ids: Tensor,
        counts: Tensor,
        token_of_pair: Tensor,
        weights: Tensor | None,
        out: Tensor,
        between: Between | None,
    ) -> None:
        """x, weights and out float32; all of the experts are in `table`."""
        pairs, tokens, n = len(token_of_pair), len(x), len(expert_ids)
        # int32, in one piece, and checked: C believes what it is given
        words = torch.cat([expert_ids.int(), counts.int(), token_of_pair.int()]).numpy()
        mode = ROWS if weights is None else PARTIAL
        call = Call(layer, mode, tokens, n, pairs)
        rows = tokens if mode == PARTIAL else pairs
        wrong = weights is not None and len(weights) != pairs
        if wrong or x.shape[1] != self.spec.hidden or out.shape != (rows, self.spec.hidden):
            raise ValueError(f"x {tuple(x.shape)} and out {tuple(out.shape)} do not fit {call}")
        check_words(words, call, self.spec.experts)
        if weights is not None:
            weights = weights.to(torch.float32).contiguous()
        done = self._run_at(
            table,
            call,
            words.ctypes.data,
            None if weights is None else weights.data_ptr(),
            x.data_ptr(),
            out.data_ptr(),
            between,
        )
        assert done


def _sum(of_pair: Tensor, weights: Tensor, token_of_pair: Tensor, out: Tensor) -> Tensor:
    """Weighted sum of rows [P, D] -> out [N, D]. Overwrites the rows."""
    of_pair.mul_(weights.unsqueeze(1))
    return out.zero_().index_add_(0, token_of_pair, of_pair)
