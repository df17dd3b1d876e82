"""When a controller may place experts for the first time, and when a start has failed."""

from __future__ import annotations

from collections.abc import Iterable

from actors.fleet import PENDING, LiveGroup
from placement.errors import PlacementError
from placement.initial import place_at_start
from placement.types import GroupSpec
from raymoe.budget import fleet_of
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig

_MAX_START_FAILURES = 3  # deaths or failed loads of a group before it ever served: give up
_ADOPT_S = 5.0  # a restarted controller waits so long for groups that do not answer


def may_place(
    config: DeploymentConfig, spec: ModelSpec, groups: Iterable[LiveGroup], waited_s: float
) -> bool:
    """All groups are up, or those that are not are not waited for: they do not answer a restarted
    controller, or get no resources, or die again and again, while the others can hold every expert.
    """
    wanted = [g for g in groups if not g.draining]
    if wanted and all(g.up for g in wanted):
        return True
    if any(g.resident.any() for g in wanted):
        # One that runs may take long to answer, its cores being busy; a table without it would
        # have clients close their links to it.
        runs = any(g.was_up and not g.up and not g.deaths for g in wanted)
        return waited_s > (config.placement.unreachable_s if runs else _ADOPT_S)
    up = tuple(spec_of(g) for g in wanted if g.up)
    hopeless = all(g.up or g.state == PENDING or g.deaths >= _MAX_START_FAILURES for g in wanted)
    if not up or not hopeless or waited_s < config.placement.pending_s:
        return False
    try:
        place_at_start(fleet_of(config, spec, up))
    except PlacementError:
        return False  # too small without the others
    return True


def failing(groups: Iterable[LiveGroup]) -> str | None:
    """Why a start has failed, when a group dies or cannot load again and again."""
    for group in groups:
        if max(group.deaths, group.load_failures) >= _MAX_START_FAILURES:
            return f"expert group {group.id} does not start: {group.last_error}"
    return None


def spec_of(group: LiveGroup) -> GroupSpec:
    """What is known of a group before it was measured."""
    return GroupSpec(
        id=group.id, node=group.node or "?", memory_bytes=group.memory_bytes, kind=group.kind.kind
    )
