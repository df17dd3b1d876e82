"""How many bytes of experts each group may hold, and whether one of each fits at all."""

from __future__ import annotations

import numpy as np

from placement.initial import place_at_start
from placement.types import Fleet, GroupSpec
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig, GroupsConfig


def reserve_bytes(config: DeploymentConfig, spec: ModelSpec) -> int:
    """Bytes kept free in every group, to serve experts from cold copies."""
    return config.placement.reserve_experts * max(spec.expert_bytes)


def group_prefix(config: DeploymentConfig, kind: str) -> str:
    """What the ids of a kind's groups begin with: g, or KIND- when there are several kinds."""
    return f"{kind}-" if len(config.groups) > 1 else "g"


def group_ids(config: DeploymentConfig) -> list[tuple[str, GroupsConfig]]:
    """Every group's id and kind, in the order of all arrays: g0, g1 ... or KIND-0, KIND-1 ..."""
    return [
        (f"{group_prefix(config, kind.kind)}{n}", kind)
        for kind in config.groups
        for n in range(kind.count)
    ]


def memory_bytes(config: DeploymentConfig, spec: ModelSpec) -> dict[str, int]:
    """Budget of one group of each kind: what is set, else its even share + 25 % + the reserve."""
    sizes = np.array(spec.expert_bytes, np.int64)
    total = int((sizes * np.array(spec.experts_of_layer)).sum())
    groups = sum(kind.count for kind in config.groups)
    rounding = -(-int(sizes.sum()) // groups)  # a layer's experts may not divide evenly
    share = -(-total * 5 // (4 * groups)) + rounding + reserve_bytes(config, spec)
    return {kind.kind: kind.memory_bytes or share for kind in config.groups}


def fleet_of(config: DeploymentConfig, spec: ModelSpec, groups: tuple[GroupSpec, ...]) -> Fleet:
    """The fleet as the planner sees it."""
    return Fleet(
        groups=groups,
        expert_bytes=np.array(spec.expert_bytes, np.int64),
        experts_of_layer=spec.experts_of_layer,
        survive=config.placement.survive,
        reserve_bytes=reserve_bytes(config, spec),
    )


def check_budgets(config: DeploymentConfig, spec: ModelSpec) -> None:
    """Raises `PlacementError`, saying how many bytes are missing, when one replica of each expert
    does not fit the groups as they are configured."""
    budget = memory_bytes(config, spec)
    groups = tuple(
        GroupSpec(id=name, node="?", memory_bytes=budget[kind.kind])
        for name, kind in group_ids(config)
    )
    place_at_start(fleet_of(config, spec, groups))
