"""A message on its way to a device and back: host memory of a link -> device -> host memory.

Rows go through pinned buffers of our own, which the device reads and writes by itself; the small
arrays go as one. A link's memory itself is not pinned: it belongs to the client as well.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymoe.experts.grouped import device_functions

WIDTH = 1024  # columns of a program that weighs


class Pairs:
    """The pairs of one message on the device: which row each takes, and how they are summed."""

    __slots__ = ("_bounds", "_order", "_weights", "token_of_pair", "tokens")

    def __init__(
        self, token_of_pair: Tensor, weights: Tensor | None, tokens: int, device: torch.device
    ) -> None:
        """token_of_pair int32 [P], weights float32 [P] or None, both in host memory."""
        pairs, self.tokens = len(token_of_pair), tokens
        host = token_of_pair.numpy()
        parts = [host]
        if weights is not None:
            # 16 bits are sorted by radix: 4096 in 37 us where 64 bits take 124
            small = host.astype(np.uint16) if tokens <= 1 << 16 else host
            order = small.argsort(kind="stable")
            bounds = np.zeros(tokens + 1, np.int32)
            np.cumsum(np.bincount(host, minlength=tokens), out=bounds[1:])
            numbers = weights.to(torch.float32).contiguous().numpy()
            parts += [numbers.view(np.int32), order.astype(np.int32), bounds]
        words = np.concatenate(parts).astype(np.int32, copy=False)
        # From pageable memory: the copy has left it when the call returns.
        there = torch.from_numpy(words).to(device, non_blocking=True)
        self.token_of_pair = there[:pairs]
        self._weights = there[pairs : 2 * pairs].view(torch.float32)
        self._order = there[2 * pairs : 3 * pairs]
        self._bounds = there[3 * pairs :]

    def weigh(self, of_pair: Tensor, out: Tensor) -> None:
        """out [N, D] = weighted sums of rows [P, D], which stay as they are; all on the device."""
        hidden = of_pair.shape[1]
        functions = device_functions() if of_pair.is_cuda and out.is_contiguous() else None
        if functions is None or not self.tokens:
            total = torch.zeros(self.tokens, hidden, device=of_pair.device)
            out.copy_(total.index_add_(0, self.token_of_pair, of_pair * self._weights.unsqueeze(1)))
            return
        functions.weigh[self.tokens, -(-hidden // WIDTH)](
            out, of_pair, self._weights, self._order, self._bounds, hidden, BN=WIDTH
        )


class Staging:
    """Buffers between host and one device, kept between messages. One thread at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pinned: dict[tuple[str, torch.dtype], Tensor] = {}

    def on_device(self) -> AbstractContextManager[Any]:
        """This thread's launches go to the device meanwhile."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def up(self, rows: Tensor) -> Tensor:
        """Host rows [N, D] on the device; they may change when the device has been waited for."""
        staged = self._buffer("up", rows)
        staged.copy_(rows)
        return staged.to(self.device, non_blocking=True)

    def room(self, like: Tensor) -> Tensor:
        """Memory on the device for what goes into host rows `like`."""
        return torch.empty(like.shape, dtype=like.dtype, device=self.device)

    def down(self, rows: Tensor, out: Tensor) -> None:
        """Device rows into host memory; waits for all that was launched."""
        staged = self._buffer("down", rows)
        staged.copy_(rows, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        out.copy_(staged)

    def _buffer(self, name: str, rows: Tensor) -> Tensor:
        """Pinned memory in the shape and dtype of `rows`; used again by the next of this name."""
        found, numbers = self._pinned.get((name, rows.dtype)), rows.numel()
        if found is None or len(found) < numbers:
            room = 1 << max(numbers - 1, 1).bit_length()
            pin = self.device.type == "cuda"
            found = self._pinned[name, rows.dtype] = torch.empty(
                room, dtype=rows.dtype, pin_memory=pin
            )
        return found[:numbers].view(rows.shape)
