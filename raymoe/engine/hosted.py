"""A dense part on a device over experts whose links lie in host memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raymoe.engine.seam import Experts


class HostedExperts:
    """`Experts` for a model on `device`: what is dispatched comes to the host, and sums go back.

    Rows, ids and weights go through pinned buffers: the wait for them is a layer's only one.
    """

    def __init__(self, experts: Experts, device: str) -> None:
        self._experts = experts
        self._device = torch.device(device)
        self._pinned: dict[tuple[str, torch.dtype], Tensor] = {}

    def dispatch(self, layer: int, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor) -> Any:
        """hidden [T, D], expert_ids int64 [T, K], gate_weights [T, K], all on the device."""
        there = (hidden, expert_ids, gate_weights)
        here = [self._host(name, each) for name, each in zip("xiw", there, strict=True)]
        if hidden.is_cuda:
            torch.cuda.current_stream(hidden.device).synchronize()
        return self._experts.dispatch(layer, *here)

    def combine(self, pending: Any) -> Tensor:
        """[T, D] on the device. From pageable memory: it has left that when the call returns."""
        return self._experts.combine(pending).to(self._device, non_blocking=True)

    def _host(self, name: str, tensor: Tensor) -> Tensor:
        """A copy under way; free again at the next layer, when the one before has been combined."""
        found, numbers = self._pinned.get((name, tensor.dtype)), tensor.numel()
        if found is None or len(found) < numbers:
            room = 1 << max(numbers - 1, 1).bit_length()
            found = torch.empty(room, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._pinned[name, tensor.dtype] = found
        return found[:numbers].view(tensor.shape).copy_(tensor, non_blocking=True)
