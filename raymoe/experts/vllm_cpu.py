"""vLLM's expert kernel for the CPU, `cpu_fused_moe`, where vLLM's CPU build is installed.

Its library is loaded by itself, some 20 ms: vllm is never imported here. It has builds for AVX2,
AVX-512 and AVX-512 with bfloat16, of which the one is taken that vLLM would take. Weights lie in
panels of 16 columns, one replica a call: the op knows neither absent experts (an id of -1 gives
wrong numbers without a word) nor experts that lie apart, and replicas come and go.

Measured on one AVX-512 core, a message of 8 tokens for each of 8 experts, 256 x 128: bfloat16 201
us where the plain kernel takes 483, float32 190 where the compiled one takes 152
(`benchmarks/kernels.py`).
"""

from __future__ import annotations

import importlib.util
import logging
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raymoe.checkpoint.record import ExpertRecord
from raymoe.checkpoint.spec import ExpertMaths, LayerSpec
from raymoe.experts.panels import cut, uncut
from raymoe.experts.scratch import Scratch, Scratches

log = logging.getLogger(__name__)

Replica = dict[str, Tensor]
PANEL = 16  # columns
ALIGNED = 32  # what the op wants hidden and inner sizes to be multiples of
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NotUsable(Exception):
    """Why an installed vLLM has no kernel for us."""


def fits(layer: LayerSpec, dtype: torch.dtype) -> bool:
    """Whether vLLM is here, has such a kernel, and the kernel this maths and shape."""
    hidden, maths = layer.sources[0].shape[0], layer.maths
    known = ExpertMaths(activation=maths.activation) == maths and maths.activation in ACTIVATIONS
    aligned = hidden % ALIGNED == 0 and layer.inner % ALIGNED == 0
    return known and aligned and dtype in DTYPES and functions() is not None


@lru_cache(maxsize=1)
def functions() -> Any | None:
    """The loaded ops; None where there are none. An installed vLLM without them is logged."""
    try:
        folder = folder_of_vllm()
        if folder is None:
            return None
        ops = loaded(folder)
        _check_layout(ops)
    except NotUsable as why:
        log.info("vLLM is installed, its expert kernel for the CPU is not used: %s", why)
        return None
    return ops


def folder_of_vllm() -> Path | None:
    """Where vLLM is installed; looked up, not imported."""
    try:
        found = importlib.util.find_spec("vllm")
    except (ImportError, ValueError):  # ValueError: a stand-in without a spec
        return None
    places = list(found.submodule_search_locations or ()) if found else []
    return Path(places[0]) if places else None


def library_of(folder: Path) -> Path:
    """The build that vLLM loads on this processor. Raises NotUsable."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise NotUsable(f"tried on x86-64 only, this is {platform.machine()}")
    # builds for GPUs have a `_C` too, and would drag their device's libraries in
    if not (folder / "_C_AVX2.abi3.so").exists():
        raise NotUsable("this vLLM is no CPU build")
    try:
        wide = torch.cpu._is_avx512_supported()
        wide_bf16 = wide and torch.cpu._is_avx512_bf16_supported()
    except AttributeError as error:
        raise NotUsable(f"torch {torch.__version__} does not tell the processor: {error}") from None
    return folder / f"{'_C' if wide_bf16 else '_C_AVX512' if wide else '_C_AVX2'}.abi3.so"


def loaded(folder: Path) -> Any:
    """torch.ops._C with the two ops in it. Raises NotUsable."""
    ops = torch.ops._C
    if not hasattr(ops, "cpu_fused_moe"):  # it is there where vllm has been imported
        library = library_of(folder)
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        except OSError as error:  # built for another torch
            raise NotUsable(f"{library.name} does not load: {error}") from None
    for name in ("cpu_fused_moe", "prepack_moe_weight"):
        if not hasattr(ops, name):
            raise NotUsable(f"it has no {name}")
    return ops


def _check_layout(ops: Any) -> None:
    """That vLLM packs weights into the panels that we know how to take apart again."""
    matrix = torch.arange(32 * 64, dtype=torch.float32).view(64, 32)  # [in, out]
    packed = torch.empty(1, 32, 64)
    try:
        ops.prepack_moe_weight(matrix.T.contiguous().unsqueeze(0), packed, "vec")
    except (RuntimeError, TypeError) as error:
        raise NotUsable(f"prepack_moe_weight takes other arguments: {error}") from None
    if not torch.equal(packed.view(-1), cut(matrix, PANEL).view(-1)):
        raise NotUsable("it packs weights in another way than in panels of 16")


class VllmCpuKernel:
    """Only for layers that `fits` accepts. One thread at a time."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        ops = functions()
        assert ops is not None
        self._fused = ops.cpu_fused_moe
        self._dtype = dtype
        self._scratches = Scratches(self._scratch)
        self._gates: dict[int, tuple[Tensor, Tensor]] = {}  # by the length of a run

    def prepare(self, layer: LayerSpec, record: ExpertRecord) -> Replica:
        """Each matrix [in, out] as vLLM has packed its [1, out, in]."""
        return {
            name: cut(tensor.to(self._dtype), PANEL).view(1, tensor.shape[1], tensor.shape[0])
            for name, tensor in record.tensors.items()
        }

    def record(self, layer: LayerSpec, prepared: Replica, dtype: torch.dtype) -> ExpertRecord:
        tensors = {}
        for name, tensor in prepared.items():
            _, columns, rows = tensor.shape
            tensors[name] = uncut(tensor.view(columns // PANEL, rows, PANEL), name, dtype)
        return ExpertRecord(tensors=tensors)

    def run(
        self,
        layer: LayerSpec,
        replicas: list[Replica],
        counts: list[int],
        x: Tensor,
        token_of_pair: Tensor,
    ) -> Tensor:
        activation, fused = ACTIVATIONS[layer.maths.activation], self._fused
        scratch = self._scratches.of(layer, x.shape[1])
        rows, result = scratch.head(len(token_of_pair))
        torch.index_select(x, 0, token_of_pair, out=rows)  # [P, D]
        runs = scratch.runs(counts)
        for replica, count, (x_run, out_run) in zip(replicas, counts, runs, strict=True):
            if count:
                ones, ids = self._gates.get(count) or self._gate(count)
                fused(
                    out_run, x_run, replica["up"], replica["down"], None, None, ones, ids,
                    True, activation, "vec",  # True: rows are not weighted
                )  # fmt: skip
        return result

    def _gate(self, count: int) -> tuple[Tensor, Tensor]:
        """What the op takes for the gate's choice: for every row the one expert of the call."""
        if len(self._gates) > 4096:
            self._gates.clear()
        made = torch.ones(count, 1), torch.zeros(count, 1, dtype=torch.int32)
        self._gates[count] = made
        return made

    def _scratch(self, layer: LayerSpec, hidden: int) -> Scratch:
        return Scratch((hidden, hidden), self._dtype, "cpu", _rows)


def _rows(buffers: tuple[Tensor, ...], start: int, count: int) -> tuple[Tensor, ...]:
    return tuple(buffer[start : start + count] for buffer in buffers)
