"""Which kernel for which layer: by shape, and by timing those that can do it where several can."""

from __future__ import annotations

import logging
import time
from functools import lru_cache

import torch

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import ExpertMaths, LayerSpec, ModelSpec, Source
from raymoe.experts import compiled, grouped, panels, vllm_cpu, vllm_cuda
from raymoe.experts.compiled import PLAIN_SILU, CompiledKernel
from raymoe.experts.grouped import GroupedKernel
from raymoe.experts.kernels import ExpertKernel
from raymoe.experts.panels import PanelKernel
from raymoe.experts.plain import PlainKernel
from raymoe.experts.vllm_cpu import VllmCpuKernel
from raymoe.experts.vllm_cuda import VllmCudaKernel

log = logging.getLogger(__name__)

ROWS = 8  # tokens an expert while timing: 16 experts, top-4, 32 streams
MOST_BYTES = 64 << 20  # of weights timed, so that they come from memory and start-up stays short
REPEATS = 5


def choose_kernels(
    spec: ModelSpec, device: str, dtype: torch.dtype, *, vllm_on_cuda: bool = False
) -> list[ExpertKernel]:
    """One kernel for each layer; layers of one shape and maths share it.

    `vllm_on_cuda`: try vLLM's too, for which vLLM is imported.
    """
    known: dict[str, ExpertKernel] = {}
    chosen = []
    for layer in spec.layer_specs:
        names = candidates(layer, dtype, device, spec.stored_dtype, vllm_on_cuda=vllm_on_cuda)
        name = names[0]
        if len(names) > 1:
            name = fastest(spec.hidden, layer.inner, layer.maths, dtype, names, device)
        if name not in known:
            known[name] = make(name, dtype, device)
        chosen.append(known[name])
    return chosen


def candidates(
    layer: LayerSpec,
    dtype: torch.dtype,
    device: str = "cpu",
    stored: str = "float32",
    *,
    vllm_on_cuda: bool = False,
) -> tuple[str, ...]:
    """The kernels that can do this layer on a device; the first can do any.

    stored: the dtype of records; weights that are bfloat16 there need not be larger here.
    """
    names = ["plain"]
    if torch.device(device).type != "cpu":
        if grouped.fits(layer):
            names.append("grouped")
        if vllm_on_cuda and vllm_cuda.fits(layer):
            names.append("vllm-cuda")
        return tuple(names)
    if panels.fits(layer):
        names.append("panels")
    if dtype is torch.float32 and compiled.fits(layer):
        names.append("compiled bfloat16" if stored == "bfloat16" else "compiled")
    if vllm_cpu.fits(layer, dtype):
        names.append("vllm-cpu")
    return tuple(names)


def make(name: str, dtype: torch.dtype, device: str = "cpu") -> ExpertKernel:
    """A kernel by its name."""
    if name.startswith("compiled"):
        return CompiledKernel(torch.bfloat16 if name.endswith("bfloat16") else torch.float32)
    if name == "grouped":
        return GroupedKernel(device, dtype)
    if name == "vllm-cpu":
        return VllmCpuKernel(dtype)
    if name == "vllm-cuda":
        return VllmCudaKernel(device, dtype)
    return PanelKernel(dtype) if name == "panels" else PlainKernel(device, dtype)


@lru_cache(maxsize=32)
def fastest(
    hidden: int,
    inner: int,
    maths: ExpertMaths,
    dtype: torch.dtype,
    names: tuple[str, ...],
    device: str = "cpu",
) -> str:
    """Time the kernels on experts of this shape; 10-100 ms, once a process and shape.

    On other devices than the CPU they are compiled first, seconds where no earlier process has
    done it. One that fails or gives something else than the first is left out.
    """
    layer = shape_only(hidden, inner, maths)
    experts = max(1, min(8, MOST_BYTES // (layer.parameters * dtype.itemsize)))
    draw = torch.Generator().manual_seed(0)
    record = ExpertRecord(
        tensors={
            s.tensor: (torch.randn(s.shape, generator=draw) * s.shape[0] ** -0.5).to(dtype)
            for s in layer.sources
        }
    )
    x = torch.randn(ROWS, hidden, generator=draw).to(device, dtype)
    token_of_pair = torch.arange(ROWS, dtype=torch.int32).repeat(experts).to(device)
    counts = [ROWS] * experts
    on_cpu = torch.device(device).type == "cpu"
    clock = time.thread_time if on_cpu else time.perf_counter
    best: dict[str, float] = {}
    truth: torch.Tensor | None = None
    for name in names:
        times = []
        try:
            kernel = make(name, dtype, device)
            replicas = [kernel.prepare(layer, record) for _ in range(experts)]
            found = kernel.run(layer, replicas, counts, x, token_of_pair)
            if truth is None:
                truth = found.clone()
            elif not _alike(found, truth):
                raise ValueError("its results differ")
            for _ in range(REPEATS):
                start = clock()
                kernel.run(layer, replicas, counts, x, token_of_pair)
                if not on_cpu:
                    torch.cuda.synchronize(device)
                times.append(clock() - start)
        except Exception as why:
            if truth is None:
                raise
            log.warning("expert kernel %r is not used for %d x %d: %r", name, hidden, inner, why)
            continue
        best[name] = min(times)
    chosen = min(best, key=lambda name: best[name])
    told = ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in best.items())
    log.info("experts of %d x %d, %s: kernel %r (%s)", hidden, inner, dtype, chosen, told)
    return chosen


def _alike(found: torch.Tensor, truth: torch.Tensor) -> bool:
    """Within rounding of bfloat16, as whole tensors."""
    differ = (found.double() - truth.double()).norm() / truth.double().norm()
    return bool(differ < 0.03)


def shape_only(hidden: int, inner: int, maths: ExpertMaths = PLAIN_SILU) -> LayerSpec:
    """A layer of experts that exists in no checkpoint."""
    up = inner * (2 if maths.gated else 1)
    shapes: dict[str, tuple[int, ...]] = {"up": (hidden, up), "down": (inner, hidden)}
    if maths.bias:
        shapes |= {"up_bias": (up,), "down_bias": (hidden,)}
    return LayerSpec(
        name="",
        experts=1,
        inner=inner,
        maths=maths,
        sources=tuple(
            Source(tensor=name, keys=(), pick="key", shape=shape) for name, shape in shapes.items()
        ),
    )
