"""Without vLLM installed only the tests that need none of it are collected."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile

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
