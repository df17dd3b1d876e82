"""vLLM's expert kernel for the CPU in raymoe's groups: the suite of tests/experts, the choice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raymoe.checkpoint.spec import ExpertMaths
from raymoe.experts import choose, vllm_cpu
from tests.experts.parity import FORMS, check_maths, check_messages, check_record, name_of
from tests.experts.specs import model_spec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OURS = [maths for maths in FORMS if vllm_cpu.fits(model_spec(inner=32, maths=maths).layer_specs[0],
                                                  torch.float32)]  # fmt: skip


def test_it_is_here() -> None:
    assert vllm_cpu.functions() is not None
    assert {maths.activation for maths in OURS} == set(vllm_cpu.ACTIVATIONS)


@pytest.mark.parametrize("maths", OURS, ids=name_of)
def test_kernel_does_the_maths(maths: ExpertMaths) -> None:
    check_maths(vllm_cpu.VllmCpuKernel(), maths)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_messages(dtype: torch.dtype, weighted: bool) -> None:
    check_messages(vllm_cpu.VllmCpuKernel(dtype), dtype, weighted)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_record_comes_back_bit_for_bit(stored: str) -> None:
    spec = model_spec(hidden=96, inner=64, stored=stored)
    check_record(vllm_cpu.VllmCpuKernel(), spec, stored)


def test_a_group_times_it_and_imports_no_vllm() -> None:
    """In a process of its own: here vLLM has been imported."""
    code = """
import logging, sys, torch
from raymoe.experts import choose
from tests.experts.specs import SILU, model_spec

logging.basicConfig(level=logging.INFO)
torch.set_num_threads(1)
layer = model_spec(hidden=256, inner=128).layer_specs[0]
names = choose.candidates(layer, torch.bfloat16)
assert "vllm-cpu" in names, names
assert choose.fastest(256, 128, SILU, torch.bfloat16, names) in names
assert "vllm" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "vllm-cpu" in done.stderr and " us" in done.stderr  # which was chosen, and by what


@pytest.mark.parametrize("build", ["_C", "_C_AVX512", "_C_AVX2"])
def test_every_build_that_this_processor_runs(build: str) -> None:
    """What is taken on processors without AVX-512 too: each in a process of its own."""
    if build != "_C_AVX2" and not torch.cpu._is_avx512_supported():
        pytest.skip("this processor has no AVX-512")
    if build == "_C" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor has no AVX-512 with bfloat16")
    code = f"""
import torch
from raymoe.checkpoint.spec import ExpertMaths
from raymoe.experts import vllm_cpu
from tests.experts.parity import check_maths, check_messages

vllm_cpu.library_of = lambda folder: folder / "{build}.abi3.so"
check_maths(vllm_cpu.VllmCpuKernel(), ExpertMaths(activation="silu"))
for dtype in (torch.float32, torch.bfloat16):
    check_messages(vllm_cpu.VllmCpuKernel(dtype), dtype, True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("files", "sentence"),
    [((), "no CPU build"), (("_C_AVX2.abi3.so", "_C_AVX512.abi3.so", "_C.abi3.so"), "not load")],
)
def test_a_vllm_without_it_is_no_error(
    files: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"of another torch")
    monkeypatch.setattr(vllm_cpu.torch, "ops", type("Ops", (), {
        "_C": object(), "load_library": staticmethod(torch.ops.load_library)})())  # fmt: skip
    with pytest.raises(vllm_cpu.NotUsable, match=sentence):
        vllm_cpu.loaded(tmp_path)


def test_one_that_fails_or_errs_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec = model_spec(hidden=64, inner=32)

    class Wrong(vllm_cpu.VllmCpuKernel):
        def run(self, *arguments: object) -> torch.Tensor:
            return super().run(*arguments) * 2  # type: ignore[arg-type]

    monkeypatch.setattr(choose, "VllmCpuKernel", Wrong)
    names = ("plain", "vllm-cpu")
    maths = spec.layer_specs[0].maths
    assert choose.fastest.__wrapped__(64, 32, maths, torch.float32, names) == "plain"
    assert "its results differ" in caplog.text
