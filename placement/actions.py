"""What the reconciler sees and asks for. Plain data; every action can be repeated safely."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.errors import PlacementError
from placement.table import Table
from placement.types import Bools, Fleet, Floats, GroupSpec


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """What is true now. All arrays in the order of `fleet.groups`, which are the living groups.

    ready      bool [L, E, G], loaded and checked
    loading    bool [L, E, G], asked for and under way
    table      the table published last, None before the first
    drained    no client uses a table older than this epoch any more
    draining   ids of groups that shall be emptied
    away       ids of groups that cannot be asked anything now but are expected back: they keep
               their part of the plan, and nothing is asked of them
    leaving    ids of groups that will soon be gone, whatever is still on them (their node goes)
    pinned     replicas (layer, expert, group id) that operators want there, whatever they gain
    barred     replicas that operators do not want there while another one serves
    counts     float64 [L, E], tokens since the last snapshot; None: not measured
    window_s   seconds in which `counts` were counted
    starting   groups asked for that do not live yet
    pending    ids of those of `starting` for which there is no place now
    busy       part of its time, 0..1, that the busiest group computes; None: not measured
    used       part, 0..1, of what all groups that serve could do that they do; None: not measured
    queue_s    how long dispatches wait in the groups (say the 95th percentile); 0: not measured
    """

    fleet: Fleet
    ready: Bools
    loading: Bools
    table: Table | None = None
    drained: int = 0
    draining: frozenset[str] = frozenset()
    away: frozenset[str] = frozenset()
    leaving: frozenset[str] = frozenset()
    pinned: frozenset[tuple[int, int, str]] = frozenset()
    barred: frozenset[tuple[int, int, str]] = frozenset()
    counts: Floats | None = None
    window_s: float = 0.0
    starting: tuple[GroupSpec, ...] = ()
    pending: frozenset[str] = frozenset()
    busy: float | None = None
    used: float | None = None
    queue_s: float = 0.0

    def __post_init__(self) -> None:
        groups = len(self.fleet.groups)
        for name in ("ready", "loading"):
            array = getattr(self, name)
            if array.ndim != 3 or array.shape[2] != groups or array.dtype != np.bool_:
                raise PlacementError(f"snapshot.{name} must be bool [layers, experts, {groups}]")
        if self.ready.shape != self.loading.shape:
            raise PlacementError("snapshot.ready and snapshot.loading differ in shape")

    @property
    def pressing(self) -> Bools:
        """Experts [L, E] that nobody serves, or will soon when groups that are leaving are gone."""
        staying = np.array([group not in self.leaving for group in self.fleet.ids])
        pressing: Bools = (self.ready & staying).sum(2) == 0
        return pressing


@dataclass(frozen=True, kw_only=True)
class Load:
    """Load a replica; from `source` (a ready peer) or, when that is None, the checkpoint."""

    layer: int
    expert: int
    group: str
    source: str | None
    why: str


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Free a replica that no table in use lists."""

    layer: int
    expert: int
    group: str
    why: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Publish:
    """Make this the table; later actions wait until it is seen in the snapshot."""

    table: Table
    why: str


@dataclass(frozen=True, kw_only=True)
class Retire:
    """The drained group holds nothing any more and may end."""

    group: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Spawn:
    """Start a group of this kind under this id, unless it runs or starts already."""

    group: str
    kind: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Drain:
    """Empty this group: name it in `Snapshot.draining` from now on, until it is retired."""

    group: str
    why: str


Action = Load | Drop | Publish | Retire | Spawn | Drain
