"""What operators and the autoscaler want of the groups: which there are, which are to be emptied.

Plain data and pure functions; the controller keeps it in Ray's KV and carries it out. A refusal is
a ConfigError whose sentence says what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from raymoe.budget import group_ids, group_prefix
from raymoe.config import DeploymentConfig, GroupsConfig
from raymoe.errors import ConfigError

OPERATOR, SCALE, NODE = "operator", "scale", "node"


@dataclass(frozen=True, kw_only=True)
class Member:
    """One group there is to be.

    draining  why it is to be emptied: "operator" (it may come back), "scale" or "node" (it will
              not); "": it is not
    """

    id: str
    kind: str
    draining: str = ""


@dataclass(frozen=True, kw_only=True)
class Intent:
    """All groups of a deployment, in the order of all arrays."""

    members: tuple[Member, ...]

    @classmethod
    def of(cls, config: DeploymentConfig) -> Intent:
        """The groups as configured."""
        return cls(members=tuple(Member(id=i, kind=kind.kind) for i, kind in group_ids(config)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Intent:
        """What `to_dict` wrote."""
        return cls(members=tuple(Member(**member) for member in data["members"]))

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {"members": [vars(member) for member in self.members]}

    @property
    def draining(self) -> frozenset[str]:
        """Ids of the groups to be emptied."""
        return frozenset(m.id for m in self.members if m.draining)

    def member(self, group_id: str) -> Member:
        """The group of this id; raises ConfigError when there is none."""
        for member in self.members:
            if member.id == group_id:
                return member
        known = ", ".join(m.id for m in self.members)
        raise ConfigError(f"there is no group {group_id!r}; there are {known}")

    def active(self, kind: str) -> list[Member]:
        """Groups of a kind that are to serve."""
        return [m for m in self.members if m.kind == kind and not m.draining]

    def with_draining(self, group_id: str, why: str) -> Intent:
        """The same with a group draining for another reason, or for none ("")."""
        self.member(group_id)
        changed = (replace(m, draining=why) if m.id == group_id else m for m in self.members)
        return Intent(members=tuple(changed))

    def added(self, group_id: str, kind: str) -> Intent:
        """One more group; nothing when it is there already."""
        if any(m.id == group_id for m in self.members):
            return self
        return Intent(members=(*self.members, Member(id=group_id, kind=kind)))

    def retired(self, group_id: str) -> Intent:
        """A group has ended: forgotten, unless an operator may want it back."""
        if self.member(group_id).draining == OPERATOR:
            return self
        return Intent(members=tuple(m for m in self.members if m.id != group_id))


def kind_of(config: DeploymentConfig, name: str | None) -> GroupsConfig:
    """The kind of this name, the only one when None; raises ConfigError."""
    kinds = {kind.kind: kind for kind in config.groups}
    if name is None and len(kinds) == 1:
        return config.groups[0]
    if name not in kinds:
        asked = "say which kind of group" if name is None else f"there is no kind {name!r}"
        raise ConfigError(f"{asked}: choose one of {', '.join(sorted(kinds))}")
    return kinds[name]


def free_id(config: DeploymentConfig, intent: Intent, kind: str, used: Iterable[str] = ()) -> str:
    """The lowest id of a kind that no group has."""
    taken = {m.id for m in intent.members} | set(used)
    prefix, number = group_prefix(config, kind), 0
    while f"{prefix}{number}" in taken:
        number += 1
    return f"{prefix}{number}"


def scaled(
    config: DeploymentConfig,
    intent: Intent,
    count: int,
    kind_name: str | None,
    cheapest: Sequence[str],
) -> Intent:
    """So many groups of a kind are to serve.

    cheapest  ids, those that are given up first before those that are given up last
    """
    kind = kind_of(config, kind_name)
    least, most = kind.min_count, kind.max_count
    if count < least or (most is not None and count > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}"
        raise ConfigError(
            f"{count} groups of kind {kind.kind}: {bounds} are allowed (its settings)"
        )
    for member in intent.members:  # first those that were on their way out
        leaving = member.kind == kind.kind and member.draining == SCALE
        if leaving and len(intent.active(kind.kind)) < count:
            intent = intent.with_draining(member.id, "")
    while len(intent.active(kind.kind)) < count:
        intent = intent.added(free_id(config, intent, kind.kind), kind.kind)
    order = {group_id: at for at, group_id in enumerate(cheapest)}
    spare = sorted(intent.active(kind.kind), key=lambda m: order.get(m.id, -1))
    for member in spare[: len(spare) - count]:
        intent = intent.with_draining(member.id, SCALE)
    if not any(not m.draining for m in intent.members):
        raise ConfigError("no group would be left to serve: keep one, or stop the deployment")
    return intent


def drained(intent: Intent, group_id: str, undo: bool) -> Intent:
    """An operator wants a group empty, or back."""
    member = intent.member(group_id)
    if undo:
        if not member.draining:
            raise ConfigError(f"group {group_id} is not draining")
        return intent.with_draining(group_id, "")
    if all(m.draining or m.id == group_id for m in intent.members):
        raise ConfigError(f"group {group_id} is the last one that serves: add another first")
    return intent.with_draining(group_id, member.draining or OPERATOR)


def replaced(config: DeploymentConfig, intent: Intent, group_id: str) -> Intent:
    """A group's node is about to go: another of its kind comes, then it leaves for good."""
    member = intent.member(group_id)
    if member.draining:
        return intent
    more = intent.added(free_id(config, intent, member.kind), member.kind)
    return more.with_draining(group_id, NODE)
