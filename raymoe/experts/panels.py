"""The panel kernel: wide matrices kept as panels of about 256 columns, for the CPU.

A product of a few rows with a wide `[in, out]` matrix walks memory in strides of a whole row, and
the BLAS spends its time on page walks and packing. Cut into contiguous panels `[n, in, w]`, one
`torch.bmm` does all panels of a matrix. Measured on one AVX-512 core against the plain kernel, a
whole message, D x F 1024 x 1024 and 2048 x 768: 1.2-1.3 times as fast at 4 tokens an expert,
1.3-1.5 at 8, 16 and 64; 0.95 at one; slower for matrices of at most 256 columns
(`benchmarks/kernels.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import LayerSpec
from raymoe.experts.activations import join
from raymoe.experts.scratch import Scratch, Scratches, Views

Replica = dict[str, Tensor]
WIDEST = 256


def panel_width(columns: int) -> int:
    """The widest panel, a multiple of 16 up to 256, that divides `columns`; 0 when none does."""
    for width in range(WIDEST, 48, -16):
        if columns % width == 0:
            return width
    return 0


def fits(layer: LayerSpec) -> bool:
    """Whether the layer's matrices can be cut, and are wide enough for it to be worth a try."""
    hidden = layer.sources[0].shape[0]
    wide = max(hidden, layer.sources[0].shape[1]) > WIDEST
    return wide and panel_width(hidden) > 0 and panel_width(layer.inner) > 0


class PanelKernel:
    """`torch.bmm` over the panels of each expert; only for layers that `fits` accepts."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        self._scratches = Scratches(self._scratch)

    def prepare(self, layer: LayerSpec, record: ExpertRecord) -> Replica:
        hidden = layer.sources[0].shape[0]
        widths = {"up": panel_width(layer.inner), "down": panel_width(hidden)}
        return {
            name: cut(tensor.to(self._dtype), widths[name.removesuffix("_bias")])
            for name, tensor in record.tensors.items()
        }

    def record(self, layer: LayerSpec, prepared: Replica, dtype: torch.dtype) -> ExpertRecord:
        return ExpertRecord(
            tensors={name: uncut(tensor, name, dtype) for name, tensor in prepared.items()}
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
        rows, _, _, _, result = scratch.head(token_of_pair.shape[0])
        torch.index_select(x, 0, token_of_pair, out=rows)  # [P, D]
        for replica, run in zip(replicas, scratch.runs(counts), strict=True):
            x_run, up, gate, above, inner, inner_run, down, result_run = run
            if maths.bias:
                torch.baddbmm(replica["up_bias"], x_run, replica["up"], out=up)
            else:
                torch.bmm(x_run, replica["up"], out=up)  # [2F/w, M, w]
            join(maths, gate if maths.gated else None, above, inner)
            if maths.bias:
                torch.baddbmm(replica["down_bias"], inner_run, replica["down"], out=down)
            else:
                torch.bmm(inner_run, replica["down"], out=down)  # [D/w, M, w]
            result_run.copy_(down)
        return result

    def _scratch(self, layer: LayerSpec, hidden: int) -> Scratch:
        halves = 2 if layer.maths.gated else 1
        up_panels = layer.inner * halves // panel_width(layer.inner)
        down_panels = hidden // panel_width(hidden)

        def views(buffers: Views, start: int, count: int) -> Views:
            return _views(buffers, start, count, up_panels, down_panels, halves)

        widths = hidden, layer.inner * halves, layer.inner, hidden, hidden
        return Scratch(widths, self._dtype, "cpu", views)


def _views(
    buffers: Views, start: int, count: int, up_panels: int, down_panels: int, halves: int
) -> Views:
    """Of one run of M pairs: both products' inputs and outputs, panels first where they are panels.

    x [u, M, D] (repeated, no copy), up [u, M, w], its gate and up halves, the join's output seen as
    panels [u/2, M, w] of the row-major [M, F], that as input [d, M, F], down [d, M, w], and the
    result seen as panels of the row-major [M, D].
    """
    rows, up_rows, inner_rows, down_rows, result_rows = (b[start : start + count] for b in buffers)
    up = up_rows.view(-1).view(up_panels, count, -1)
    half = up_panels // halves
    return (
        rows.expand(up_panels, count, -1),
        up,
        up[:half],
        up[-half:],
        inner_rows.view(count, half, -1).transpose(0, 1),
        inner_rows.expand(down_panels, count, -1),
        down_rows.view(-1).view(down_panels, count, -1),
        result_rows.view(count, down_panels, -1).transpose(0, 1),
    )


def cut(tensor: Tensor, width: int) -> Tensor:
    """[K, N] -> [N/w, K, w]; a bias [N] -> [N/w, 1, w]. A copy of its own."""
    matrix = tensor if tensor.dim() == 2 else tensor.unsqueeze(0)
    panels = matrix.view(matrix.shape[0], -1, width).transpose(0, 1)
    return torch.empty(panels.shape, dtype=tensor.dtype).copy_(panels)


def uncut(panels: Tensor, name: str, dtype: torch.dtype) -> Tensor:
    matrix = panels.transpose(0, 1).to(dtype).reshape(panels.shape[1], -1)
    return matrix[0].clone() if name.endswith("_bias") else matrix.contiguous()
