"""load_format="raymoe": the dense part of a checkpoint, and links instead of the experts."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed import distributed_c10d as c10d
from vllm import __version_tuple__, envs
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.platforms import current_platform

from raymoe.checkpoint.reader import read_spec
from raymoe.checkpoint.spec import ModelSpec
from raymoe.errors import ConfigError
from raymoe.vllm_plugin import ops
from raymoe.vllm_plugin.dense import dense_weights
from raymoe.vllm_plugin.layers import RemoteRoutedExperts, built_over
from raymoe.vllm_plugin.remote import RemoteExperts
from raymoe.vllm_plugin.settings import read_settings
from raymoe.vllm_plugin.supported import check_config, check_family, check_version
from raymoe.vllm_plugin.traces import note

log = logging.getLogger(__name__)

LOAD_FORMAT = "raymoe"


class RemoteExpertsLoader(DefaultModelLoader):  # type: ignore[misc]
    """One a model. ConfigError or CheckpointError, before a weight is read, for what cannot be."""

    def __init__(self, load_config: Any) -> None:
        if load_config.model_loader_extra_config:
            raise ConfigError(
                f"load_format={LOAD_FORMAT!r} knows no model_loader_extra_config, got "
                f"{load_config.model_loader_extra_config!r}"
            )
        super().__init__(dataclasses.replace(load_config, load_format="safetensors"))
        self._spec: ModelSpec | None = None
        self._remote: RemoteExperts | None = None

    def load_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """vLLM's entry: checks, connects, builds without experts, reads the dense weights."""
        settings = read_settings(vllm_config.additional_config)
        if settings.board is not None:
            note(Path(settings.board), _meeting_file())
        check_version(__version_tuple__[:2], current_platform.device_type)
        check_config(vllm_config, settings.stall_limit_s, envs.VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS)
        self._spec = spec = read_spec(model_config.model)
        check_family(spec)
        splitting = vllm_config.compilation_config.splitting_ops
        if splitting is not None:  # piecewise graphs: what waits stays outside of them
            splitting.extend(n for n in (*ops.NAMES, *ops.AROUND) if n not in splitting)
        self._remote = remote = RemoteExperts(
            spec,
            settings,
            rank=get_tensor_model_parallel_rank(),
            ranks=get_tensor_model_parallel_world_size(),
        )
        try:
            model: nn.Module = super().load_model(vllm_config, model_config, prefix)
            check_model(model, spec)
        except BaseException:
            remote.close()
            raise
        weakref.finalize(model, remote.close)
        log.info("%d MoE layers have their experts in raymoe's groups", spec.layers)
        return model

    def create_model(self, vllm_config: Any, model_config: Any, prefix: str = "") -> nn.Module:
        """vLLM's model; each of its RoutedExperts is ours."""
        assert self._remote is not None
        with built_over(self._remote):
            model: nn.Module = super().create_model(vllm_config, model_config, prefix)
        check_model(model, self._remote.spec)
        return model

    def get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """What is read: every stored tensor that is no expert's."""
        self.counter_before_loading_weights = time.perf_counter()  # for vLLM's own log line
        return dense_weights(self._spec or read_spec(model_config.model))


def _meeting_file() -> list[str]:
    """The file through which vLLM's ranks have found each other, if it was one."""
    # Of torch's private names: without them the file stays behind, some hundred bytes.
    with contextlib.suppress(AttributeError, ValueError):
        store: Any = c10d._get_default_store()
        while isinstance(store, c10d.PrefixStore):
            store = store.underlying_store
        if type(store).__name__ == "FileStore":
            return [str(store.path)]
    return []


def check_model(model: nn.Module, spec: ModelSpec) -> None:
    """Every MoE layer is remote and no expert's parameter is here. ConfigError otherwise."""
    remote = set()
    for name, module in model.named_modules():
        if isinstance(module, RemoteRoutedExperts) and module.remote is not None:
            remote.add(module.moe_layer)
            # the gate's bias is handed to the layer too
            left = [n for n, p in module.named_parameters() if n != "e_score_correction_bias"]
            if left:
                raise ConfigError(f"{name} has parameters of experts in the engine: {left}")
        elif isinstance(module, RoutedExperts):
            raise ConfigError(f"{name}: {type(module).__name__} keeps its experts in the engine")
    missing = sorted(set(range(spec.layers)) - remote)
    if missing:
        names = ", ".join(spec.layer_names[layer] for layer in missing[:3])
        raise ConfigError(
            f"{len(missing)} of {spec.layers} MoE layers of {type(model).__name__} keep their "
            f"experts in the engine ({names}{', ...' if len(missing) > 3 else ''})"
        )


def install() -> None:
    """Make vLLM know load_format="raymoe". Idempotent."""
    register_model_loader(LOAD_FORMAT)(RemoteExpertsLoader)
