"""The plain kernel: one product a matrix and expert, the activation once a message."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import LayerSpec
from raymoe.experts.activations import join
from raymoe.experts.scratch import Scratch, Scratches, Views

Replica = dict[str, Tensor]


class PlainKernel:
    """`torch.mm` with weights as they are resident, `[in, out]`; any device, any dtype."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self._device = device
        self._dtype = dtype
        self._scratches = Scratches(self._scratch)
        cuda = torch.device(device).type == "cuda"
        # Replicas come and go beside the messages, whose stream they must not hold up.
        self._beside: Any = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]

    def prepare(self, layer: LayerSpec, record: ExpertRecord) -> Replica:
        with torch.cuda.stream(self._beside):  # None: nothing happens
            made = {
                name: torch.empty(tensor.shape, dtype=self._dtype, device=self._device).copy_(
                    tensor
                )
                for name, tensor in record.tensors.items()
            }
        if self._beside is not None:
            self._beside.synchronize()
            for tensor in made.values():  # dropped, its memory waits for messages under way
                tensor.record_stream(torch.cuda.default_stream(self._device))
        return made

    def record(self, layer: LayerSpec, prepared: Replica, dtype: torch.dtype) -> ExpertRecord:
        with torch.cuda.stream(self._beside):
            return ExpertRecord(
                tensors={
                    name: torch.empty(tensor.shape, dtype=dtype).copy_(tensor)
                    for name, tensor in prepared.items()
                }
            )

    def run(
        self,
        layer: LayerSpec,
        replicas: list[Replica],
        counts: list[int],
        x: Tensor,
        token_of_pair: Tensor,
    ) -> Tensor:
        maths = layer.maths
        scratch = self._scratches.of(layer, x.shape[1])
        rows, up, inner, result = scratch.head(token_of_pair.shape[0])
        torch.index_select(x, 0, token_of_pair, out=rows)  # [P, D]
        runs = scratch.runs(counts)
        for replica, (x_run, up_run, _, _) in zip(replicas, runs, strict=True):
            if maths.bias:
                torch.addmm(replica["up_bias"], x_run, replica["up"], out=up_run)
            else:
                torch.mm(x_run, replica["up"], out=up_run)
        if maths.gated:
            gate, up = up[:, : layer.inner], up[:, layer.inner :]
            join(maths, gate, up, inner)  # [P, F], contiguous: the next product is faster so
        else:
            join(maths, None, up, inner)
        for replica, (_, _, inner_run, run) in zip(replicas, runs, strict=True):
            if maths.bias:
                torch.addmm(replica["down_bias"], inner_run, replica["down"], out=run)
            else:
                torch.mm(inner_run, replica["down"], out=run)
        return result

    def _scratch(self, layer: LayerSpec, hidden: int) -> Scratch:
        up = layer.inner * (2 if layer.maths.gated else 1)
        return Scratch((hidden, up, layer.inner, hidden), self._dtype, self._device, _rows)


def _rows(buffers: Views, start: int, count: int) -> Views:
    return tuple(buffer[start : start + count] for buffer in buffers)
