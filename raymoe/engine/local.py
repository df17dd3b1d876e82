"""Experts in this process: the seam over one shard, with no link in between."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raymoe.errors import ExpertsUnavailable
from raymoe.experts.shard import ExpertShard


@dataclass(frozen=True, kw_only=True, slots=True)
class _Done:
    """A layer that was computed at once."""

    out: Tensor  # [T, D]


class LocalExperts:
    """All experts of a model in one shard, on whatever device it is; `dispatch` computes, `combine`
    hands over. On another device than the CPU the gate's choice is read back, which waits for it.
    """

    def __init__(self, shard: ExpertShard) -> None:
        self._shard = shard

    def dispatch(
        self, layer: int, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor
    ) -> _Done:
        """hidden [T, D], expert_ids int64 [T, K], gate_weights [T, K]."""
        top_k = expert_ids.shape[1]
        if hidden.device.type != "cpu":
            expert_ids, gate_weights = to_host(expert_ids, gate_weights)
        flat = expert_ids.reshape(-1).numpy()  # [P]
        # numpy: for a few hundred numbers its calls cost a third of torch's.
        order = flat.astype(np.uint16).argsort(kind="stable")  # 16 bits: by radix
        counts = np.bincount(flat)
        active = counts.nonzero()[0]
        out = torch.empty_like(hidden)
        missing = self._shard.compute(
            layer,
            hidden,
            torch.from_numpy(active),
            torch.from_numpy(counts[active]),
            torch.from_numpy((order // top_k).astype(np.int32)),
            gate_weights.reshape(-1)[torch.from_numpy(order)].float(),
            out,
        )
        if missing:
            raise ExpertsUnavailable(layer, tuple(missing), 0.0)
        return _Done(out=out)

    def combine(self, pending: _Done) -> Tensor:
        return pending.out


def to_host(expert_ids: Tensor, gate_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Both [T, K] from a device in one copy: int64 and float32."""
    both = torch.stack([expert_ids.int(), gate_weights.float().view(torch.int32)]).cpu()
    return both[0].long(), both[1].view(torch.float32)
