"""A fleet that exists only in simulated time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from placement.actions import Action, Drain, Drop, Load, Publish, Retire, Snapshot, Spawn
from placement.autoscale import Kind, group_of
from placement.errors import PlacementError
from placement.table import Table
from placement.types import Bools, Fleet, Floats, GroupSpec


class FakeFleet:
    """Executes actions in simulated time."""

    def __init__(
        self,
        fleet: Fleet,
        layers: int,
        experts: int,
        kinds: tuple[Kind, ...] = (),
        start_s: float = 0.0,
    ) -> None:
        """kinds: what groups can be had; start_s: how long one takes from Spawn to life."""
        self.fleet = fleet
        self._kinds, self._start_s = {kind.name: kind for kind in kinds}, start_s
        self.starting: dict[str, tuple[GroupSpec, float]] = {}  # and when it lives
        self.queue_s = 0.0
        self.now = 0.0
        self.group_s = 0.0  # seconds of groups, from Spawn to their end
        self.price_s = 0.0  # the same, weighted by the kinds' prices
        shape = (layers, experts, len(fleet.groups))
        self.ready: Bools = np.zeros(shape, np.bool_)
        self.loading: Bools = np.zeros(shape, np.bool_)
        self.ends: dict[tuple[int, int, str], float] = {}
        self.free_at: dict[str, float] = dict.fromkeys(fleet.ids, 0.0)
        self.table: Table | None = None
        self.draining: frozenset[str] = frozenset()
        self.loaded_bytes = 0
        self.loading_s: dict[str, float] = {}

    def snapshot(self, counts: Floats | None = None, window_s: float = 0.0) -> Snapshot:
        drained = self.table.epoch if self.table else 0
        return Snapshot(
            fleet=self.fleet,
            ready=self.ready.copy(),
            loading=self.loading.copy(),
            table=self.table,
            drained=drained,
            draining=self.draining,
            counts=counts,
            window_s=window_s,
            starting=tuple(spec for spec, _ in self.starting.values()),
            queue_s=self.queue_s,
        )

    def execute(self, actions: list[Action], now: float) -> None:
        index = {group: g for g, group in enumerate(self.fleet.ids)}
        for action in actions:
            if isinstance(action, Publish):
                self.table = action.table
            elif isinstance(action, Load):
                self._load(action, index[action.group], now)
            elif isinstance(action, Drop):
                self.ready[action.layer, action.expert, index[action.group]] = False
            elif isinstance(action, Drain):
                self.draining = self.draining | {action.group}
            elif isinstance(action, Spawn):
                if action.group not in self.starting and action.group not in self.fleet.ids:
                    spec = group_of(self._kinds[action.kind], action.group)
                    self.starting[action.group] = spec, now + self._start_s
            elif isinstance(action, Retire):
                self.lose(action.group)
                index = {group: g for g, group in enumerate(self.fleet.ids)}

    def _load(self, action: Load, group: int, now: float) -> None:
        cell = (action.layer, action.expert, action.group)
        if self.ready[action.layer, action.expert, group] or cell in self.ends:
            return
        size = int(self.fleet.expert_bytes[action.layer])
        seconds = size / float(self.fleet.bandwidth[group])
        start = max(now, self.free_at[action.group])
        self.free_at[action.group] = self.ends[cell] = start + seconds
        self.loading[action.layer, action.expert, group] = True
        self.loaded_bytes += size
        self.loading_s[action.group] = self.loading_s.get(action.group, 0.0) + seconds

    def advance(self, now: float) -> None:
        """Finish the loads and starts due by now; the clock only goes on."""
        if np.isfinite(now) and now > self.now:
            paid = [*self.fleet.groups, *(spec for spec, _ in self.starting.values())]
            self.group_s += (now - self.now) * len(paid)
            prices = [self._kinds[g.kind].price if g.kind in self._kinds else 1.0 for g in paid]
            self.price_s += (now - self.now) * sum(prices)
            self.now = now
        for group in [g for g, (_, end) in self.starting.items() if end <= now]:
            self.join(self.starting.pop(group)[0])
        index = {group: g for g, group in enumerate(self.fleet.ids)}
        for cell in [c for c, end in self.ends.items() if end <= now]:
            del self.ends[cell]
            layer, expert, group = cell
            self.loading[layer, expert, index[group]] = False
            self.ready[layer, expert, index[group]] = True

    def restart_clock(self) -> None:
        """Time is 0 again, and nothing has been paid for or loaded yet."""
        self.now = self.group_s = self.price_s = 0.0
        self.free_at = dict.fromkeys(self.free_at, 0.0)
        self.loaded_bytes, self.loading_s = 0, {}

    def next_end(self) -> float | None:
        """When the next load or start ends."""
        starts = [end for _, end in self.starting.values()]
        return min([*self.ends.values(), *starts], default=None)

    def lose(self, group: str) -> None:
        at = self.fleet.ids.index(group)
        keep = [g for g in range(len(self.fleet.groups)) if g != at]
        if not keep:
            raise PlacementError("the last group of the fleet was lost")
        self.fleet = replace(self.fleet, groups=tuple(self.fleet.groups[g] for g in keep))
        self.ready, self.loading = self.ready[:, :, keep], self.loading[:, :, keep]
        self.ends = {c: end for c, end in self.ends.items() if c[2] != group}
        self.draining = self.draining - {group}

    def slow(self, group: str, factor: float) -> None:
        specs = tuple(
            replace(g, speed=g.speed * factor) if g.id == group else g for g in self.fleet.groups
        )
        self.fleet = replace(self.fleet, groups=specs)

    def join(self, spec: GroupSpec) -> None:
        self.fleet = replace(self.fleet, groups=(*self.fleet.groups, spec))
        layers, experts, _ = self.ready.shape
        column = np.zeros((layers, experts, 1), np.bool_)
        self.ready = np.concatenate([self.ready, column], 2)
        self.loading = np.concatenate([self.loading, column], 2)
        self.free_at[spec.id] = 0.0
