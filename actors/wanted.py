"""Which groups there are to be: operator intent, kept durably and carried out by the keeper."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from actors.fleet import DRAINED
from actors.intent import SCALE, Intent, kind_of, replaced
from actors.keeper import GroupKeeper
from actors.memory import Memory
from placement.actions import Action, Drain, Retire, Spawn
from placement.initial import place_at_start
from placement.types import GroupSpec
from raymoe.budget import fleet_of, memory_bytes
from raymoe.checkpoint.spec import ModelSpec
from raymoe.config import DeploymentConfig


class Wanted:
    """The intent, and what follows from it. `changed()` hears of every change."""

    def __init__(
        self,
        config: DeploymentConfig,
        spec: ModelSpec,
        memory: Memory,
        keeper: GroupKeeper,
        changed: Callable[[], None],
    ) -> None:
        self._config, self._spec, self._memory = config, spec, memory
        self._keeper, self._changed = keeper, changed
        self.intent = _stored(config, memory)

    def want(self, intent: Intent) -> None:
        """From now on these groups, durably. Raises, and nothing has changed, when that cannot be
        kept (Ray's head is away)."""
        if intent != self.intent:
            self._memory.keep_intent(_to_store(self._config, intent))
            self.intent = intent
            self._keeper.follow(intent)
            self._changed()

    def ask(self, change: Callable[[Intent], Intent]) -> Intent:
        """What an operator asks for. Raises ConfigError, or PlacementError (with the bytes) when
        one of each expert does not fit the groups that would stay; then nothing has changed.

        Groups that are lost or pending count: they are expected. What needs them waits until they
        are there, and `ControlLoop.problem` says so."""
        intent = change(self.intent)
        budget = memory_bytes(self._config, self._spec)
        staying = tuple(
            GroupSpec(id=m.id, node="?", memory_bytes=budget[m.kind])
            for m in intent.members
            if not m.draining
        )
        place_at_start(fleet_of(self._config, self._spec, staying))
        self.want(intent)
        return self.intent

    def cheapest_to_give_up(self) -> Sequence[str]:
        """Ids: first groups that do not run, then those that hold the fewest bytes that nobody
        else holds; the youngest first among equals."""
        groups = list(self._keeper.groups.values())
        copies = np.sum([g.resident for g in groups], axis=0)
        sizes = np.array(self._spec.expert_bytes)
        order = [
            (g.up, int(((g.resident & (copies == 1)).sum(1) * sizes).sum()), -at, g.id)
            for at, g in enumerate(groups)
        ]
        return [group_id for *_, group_id in sorted(order)]

    def act(self, action: Action) -> None:
        """The reconciler's word on groups: one is empty, one more is needed, one is to go."""
        if isinstance(action, Retire):
            self._keeper.end(action.group)
            self.want(self.intent.retired(action.group))
        elif isinstance(action, Spawn):
            most = kind_of(self._config, action.kind).max_count
            if most is None or len(self.intent.active(action.kind)) < most:
                self.want(self.intent.added(action.group, action.kind))
        elif isinstance(action, Drain):
            member = self.intent.member(action.group)
            least = kind_of(self._config, member.kind).min_count
            if not member.draining and len(self.intent.active(member.kind)) > least:
                self.want(self.intent.with_draining(action.group, SCALE))

    def end_what_never_came(self) -> None:
        """Groups to be emptied that do not run hold nothing: they end, and are forgotten."""
        for member in self.intent.members:
            group = self._keeper.groups.get(member.id)
            if not member.draining or group is None or group.up:
                continue
            if group.state != DRAINED:
                self._keeper.end(member.id)
            self.want(self.intent.retired(member.id))

    def leave_nodes(self, leaving: set[str]) -> list[str]:
        """Groups on nodes that are about to go are replaced; their ids."""
        ids = [
            g.id
            for g in self._keeper.groups.values()
            if g.up and g.node in leaving and not g.draining
        ]
        for group_id in ids:
            self.want(replaced(self._config, self.intent, group_id))
        return ids


def _to_store(config: DeploymentConfig, intent: Intent) -> dict[str, object]:
    return {**intent.to_dict(), "configured": {k.kind: k.count for k in config.groups}}


def _stored(config: DeploymentConfig, memory: Memory) -> Intent:
    """What an earlier controller of this deployment, so configured, was asked for."""
    stored = memory.intent()
    asked = Intent.of(config)
    if stored is None or stored["configured"] != _to_store(config, asked)["configured"]:
        return asked
    return Intent.from_dict(stored)
