"""One dispatched batch of one layer: what is still open, and the sum of what has come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from raymoe.arena import Arena
from raymoe.dispatch import Ints, Message
from raymoe.links.link import Slot
from raymoe.links.protocol import PARTIAL, Call, Wire
from raymoe.native import native

_FEW_ROWS = 8  # below, numpy's fancy += beats torch.index_add_ (4 us against 6); above it loses


class Batch:
    """The pending result of `ExpertClient.dispatch`. Owned by the engine's thread.

    T tokens, K gate choices a token, P = T * K pairs, D hidden. Messages of a native cut are
    written and added up in C, all others in numpy; both may happen in one batch (retries).
    """

    __slots__ = (
        "_expert_of_pair",
        "_out",
        "_rows",
        "_weights",
        "_x",
        "abandoned",
        "arenas",
        "deadline_s",
        "dtype",
        "excluded",
        "expert_ids",
        "gate_weights",
        "hidden",
        "homeless",
        "last",
        "layer",
        "mode",
        "open_pairs",
        "out_address",
        "queued",
        "retry_s",
        "routes",
        "stalled_s",
        "tokens",
        "top_k",
        "weights_address",
        "wire",
        "x_address",
    )

    def __init__(
        self,
        layer: int,
        hidden: torch.Tensor,
        expert_ids: torch.Tensor,
        gate_weights: torch.Tensor,
        wire: Wire,
        mode: int,
    ) -> None:
        """hidden [T, D], expert_ids int64 [T, K], gate_weights [T, K], all in host memory.

        ValueError when their shapes do not fit each other or the wire: C believes them.
        """
        if hidden.shape != (len(expert_ids), wire.hidden) or gate_weights.shape != expert_ids.shape:
            raise ValueError(
                f"hidden {tuple(hidden.shape)}, expert_ids {tuple(expert_ids.shape)} and "
                f"gate_weights {tuple(gate_weights.shape)} do not fit rows of {wire.hidden}"
            )
        self.layer = layer
        self.wire = wire
        self.mode = mode
        self.dtype = hidden.dtype
        self.tokens, self.top_k = expert_ids.shape
        if hidden.dtype is not wire.torch_dtype:
            hidden = hidden.to(wire.torch_dtype)
        if gate_weights.dtype is not torch.float32:
            gate_weights = gate_weights.float()
        self.hidden = hidden.contiguous()  # [T, D], as it travels
        self.expert_ids = expert_ids.to(torch.int64).contiguous()
        self.gate_weights = gate_weights.contiguous()
        self._x: npt.NDArray[Any] | None = None
        self._expert_of_pair: Ints | None = None
        self._weights: npt.NDArray[np.float32] | None = None
        self.x_address = self.hidden.data_ptr()
        self.weights_address = self.gate_weights.data_ptr() if mode == PARTIAL else None
        self.open_pairs = self.tokens * self.top_k
        self.arenas: list[Arena] = []  # of its native cuts
        self.homeless: list[Ints] = []  # pairs to be sent again
        self.excluded: set[tuple[Any, int]] = set()  # (peer, expert) that refused
        self.routes: object = None  # the routes under which homeless pairs found no place
        self.retry_s = 0.0
        self.stalled_s: float | None = None  # since when some pair has had no live replica
        self.deadline_s = float("inf")  # no later than the first deadline of its attempts
        self.abandoned = False
        self.last: Any = None  # the connection asked last, until it has been waited for
        self.queued = False  # some message has had to wait for a slot
        self._out: torch.Tensor | None = None  # [T, D] float32
        self.out_address = 0
        self._rows: npt.NDArray[np.float32] | None = None  # [P, D], rows mode

    @property
    def x(self) -> npt.NDArray[Any]:
        """[T, D] in the wire's carrier dtype."""
        if self._x is None:
            rows = self.hidden
            if rows.dtype is torch.bfloat16:
                self._x = rows.view(torch.int16).numpy().view(np.uint16)
            else:
                self._x = rows.numpy()
        return self._x

    @property
    def expert_of_pair(self) -> Ints:
        """int64 [P]."""
        if self._expert_of_pair is None:
            self._expert_of_pair = self.expert_ids.numpy().reshape(-1)
        return self._expert_of_pair

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        """[P]."""
        if self._weights is None:
            self._weights = self.gate_weights.numpy().reshape(-1)
        return self._weights

    def write(self, message: Message, slot: Slot, call: Call) -> None:
        """The request of `message` into a slot that it fits."""
        arena, functions = message.arena, native()
        if arena is not None and functions is not None and slot.fits(call):
            functions.write(
                arena.address, message.number, slot.request_address,
                self.weights_address, self.x_address, self.wire.row_bytes,
            )  # fmt: skip
            return
        to = slot.arrays(call)
        to.expert_ids[:] = message.experts
        to.counts[:] = message.counts
        to.token_of_pair[:] = message.token_of_pair
        if to.weights is not None:
            self.weights.take(message.pairs, 0, to.weights, "clip")
        if message.token_count == self.tokens:  # a plain copy: 200 us, 330 for 512 x 2048
            np.copyto(to.x, self.x)
        else:  # mode="clip": with "raise" numpy gathers into a buffer first
            self.x.take(message.tokens, 0, to.x, "clip")

    def add_at(self, message: Message, rows: int) -> bool:
        """Take the reply to `message`, rows at an address; False when that is not for C."""
        arena, functions = message.arena, native()
        if (
            arena is None
            or functions is None
            or self.mode != PARTIAL
            or self.wire.torch_dtype is not torch.float32
        ):
            return False
        first = self._out is None
        if self._out is None:
            self._out = torch.empty(self.tokens, self.wire.hidden)
            self.out_address = self._out.data_ptr()
        functions.add(
            arena.address, message.number, rows, self.out_address, self.wire.hidden,
            self.tokens, first,
        )  # fmt: skip
        self.open_pairs -= message.pair_count
        return True

    def add(self, message: Message, rows: npt.NDArray[Any]) -> None:
        """Take the reply to `message`: rows [N, D] or, in rows mode, [P, D] (carrier dtype)."""
        converted = rows.dtype != np.float32
        if converted:
            rows = _from_carrier(rows, self.wire)
        self.open_pairs -= message.pair_count
        if self.mode != PARTIAL:
            if self._rows is None:
                self._rows = np.empty((self.tokens * self.top_k, self.wire.hidden), np.float32)
            self._rows[message.pairs] = rows
            return
        every_token = message.token_count == self.tokens
        if self._out is None:
            if not every_token:
                first = self._spread(message.tokens, rows)
            else:  # a conversion is a copy already
                first = rows if converted else rows.copy()
            self._out = torch.from_numpy(first)
            self.out_address = self._out.data_ptr()
            return
        out: npt.NDArray[np.float32] = self._out.numpy()
        if every_token:
            np.add(out, rows, out=out)
        elif message.token_count < _FEW_ROWS:
            out[message.tokens] += rows
        else:
            self._out.index_add_(0, torch.from_numpy(message.tokens), torch.from_numpy(rows))

    def _spread(self, tokens: Ints, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The first rows [N, D] as [T, D], zeros where no row has come yet.

        One gather, then the few absent rows: 330 us where zeros and a scatter take 540 (468 of 512
        rows x 2048).
        """
        row_of_token = np.zeros(self.tokens, np.int64)
        row_of_token[tokens] = np.arange(len(tokens))
        absent = np.ones(self.tokens, np.bool_)
        absent[tokens] = False
        out = rows.take(row_of_token, 0)
        out[absent] = 0.0
        return out

    def result(self) -> torch.Tensor:
        """[T, D] in the dtype of `hidden`; every pair has been added."""
        assert not self.open_pairs
        if self.mode != PARTIAL:
            self._out = self._weighted_sum()
        elif self._out is None:  # no tokens
            self._out = torch.zeros(self.tokens, self.wire.hidden)
        out = self._out
        return out if self.dtype is torch.float32 else out.to(self.dtype)

    def _weighted_sum(self) -> torch.Tensor:
        """Rows weighted and summed in gate order, the same whichever group computed them."""
        out = torch.zeros(self.tokens, self.wire.hidden)
        if self._rows is not None:
            rows = torch.from_numpy(self._rows).view(self.tokens, self.top_k, self.wire.hidden)
            weights = self.gate_weights.view(self.tokens, self.top_k, 1)
            for k in range(self.top_k):
                out.addcmul_(rows[:, k], weights[:, k])
        return out


def _from_carrier(rows: npt.NDArray[Any], wire: Wire) -> npt.NDArray[np.float32]:
    tensor = torch.from_numpy(rows)
    if wire.torch_dtype is torch.bfloat16:
        tensor = tensor.view(torch.bfloat16)
    as_float: npt.NDArray[np.float32] = tensor.float().numpy()
    return as_float
