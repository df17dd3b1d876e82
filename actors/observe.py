"""Groups as they are known -> what the reconciler sees. Reads, decides nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace

import numpy as np

from actors.fleet import LOST, STARTING, LiveGroup
from actors.intent import Intent
from actors.speeds import Measured
from placement.actions import Snapshot
from placement.table import Table
from placement.types import Fleet, Floats, GroupSpec
from raymoe.budget import fleet_of
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig

_SAME_SPEED = 0.25  # speeds measured at start this close to the fastest's are taken for equal


def give_up(groups: Iterable[LiveGroup], patience_s: float, now: float) -> float:
    """Marks those that have been away for longer: plans do without them until they are up.

    Returns when the next of those that were up will have been away so long; inf: none.
    """
    next_s = math.inf
    for group in groups:
        until_s = math.inf if group.gone_since_s is None else group.gone_since_s + patience_s
        group.given_up = not group.up and (group.given_up or now >= until_s)
        if group.was_up and not group.up and not group.given_up:
            next_s = min(next_s, until_s)
    return next_s


def counted(groups: Iterable[LiveGroup]) -> list[LiveGroup]:
    """Groups that are part of the fleet: those that are up, and those that were and have not been
    given up."""
    return [
        group
        for group in groups
        if group.up
        or (
            group.was_up
            and not group.draining
            and group.state in (LOST, STARTING)
            and group.gone_since_s is not None
            and not group.given_up
        )
    ]


def self_measured(groups: Iterable[LiveGroup]) -> None:
    """Relative speeds from what each group measured when it started: before there is traffic."""
    up = [group for group in groups if group.up]
    fastest = max((group.pairs_per_s for group in up), default=0.0)
    for group in up:
        ratio = group.pairs_per_s / fastest if fastest > 0 else 1.0
        group.speed = 1.0 if ratio >= 1 - _SAME_SPEED else ratio


def live_fleet(
    config: DeploymentConfig,
    spec: ModelSpec,
    groups: Iterable[LiveGroup],
    measured: Mapping[str, Measured],
    tokens_per_s: float | None,
) -> Fleet:
    """The groups with their speeds: measured in traffic where known, else at start, all alike
    when the objective is to spread tokens. `tokens_per_s`: pairs/s of the fastest, if known.

    Fixed costs and costs by expert are part of the speed here; only routers, which see each batch,
    tell them apart (`actors.publisher`).
    """
    place = config.placement
    groups, specs = list(groups), []
    known = next((g for g in groups if g.id in measured and g.pairs_per_s > 0), None)
    for group in groups:
        told = measured.get(group.id)
        if told is not None:
            group.speed = told.speed
        elif known is not None and group.pairs_per_s > 0:  # of a kind without traffic so far
            group.speed = measured[known.id].speed * group.pairs_per_s / known.pairs_per_s
        specs.append(
            GroupSpec(
                id=group.id,
                node=group.node or "unknown",
                memory_bytes=group.memory_bytes,
                speed=group.speed if place.objective == "time" else 1.0,
                bandwidth_bytes_per_s=place.copy_bytes_per_s or 1e9,
                kind=group.kind.kind,
            )
        )
    fleet = fleet_of(config, spec, tuple(specs))
    return fleet if tokens_per_s is None else replace(fleet, tokens_per_s=tokens_per_s)


def snapshot_of(
    fleet: Fleet,
    groups: list[LiveGroup],
    starting: tuple[GroupSpec, ...],
    pending: frozenset[str],
    *,
    table: Table | None,
    drained: int,
    counts: Floats | None,
    window_s: float,
    queue_s: float,
    intent: Intent,
    nodes_leaving: Set[str],
) -> Snapshot:
    """`groups` in the order of `fleet`; arrays are copies, so that callbacks may go on writing."""
    return Snapshot(
        fleet=fleet,
        ready=np.stack([group.resident for group in groups], axis=2),
        loading=np.stack([group.loading for group in groups], axis=2),
        table=table,
        drained=drained,
        draining=frozenset(group.id for group in groups if group.draining),
        away=frozenset(group.id for group in groups if not group.up),
        leaving=frozenset(group.id for group in groups if group.node in nodes_leaving),
        pinned=intent.cells(keep=True),
        barred=intent.cells(keep=False),
        counts=counts,
        window_s=window_s,
        starting=starting,
        pending=pending,
        busy=max((group.busy for group in groups if group.up and not group.draining), default=0.0),
        used=_used(fleet, groups),
        queue_s=queue_s,
    )


def _used(fleet: Fleet, groups: Iterable[LiveGroup]) -> float:
    """What part of all that the groups with experts could do they do."""
    shares = [
        (float(rate), group.busy)
        for rate, group in zip(fleet.pair_rate, groups, strict=True)
        if group.up and not group.draining and group.resident.any()
    ]
    total = sum(rate for rate, _ in shares)
    return sum(rate * busy for rate, busy in shares) / total if shares else 0.0
