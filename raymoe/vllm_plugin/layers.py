"""The layer that takes the place of vLLM's RoutedExperts: no weights, and a way to the groups.

vLLM's runner chooses the experts, scales, adds the shared experts and reduces over ranks, as ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot
from vllm.model_executor.layers.fused_moe.config import FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder

from raymoe.errors import ConfigError
from raymoe.vllm_plugin import ops  # noqa: F401 - defines the ops
from raymoe.vllm_plugin.remote import RemoteExperts

_remote: ContextVar[RemoteExperts | None] = ContextVar("raymoe_remote", default=None)


@contextmanager
def built_over(remote: RemoteExperts) -> Iterator[None]:
    """A model that is built meanwhile has its routed experts there; any other its own."""
    token = _remote.set(remote)
    try:
        yield
    finally:
        _remote.reset(token)


class RemoteMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """How vLLM's layer computes: it sends, lets the shared experts run, and waits."""

    supports_internal_mk = True  # no dispatch of vLLM's own around it
    mk_can_overlap_shared_experts = True  # the runner hands the shared experts to apply()
    is_monolithic = False  # vLLM's gate chooses the experts
    supports_eplb = False

    def create_weights(self, layer: RoutedExperts, *args: Any, **kwargs: Any) -> None:
        """None: the engine never holds an expert's parameter."""

    def maybe_roundup_sizes(
        self, hidden: int, inner: int, dtype: torch.dtype, parallel: Any
    ) -> tuple[int, int]:
        """As they are; no kernel here needs padding."""
        return hidden, inner

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> Any:
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x [T, D], topk_weights and topk_ids [T, K] -> [T, D]."""
        name = layer.layer_name
        ticket = torch.ops.raymoe.dispatch(x, topk_ids, topk_weights, name)
        if shared_experts is not None:
            shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
        out: Tensor = torch.ops.raymoe.combine(ticket, x, name)
        return out


class RemoteRoutedExperts(RoutedExperts):  # type: ignore[misc]
    """vLLM makes every RoutedExperts of this class once `install` has run. Outside `built_over` it
    is what it derives from."""

    remote: RemoteExperts | None = None
    moe_layer: int

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> Any:
        """Called by the constructor of RoutedExperts, before weights are made."""
        remote = _remote.get()
        if remote is None:
            return super()._get_quant_method(prefix, quant_config, moe_config)
        self.moe_layer = remote.layer_of(self.layer_name)
        self._compare(remote, moe_config)
        self.remote = remote
        return RemoteMethod(moe_config)

    def _compare(self, remote: RemoteExperts, moe_config: Any) -> None:
        """What vLLM expects of the experts against what the groups compute."""
        spec = remote.spec
        here = (moe_config.num_experts, moe_config.hidden_dim)
        there = (spec.layer_specs[self.moe_layer].experts, spec.hidden)
        if here != there:
            raise ConfigError(
                f"{self.layer_name}: vLLM dispatches {here[1]} numbers a token to {here[0]} "
                f"experts, the groups hold {there[0]} experts for {there[1]}"
            )
        if self.apply_router_weight_on_input:
            raise ConfigError(
                f"{self.layer_name}: weighting the experts' input, not their output, is not built"
            )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
        """Remote experts have nothing to load, so a tensor that arrives is a mistake."""
        if self.remote is None:
            return super().load_weights(weights)  # type: ignore[no-any-return]
        for name, _ in weights:
            raise ConfigError(f"{self.layer_name}: the expert tensor {name} was read")
        return ()


def install() -> None:
    """Have vLLM build our class. Idempotent. ConfigError when another plugin has its own."""
    placed = op_registry_oot.get("RoutedExperts")
    if placed is RemoteRoutedExperts:
        return
    if placed is not None:
        raise ConfigError(
            f"{placed.__module__}.{placed.__name__} already stands in for vLLM's RoutedExperts; "
            "raymoe cannot: leave one of the two plugins out (VLLM_PLUGINS)"
        )
    PluggableLayer.register_oot(name="RoutedExperts")(RemoteRoutedExperts)
