"""The devices that tests run on: `pytest -m gpu` runs those of a CUDA device, if there is one."""

from __future__ import annotations

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device here"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_CUDA)]
"""For `@pytest.mark.parametrize("device", DEVICES)`."""
