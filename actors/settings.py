"""Settings -> what the reconciler and the autoscaler take."""

from __future__ import annotations

from placement.autoscale import Autoscaler, Kind, ScaleConfig
from placement.plan import PlanConfig
from placement.reconcile import ReconcileConfig
from raymoe.budget import memory_bytes
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig

_CALL_BYTES = 256 << 20  # a group is asked for about so much at a time
_CALL_S = 2.0  # ... and for no more than copies may bring in so long
_MOST_LOADS = 32
_PLANS = 3


def reconcile_config(config: DeploymentConfig, spec: ModelSpec) -> ReconcileConfig:
    """When and how to plan."""
    place = config.placement
    # a call is not broken off: what nobody serves waits for the end of one that takes its time
    call_bytes = min(_CALL_BYTES, _CALL_S * (place.copy_bytes_per_s or _CALL_BYTES / _CALL_S))
    return ReconcileConfig(
        plan=PlanConfig(
            horizon_s=place.horizon_s,
            margin=place.margin,
            interval_bytes=place.interval_bytes,
            budget_bytes=place.replica_bytes,
        ),
        plan_every_s=place.plan_interval_s,
        live=place.live,
        copies=place.copies,
        report_s=place.interval_s / 2,
        loads_per_group=max(1, min(_MOST_LOADS, int(call_bytes) // max(spec.expert_bytes))),
    )


def autoscaler(config: DeploymentConfig, spec: ModelSpec) -> Autoscaler | None:
    """None unless it is enabled."""
    wanted = config.placement.autoscale
    if not wanted.enabled:
        return None
    budget = memory_bytes(config, spec)
    kinds = tuple(
        Kind(
            name=kind.kind,
            speed=1.0 / kind.slowdown,
            price=kind.price,
            memory_bytes=budget[kind.kind],
            least=kind.min_count,
            most=kind.max_count or 1_000,
        )
        for kind in config.groups
    )
    return Autoscaler(
        ScaleConfig(
            target=wanted.target,
            high=wanted.high,
            low=wanted.low,
            up_after_s=wanted.up_after_s,
            # by then plans had several times the chance to even things out
            uneven_s=_PLANS * max(wanted.up_after_s, config.placement.plan_interval_s),
            down_after_s=wanted.down_after_s,
            cool_down_s=wanted.cool_down_s,
            least=max(1, sum(kind.min_count for kind in config.groups)),
        ),
        kinds,
    )
