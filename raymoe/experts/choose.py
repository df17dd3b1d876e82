"""Which kernel for which layer: by shape, and by timing both where shape leaves it open."""

from __future__ import annotations

import time
from functools import lru_cache

import torch

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import ExpertMaths, LayerSpec, ModelSpec, Source
from raymoe.experts import panels
from raymoe.experts.kernels import ExpertKernel
from raymoe.experts.panels import PanelKernel
from raymoe.experts.plain import PlainKernel

ROWS = 8  # tokens an expert while timing: 16 experts, top-4, 32 streams
MOST_BYTES = 64 << 20  # of weights timed, so that they come from memory and start-up stays short
REPEATS = 5


def choose_kernels(spec: ModelSpec, device: str, dtype: torch.dtype) -> list[ExpertKernel]:
    """One kernel for each layer."""
    plain, panel = PlainKernel(device, dtype), PanelKernel(dtype)
    on_cpu = torch.device(device).type == "cpu"
    return [
        panel
        if on_cpu
        and panels.fits(layer)
        and panels_win(spec.hidden, layer.inner, layer.maths.gated, dtype)
        else plain
        for layer in spec.layer_specs
    ]


@lru_cache(maxsize=32)
def panels_win(hidden: int, inner: int, gated: bool, dtype: torch.dtype) -> bool:
    """Time both kernels on experts of this shape; 10-100 ms, once a process and shape."""
    layer = shape_only(hidden, inner, gated)
    experts = max(1, min(8, MOST_BYTES // (layer.parameters * dtype.itemsize)))
    record = ExpertRecord(
        tensors={s.tensor: torch.full(s.shape, 0.01, dtype=dtype) for s in layer.sources}
    )
    x = torch.full((ROWS, hidden), 0.01, dtype=dtype)
    token_of_pair = torch.arange(ROWS).repeat(experts)
    best = []
    for kernel in (PlainKernel("cpu", dtype), PanelKernel(dtype)):
        replicas = [kernel.prepare(layer, record) for _ in range(experts)]
        times = []
        for _ in range(REPEATS):
            start = time.thread_time()
            kernel.run(layer, replicas, [ROWS] * experts, x, token_of_pair)
            times.append(time.thread_time() - start)
        best.append(min(times))
    return best[1] < best[0]


def shape_only(hidden: int, inner: int, gated: bool = True) -> LayerSpec:
    """A layer of silu experts that exists in no checkpoint."""
    up = (hidden, inner * (2 if gated else 1))
    return LayerSpec(
        name="",
        experts=1,
        inner=inner,
        maths=ExpertMaths(activation="silu", gated=gated),
        sources=(
            Source(tensor="up", keys=(), pick="key", shape=up),
            Source(tensor="down", keys=(), pick="key", shape=(inner, hidden)),
        ),
    )
