"""The seam between the dense part of a model and its experts.

A model loaded by `raymoe.checkpoint.dense.load_dense` calls
`experts.combine(experts.dispatch(layer, hidden, expert_ids, gate_weights))` once per MoE layer.
`dispatch` sends and returns at once; `combine` waits. What runs between the two overlaps with
the experts.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

# What `dispatch` returns and only `combine` of the same object understands.
Pending = Any


class Experts(Protocol):
    """Computes the routed experts of every MoE layer, wherever their weights are.

    Raises `raymoe.errors.ExpertsUnavailable` when no ready replica answers in time; retries and
    failover are its own business and never visible here.
    """

    def dispatch(
        self, layer: int, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> Pending:
        """Start one layer: hidden [T, D], expert_ids int64 [T, K], gate_weights [T, K]."""
        ...

    def combine(self, pending: Pending) -> Tensor:
        """Finish it: weighted sums [T, D] in the dtype of `hidden`, in token order."""
        ...
