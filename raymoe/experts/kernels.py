"""How a message's pairs go through the experts of one layer: one seam, several kernels.

A kernel turns a stored record into whatever it computes with (`prepare`, once a replica) and runs
runs of rows through prepared replicas (`run`, once a message). `raymoe.experts.choose` picks one.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import LayerSpec

Prepared = Any
"""A replica as its kernel wants it; opaque to the shard."""


class ExpertKernel(Protocol):
    """The expert FFN over pairs sorted by expert."""

    def prepare(self, layer: LayerSpec, record: ExpertRecord) -> Prepared:
        """The replica's weights on the kernel's device, in its dtype; owns its memory."""

    def record(self, layer: LayerSpec, prepared: Prepared, dtype: torch.dtype) -> ExpertRecord:
        """The record `prepared` was made of, bit for bit when `dtype` is its stored dtype."""

    def run(
        self,
        layer: LayerSpec,
        replicas: list[Prepared],
        counts: list[int],
        x: Tensor,
        token_of_pair: Tensor,
    ) -> Tensor:
        """x [N, D] rows token_of_pair [P], in runs of counts[i] for replicas[i] -> [P, D].

        The result is scratch: valid until the next run. One thread at a time.
        """


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
        counts: list[int],
        x: Tensor,
        token_of_pair: Tensor,
    ) -> Tensor:
        return x.index_select(0, token_of_pair)
