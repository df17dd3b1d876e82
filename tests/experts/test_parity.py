"""Every kernel against the maths done slowly, in shapes that decoding and prefill make.

Those of vLLM run where it is installed: `make test-vllm` runs tests/vllm/test_expert_kernel.py.
"""

from __future__ import annotations

import pytest
import torch

from raymoe.checkpoint.spec import ExpertMaths
from raymoe.experts.kernels import ExpertKernel
from tests.experts.parity import (
    FORMS,
    HIDDEN,
    INNER,
    NAMES,
    check_maths,
    check_messages,
    check_record,
    kernel_for,
    name_of,
)
from tests.experts.specs import SILU, model_spec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernel_or_skip(
    name: str, maths: ExpertMaths = SILU, dtype: torch.dtype = torch.float32, **shape: int
) -> ExpertKernel:
    spec = model_spec(maths=maths, **{"hidden": HIDDEN, "inner": INNER, **shape})
    kernel = kernel_for(name, spec.layer_specs[0], dtype)
    if kernel is None:
        pytest.skip("not for such a layer, or not on this machine")
    return kernel


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("maths", FORMS, ids=name_of)
def test_kernel_does_the_maths(name: str, maths: ExpertMaths) -> None:
    check_maths(kernel_or_skip(name, maths), maths)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "panels"])
def test_messages(name: str, dtype: torch.dtype, weighted: bool) -> None:
    check_messages(kernel_or_skip(name, dtype=dtype, hidden=96, inner=64), dtype, weighted)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_record_comes_back_bit_for_bit(name: str, biased: bool, stored: str) -> None:
    maths = ExpertMaths(activation="silu", bias=biased)
    kernel = kernel_or_skip(name, maths)
    check_record(kernel, model_spec(hidden=HIDDEN, inner=INNER, maths=maths, stored=stored), stored)
