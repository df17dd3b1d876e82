"""AsyncLLM for a router: its arguments checked here, its processes started."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from raymoe.config import DeploymentConfig
from raymoe.engine.facts import longest_context
from raymoe.errors import ConfigError
from raymoe.vllm_plugin.arguments import engine_arguments
from raymoe.vllm_plugin.supported import check_config, check_version

Record = Callable[[Any, Any], None]
"""(scheduler's statistics, iteration's statistics) of a step, either may be None."""


async def make_llm(
    config: DeploymentConfig, path: str, plugin: Mapping[str, Any], record: Record
) -> Any:
    """An AsyncLLM of the checkpoint at `path`, in the running event loop.

    `plugin`: additional_config["raymoe"]. Raises ConfigError for what vLLM or the plugin refuses.
    """
    try:
        import vllm
        from vllm import AsyncEngineArgs, envs
        from vllm.platforms import current_platform
        from vllm.transformers_utils.config import get_config
        from vllm.v1.engine.async_llm import AsyncLLM

        from raymoe.vllm_plugin.drawing import NAME
    except ImportError as error:
        raise ConfigError(f"engine: vllm does not fit this vLLM: {error}") from error
    text = get_config(path, trust_remote_code=False)
    arguments = engine_arguments(
        config,
        path,
        plugin,
        drawing=NAME,
        device=current_platform.device_type,
        context=longest_context(SimpleNamespace(config=text)),
    )
    # here already, so that whoever starts the deployment reads the sentence
    check_version(vllm.__version_tuple__[:2], current_platform.device_type)
    try:
        settings = AsyncEngineArgs(**arguments).create_engine_config()
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"vLLM refuses its arguments: {_line(error)}") from error
    _in_one_process(settings, arguments["distributed_executor_backend"])
    check_config(settings, config.data_plane.stall_limit_s, envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)
    try:
        return AsyncLLM.from_vllm_config(
            settings, stat_loggers=[_logger(record)], disable_log_stats=True
        )
    except RuntimeError as error:  # what happened there is in its own output only
        raise ConfigError(
            f"vLLM's engine process did not start (Ray's logs of the router say why): "
            f"{_line(error)}"
        ) from error


def _in_one_process(settings: Any, wanted: str) -> None:
    """vLLM's CPU build makes "mp" of "uni", to set OpenMP's threads for a process of the worker's
    own. A router's threads are set by its environment: a process, 400 MB of message rings and a
    round trip a step are saved."""
    if wanted == "uni":
        settings.parallel_config.distributed_executor_backend = wanted


def _logger(record: Record) -> Any:
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Counters(StatLoggerBase):  # type: ignore[misc]
        """What vLLM tells after each step."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

        def log_engine_initialized(self) -> None: ...

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any
        ) -> None:
            record(scheduler_stats, iteration_stats)

    return Counters


def _line(error: Exception) -> str:
    """What an error says, in one line: pydantic's have a line for each field."""
    return " ".join(str(error).split())[:400]
