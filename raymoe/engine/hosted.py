"""A dense part on a device over experts whose links lie in host memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raymoe.engine.seam import Experts

_Pinned = dict[tuple[str, torch.dtype], Tensor]


class HostedExperts:
    """`Experts` for a model on `device`: what is dispatched comes to the host, and sums go back.

    Rows, ids and weights go through pinned buffers: the wait for them is a layer's only one.
    """

    def __init__(self, experts: Experts, device: str) -> None:
        self._experts = experts
        self._device = torch.device(device)
        self._free: list[_Pinned] = [{}]

    def dispatch(self, layer: int, hidden: Tensor, expert_ids: Tensor, gate_weights: Tensor) -> Any:
        """hidden [T, D], expert_ids int64 [T, K], gate_weights [T, K], all on the device."""
        there = (hidden, expert_ids, gate_weights)
        pinned = self._free.pop() if self._free else {}  # a second micro-batch needs its own
        here = [_host(pinned, name, each) for name, each in zip("xiw", there, strict=True)]
        if hidden.is_cuda:
            torch.cuda.current_stream(hidden.device).synchronize()
        return pinned, self._experts.dispatch(layer, *here)

    def combine(self, pending: tuple[_Pinned, Any]) -> Tensor:
        """[T, D] on the device. From pageable memory: it has left that when the call returns."""
        pinned, sent = pending
        sums = self._experts.combine(sent).to(self._device, non_blocking=True)
        self._free.append(pinned)
        return sums


def _host(pinned: _Pinned, name: str, tensor: Tensor) -> Tensor:
    """A copy under way into buffers that are free again when the layer has been combined."""
    found, numbers = pinned.get((name, tensor.dtype)), tensor.numel()
    if found is None or len(found) < numbers:
        room = 1 << max(numbers - 1, 1).bit_length()
        found = torch.empty(room, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        pinned[name, tensor.dtype] = found
    return found[:numbers].view(tensor.shape).copy_(tensor, non_blocking=True)
