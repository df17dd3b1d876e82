"""Which kernel for which layer: by shape, and by timing those that can do it where several can."""

from __future__ import annotations

import time
from functools import lru_cache

import torch

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import ExpertMaths, LayerSpec, ModelSpec, Source
from raymoe.experts import compiled, panels
from raymoe.experts.compiled import CompiledKernel
from raymoe.experts.kernels import ExpertKernel
from raymoe.experts.panels import PanelKernel
from raymoe.experts.plain import PlainKernel

ROWS = 8  # tokens an expert while timing: 16 experts, top-4, 32 streams
MOST_BYTES = 64 << 20  # of weights timed, so that they come from memory and start-up stays short
REPEATS = 5


def choose_kernels(spec: ModelSpec, device: str, dtype: torch.dtype) -> list[ExpertKernel]:
    """One kernel for each layer; layers of one shape and maths share it."""
    plain: ExpertKernel = PlainKernel(device, dtype)
    if torch.device(device).type != "cpu":
        return [plain] * spec.layers
    known: dict[str, ExpertKernel] = {"plain": plain}
    chosen = []
    for layer in spec.layer_specs:
        names = candidates(layer, dtype)
        name = names[0]
        if len(names) > 1:
            name = fastest(spec.hidden, layer.inner, layer.maths.gated, dtype, names)
        if name not in known:
            known[name] = make(name, dtype)
        chosen.append(known[name])
    return chosen


def candidates(layer: LayerSpec, dtype: torch.dtype) -> tuple[str, ...]:
    """The kernels for the CPU that can do this layer."""
    names = ["plain"]
    if panels.fits(layer):
        names.append("panels")
    if dtype is torch.float32 and compiled.fits(layer):
        names.append("compiled")
    return tuple(names)


def make(name: str, dtype: torch.dtype) -> ExpertKernel:
    """A kernel for the CPU."""
    if name == "compiled":
        return CompiledKernel()
    return PanelKernel(dtype) if name == "panels" else PlainKernel("cpu", dtype)


@lru_cache(maxsize=32)
def fastest(
    hidden: int, inner: int, gated: bool, dtype: torch.dtype, names: tuple[str, ...]
) -> str:
    """Time the kernels on experts of this shape; 10-100 ms, once a process and shape."""
    layer = shape_only(hidden, inner, gated)
    experts = max(1, min(8, MOST_BYTES // (layer.parameters * dtype.itemsize)))
    record = ExpertRecord(
        tensors={s.tensor: torch.full(s.shape, 0.01, dtype=dtype) for s in layer.sources}
    )
    x = torch.full((ROWS, hidden), 0.01, dtype=dtype)
    token_of_pair = torch.arange(ROWS, dtype=torch.int32).repeat(experts)
    best = {}
    for name in names:
        kernel = make(name, dtype)
        replicas = [kernel.prepare(layer, record) for _ in range(experts)]
        times = []
        for _ in range(REPEATS):
            start = time.thread_time()
            kernel.run(layer, replicas, [ROWS] * experts, x, token_of_pair)
            times.append(time.thread_time() - start)
        best[name] = min(times)
    return min(names, key=lambda name: best[name])


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
