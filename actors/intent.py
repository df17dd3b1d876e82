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
class Pin:
    """A replica that must be on a group (`keep`), or must not while another one serves."""

    layer: int
    expert: int
    group: str
    keep: bool


@dataclass(frozen=True, kw_only=True)
class Intent:
    """All groups of a deployment, in the order of all arrays; and what operators have fixed."""

    members: tuple[Member, ...]
    pins: tuple[Pin, ...] = ()

    @classmethod
    def of(cls, config: DeploymentConfig) -> Intent:
        """The groups as configured."""
        return cls(members=tuple(Member(id=i, kind=kind.kind) for i, kind in group_ids(config)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Intent:
        """What `to_dict` wrote."""
        return cls(
            members=tuple(Member(**member) for member in data["members"]),
            pins=tuple(Pin(**pin) for pin in data["pins"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {
            "members": [vars(member) for member in self.members],
            "pins": [vars(pin) for pin in self.pins],
        }

    def cells(self, keep: bool) -> frozenset[tuple[int, int, str]]:
        """Replicas that must be where they are said to be, or must not."""
        return frozenset((p.layer, p.expert, p.group) for p in self.pins if p.keep is keep)

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
        return replace(self, members=tuple(changed))

    def added(self, group_id: str, kind: str) -> Intent:
        """One more group; nothing when it is there already."""
        if any(m.id == group_id for m in self.members):
            return self
        return replace(self, members=(*self.members, Member(id=group_id, kind=kind)))

    def retired(self, group_id: str) -> Intent:
        """A group has ended: forgotten, unless an operator may want it back."""
        if self.member(group_id).draining == OPERATOR:
            return self
        return replace(
            self,
            members=tuple(m for m in self.members if m.id != group_id),
            pins=tuple(p for p in self.pins if p.group != group_id),
        )


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


def pinned(intent: Intent, pin: Pin, experts_of_layer: Sequence[int], undo: bool) -> Intent:
    """A replica is fixed where it is to be or not to be, in place of what was said of it before;
    with `undo` nothing is said of it any more."""
    intent.member(pin.group)
    if not 0 <= pin.layer < len(experts_of_layer):
        raise ConfigError(f"there is no MoE layer {pin.layer}: 0 to {len(experts_of_layer) - 1}")
    if not 0 <= pin.expert < experts_of_layer[pin.layer]:
        most = experts_of_layer[pin.layer] - 1
        raise ConfigError(f"layer {pin.layer} has no expert {pin.expert}: 0 to {most}")
    cell = (pin.layer, pin.expert, pin.group)
    others = tuple(p for p in intent.pins if (p.layer, p.expert, p.group) != cell)
    if undo and len(others) == len(intent.pins):
        raise ConfigError(f"nothing is fixed for layer {pin.layer} expert {pin.expert} there")
    return replace(intent, pins=others if undo else (*others, pin))


def replaced(config: DeploymentConfig, intent: Intent, group_id: str) -> Intent:
    """A group's node is about to go: another of its kind comes, then it leaves for good."""
    member = intent.member(group_id)
    if member.draining:
        return intent
    more = intent.added(free_id(config, intent, member.kind), member.kind)
    return more.with_draining(group_id, NODE)
