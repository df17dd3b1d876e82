"""Actions of the reconciler -> what groups are asked. Knows no Ray: groups are behind `Groups`.

Level-triggered like the reconciler: what cannot be done now (a group that is busy) is left, and
is asked for again. A copy that fails is tried from another replica, then from the checkpoint; only
when that fails too the reconciler hears of it and waits before it asks again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from placement.actions import Action, Drop, Load, Snapshot
from placement.failing import Cell

Pairs = list[tuple[int, int]]  # (layer, expert)
Failed = list[tuple[int, int, str]]  # (layer, expert, why)
_MOST_AT_ONCE = 32  # replicas in one call


class Groups(Protocol):
    """The living groups, as far as an executor needs them (`actors.hands.Hands`)."""

    def can_bring(self, group_id: str) -> bool: ...
    def can_drop(self, group_id: str) -> bool: ...
    def can_give(self, group_id: str) -> bool: ...
    def bring(
        self,
        group_id: str,
        pairs: Pairs,
        source: str | None,
        limit_bytes_per_s: float | None,
        done: Callable[[Pairs, Failed], None],
    ) -> None: ...
    def drop(self, group_id: str, pairs: Pairs) -> None: ...


class Outcome(Protocol):
    """Who wants to know how loads end: a `Converger`."""

    def load_done(self, cell: Cell) -> None: ...
    def load_failed(self, cell: Cell, now: float) -> None: ...


@dataclass(kw_only=True)
class CopyStats:
    """Totals of what was moved, and how it went."""

    copied: int = 0  # replicas from another group
    loaded: int = 0  # replicas from the checkpoint
    copied_bytes: int = 0
    loaded_bytes: int = 0
    copy_s: float = 0.0  # sum over calls
    dropped: int = 0
    failed: int = 0
    last_error: str = ""


class Executor:
    """Carries out Load and Drop; Publish, Retire and the rest are the controller's."""

    def __init__(
        self,
        groups: Groups,
        outcome: Outcome,
        clock: Callable[[], float],
        *,
        limit_bytes_per_s: float | None,
        noted: Callable[[Cell, str], None] = lambda cell, why: None,
    ) -> None:
        """`noted(cell, why)` hears of every replica asked for."""
        self._groups, self._outcome, self._clock = groups, outcome, clock
        self._limit = limit_bytes_per_s
        self._noted = noted
        self._avoid: dict[Cell, set[str]] = {}  # sources a copy has failed from
        self.stats = CopyStats()

    def execute(self, actions: Sequence[Action], snapshot: Snapshot) -> None:
        """Start what can be started now."""
        self._load([a for a in actions if isinstance(a, Load)], snapshot)
        drops: dict[str, Pairs] = {}
        for action in actions:
            if isinstance(action, Drop):
                drops.setdefault(action.group, []).append((action.layer, action.expert))
        for group_id, pairs in drops.items():
            if self._groups.can_drop(group_id):
                self.stats.dropped += len(pairs)
                self._groups.drop(group_id, pairs)

    def _load(self, loads: Sequence[Load], snapshot: Snapshot) -> None:
        """One call a group: the first load's source, and all others that come from there too."""
        batches: dict[str, list[Load]] = {}
        for load in loads:
            batches.setdefault(load.group, []).append(load)
        for group_id, wanted in batches.items():
            if not self._groups.can_bring(group_id):
                continue
            sources = [self.source_of(load, snapshot) for load in wanted]
            together = [
                load for load, source in zip(wanted, sources, strict=True) if source == sources[0]
            ][:_MOST_AT_ONCE]
            self._bring(group_id, together, sources[0], snapshot)

    def source_of(self, load: Load, snapshot: Snapshot) -> str | None:
        """Where to copy from: the source asked for, another replica when that has failed before,
        or None: the checkpoint."""
        if load.source is None:
            return None
        bad = self._avoid.get((load.layer, load.expert, load.group), set())
        ids = snapshot.fleet.ids
        ready = [ids[g] for g in np.flatnonzero(snapshot.ready[load.layer, load.expert])]
        for source in (load.source, *ready):
            if source not in bad and source != load.group and self._groups.can_give(source):
                return source
        return None

    def _bring(
        self, group_id: str, loads: list[Load], source: str | None, snapshot: Snapshot
    ) -> None:
        started_s = self._clock()
        sizes = snapshot.fleet.expert_bytes
        # an expert nobody serves holds requests up, and a node that goes does not wait: as fast as
        # it goes
        pressing = snapshot.pressing
        urgent = any(pressing[load.layer, load.expert] for load in loads)
        for load in loads:
            self._noted((load.layer, load.expert, group_id), load.why)

        def done(ready: Pairs, failed: Failed) -> None:
            stats = self.stats
            stats.copy_s += self._clock() - started_s
            moved = sum(int(sizes[layer]) for layer, _ in ready)
            if source is None:
                stats.loaded += len(ready)
                stats.loaded_bytes += moved
            else:
                stats.copied += len(ready)
                stats.copied_bytes += moved
            for layer, expert, why in failed:
                stats.failed += 1
                stats.last_error = f"layer {layer} expert {expert} on {group_id}: {why}"
                self._failed((layer, expert, group_id), source)
            for layer, expert in ready:  # after what failed: the group is not one where all does
                self._avoid.pop((layer, expert, group_id), None)
                self._outcome.load_done((layer, expert, group_id))

        pairs = [(load.layer, load.expert) for load in loads]
        self._groups.bring(group_id, pairs, source, None if urgent else self._limit, done)

    def _failed(self, cell: Cell, source: str | None) -> None:
        if source is not None:
            self._avoid.setdefault(cell, set()).add(source)  # the next try comes from elsewhere
            return
        self._avoid.pop(cell, None)  # and after a pause from anywhere
        self._outcome.load_failed(cell, self._clock())
