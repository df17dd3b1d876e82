"""From a deployment's settings to the arguments of vLLM's engine and its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raymoe.config import DeploymentConfig
from raymoe.errors import ConfigError

OURS = frozenset(
    {
        "model", "load_format", "additional_config", "logits_processors", "skip_tokenizer_init",
        "max_num_seqs", "max_num_batched_tokens", "enable_prefix_caching", "max_model_len",
        "kv_cache_memory_bytes", "scheduling_policy", "disable_log_stats", "max_logprobs",
    }
)  # fmt: skip
"""What raymoe says itself, from its own settings."""


_SOCKET_PATH_LIMIT = 107  # bytes of a unix socket's path on Linux
_SOCKET_NAME = 37  # "/" and a UUID: how vLLM calls its sockets


def environment(config: DeploymentConfig, folder: Path | None = None) -> dict[str, str]:
    """Variables that vLLM reads; what the user has set wins. `folder`: for vLLM's sockets."""
    # A step may wait for experts for as long as the deployment says; vLLM ends it after 300 s.
    patience_s = max(300, int(config.data_plane.stall_limit_s) + 60)
    wanted = {
        "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": str(patience_s),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # groups compute on the same cores,
        "OMP_WAIT_POLICY": "passive",  # so threads must not keep them while they have no work
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # its logits processors are of another kind
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if folder is not None and len(os.fsencode(folder)) + _SOCKET_NAME <= _SOCKET_PATH_LIMIT:
        wanted["VLLM_RPC_BASE_PATH"] = str(folder)
    wanted = {name: value for name, value in wanted.items() if name not in os.environ}
    if not config.routers.num_gpus:  # whatever Ray gives its processes
        wanted["OMP_NUM_THREADS"] = str(config.vllm.threads)
    return wanted


def engine_arguments(
    config: DeploymentConfig,
    model: str,
    plugin: Mapping[str, Any],
    *,
    drawing: str,
    device: str,
    context: int,
) -> dict[str, Any]:
    """Of vLLM's AsyncEngineArgs. `plugin`: additional_config["raymoe"]; `context`: the model's own.

    `vllm.engine_args` of the settings win over the defaults by device, not over raymoe's own.
    """
    routers, more = config.routers, dict(config.vllm.engine_args)
    if taken := sorted(OURS & more.keys()):
        raise ConfigError(
            f"vllm.engine_args: {taken[0]} is raymoe's to set; what you can say of it is in "
            "routers (docs/config.md)"
        )
    by_device: dict[str, Any] = (
        {"enforce_eager": True}
        if device == "cpu"
        else {"compilation_config": {"cudagraph_mode": "PIECEWISE"}}
    )
    ranks = more.get("tensor_parallel_size", 1)
    return {
        # said, as vLLM inside a Ray actor would choose Ray
        "distributed_executor_backend": "uni" if ranks == 1 else "mp",
        "dtype": routers.dtype,
        **by_device,
        **more,
        "model": model,
        "load_format": "raymoe",
        "additional_config": {"raymoe": dict(plugin)},
        "logits_processors": [drawing],
        "skip_tokenizer_init": True,
        "max_num_seqs": routers.max_batch,
        "max_num_batched_tokens": max(routers.chunk_tokens, routers.max_batch),
        "enable_prefix_caching": routers.prefix_cache,
        "max_model_len": min(routers.max_context_tokens or context, context),
        "kv_cache_memory_bytes": routers.kv_bytes,
        "scheduling_policy": "priority",
        "disable_log_stats": True,
        "max_logprobs": -1,
    }
