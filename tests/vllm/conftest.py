"""Without vLLM installed only the tests that need none of it are collected."""

from __future__ import annotations

import importlib.util
import os

if importlib.util.find_spec("vllm") is None:
    collect_ignore = [
        "test_contract.py",
        "test_deployment.py",
        "test_drawing.py",
        "test_engine.py",
        "test_families.py",
        "test_processes.py",
        "test_router_engine.py",
        "test_router_loop.py",
    ]

os.environ.update(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # others share the cores
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
)
