"""How a batch of pairs goes through the experts of one layer: one seam, several kernels.

A kernel turns a stored record into whatever it computes with (`prepare`, once a replica) and runs
runs of rows through prepared replicas (`run`, once a message).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import ExpertMaths, LayerSpec
from raymoe.experts.activations import join

Prepared = Any
"""A replica as its kernel wants it; opaque to the shard."""


class ExpertKernel(Protocol):
    """The expert FFN over rows sorted by expert."""

    def prepare(self, layer: LayerSpec, record: ExpertRecord) -> Prepared:
        """The replica's weights on the kernel's device, in its dtype; owns its memory."""

    def record(self, layer: LayerSpec, prepared: Prepared, dtype: torch.dtype) -> ExpertRecord:
        """The record `prepared` was made of, bit for bit when `dtype` is its stored dtype."""

    def run(
        self,
        layer: LayerSpec,
        replicas: list[Prepared],
        rows: Tensor,
        counts: list[int],
        out: Tensor,
    ) -> None:
        """rows [P, D] in runs of counts[i] for replicas[i] -> out [P, D]. One thread at a time."""


class DenseKernel:
    """Plain products, expert by expert, into scratch that is kept between messages."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._device = device
        self._dtype = dtype
        self._scratch = torch.empty(0, dtype=dtype, device=device)

    def prepare(self, layer: LayerSpec, record: ExpertRecord) -> dict[str, Tensor]:
        return {
            name: torch.empty(tensor.shape, dtype=self._dtype, device=self._device).copy_(tensor)
            for name, tensor in record.tensors.items()
        }

    def record(
        self, layer: LayerSpec, prepared: dict[str, Tensor], dtype: torch.dtype
    ) -> ExpertRecord:
        return ExpertRecord(
            tensors={
                name: torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
                for name, tensor in prepared.items()
            }
        )

    def run(
        self,
        layer: LayerSpec,
        replicas: list[dict[str, Tensor]],
        rows: Tensor,
        counts: list[int],
        out: Tensor,
    ) -> None:
        maths = layer.maths
        width = layer.inner * (2 if maths.gated else 1)
        up = self._rows(rows.shape[0], width)  # [P, 2F]
        for replica, x, y in zip(replicas, _runs(rows, counts), _runs(up, counts), strict=True):
            _product(x, replica, "up", maths, y)
        inner = join(maths, up)  # [P, F]
        for replica, x, y in zip(replicas, _runs(inner, counts), _runs(out, counts), strict=True):
            _product(x, replica, "down", maths, y)

    def _rows(self, rows: int, width: int) -> Tensor:
        if self._scratch.numel() < rows * width:
            self._scratch = torch.empty(rows * width, dtype=self._dtype, device=self._device)
        return self._scratch[: rows * width].view(rows, width)


def _runs(rows: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """[P, ...] -> views of counts[i] rows each."""
    return torch.split(rows, counts)


def _product(
    x: Tensor, replica: dict[str, Tensor], which: str, maths: ExpertMaths, out: Tensor
) -> None:
    if maths.bias:
        torch.addmm(replica[f"{which}_bias"], x, replica[which], out=out)
    else:
        torch.mm(x, replica[which], out=out)


class IdentityKernel:
    """For tests of routing: every expert returns its input."""

    def prepare(self, layer: LayerSpec, record: ExpertRecord) -> ExpertRecord:
        return record

    def record(self, layer: LayerSpec, prepared: ExpertRecord, dtype: torch.dtype) -> ExpertRecord:
        return prepared

    def run(
        self,
        layer: LayerSpec,
        replicas: list[ExpertRecord],
        rows: Tensor,
        counts: list[int],
        out: Tensor,
    ) -> None:
        out.copy_(rows)
