"""Experts in this process: the seam over one shard, with no link in between."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raymoe.errors import ExpertsUnavailable
from raymoe.experts.shard import ExpertShard


@dataclass(frozen=True, kw_only=True, slots=True)
class _Done:
    """A layer that was computed at once."""

    out: Tensor  # [T, D]


class LocalExperts:
    """All experts of a model in one `ExpertShard`; `dispatch` computes, `combine` hands over."""

    def __init__(self, shard: ExpertShard) -> None:
        self._shard = shard

    def dispatch(
        self, layer: int, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> _Done:
        """hidden [T, D], expert_ids int64 [T, K], gate_weights [T, K]."""
        top_k = expert_ids.shape[1]
        by_expert, order = expert_ids.reshape(-1).sort(stable=True)  # [P] each
        active, counts = torch.unique_consecutive(by_expert, return_counts=True)
        out = torch.empty_like(hidden)
        missing = self._shard.compute(
            layer,
            hidden,
            active,
            counts,
            order.div(top_k, rounding_mode="floor").int(),
            gate_weights.reshape(-1)[order].float(),
            out,
        )
        if missing:
            raise ExpertsUnavailable(layer, tuple(missing), 0.0)
        return _Done(out=out)

    def combine(self, pending: _Done) -> Tensor:
        return pending.out
