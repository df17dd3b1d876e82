"""Without vLLM installed only the tests that need none of it are collected. Shared fixtures."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:  # torch is imported when the environment is set
    from tests.vllm.groups import Fleet
    from tests.vllm.heard import Heard

if importlib.util.find_spec("vllm") is None:
    collect_ignore = [
        "test_contract.py",
        "test_deployment.py",
        "test_drawing.py",
        "test_engine.py",
        "test_expert_kernel.py",
        "test_families.py",
        "test_processes.py",
        "test_ray_serve_llm.py",
        "test_router_engine.py",
        "test_router_loop.py",
    ]

_sockets = tempfile.mkdtemp(prefix="rv-")  # short: the path of a socket has 107 bytes
atexit.register(shutil.rmtree, _sockets, ignore_errors=True)

os.environ.update(
    {
        "VLLM_RPC_BASE_PATH": _sockets,  # vLLM leaves its sockets behind
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # others share the cores
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
)


@pytest.fixture(scope="module")
def fleet(model: Path) -> Iterator[Fleet]:
    """Two groups over the module's checkpoint: a holds the even experts, b the odd ones."""
    from tests.vllm.groups import Fleet

    fleet = Fleet(model, {"a": lambda _, e: e % 2 == 0, "b": lambda _, e: e % 2 == 1})
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def heard() -> Heard:
    """What the module's engine publishes."""
    from tests.vllm.heard import Heard

    return Heard()
