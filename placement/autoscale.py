"""How many groups of which kind: a target with patience; and whom to retire at what cost.

How busy the groups are is measured or, where nothing is (a simulation), estimated: pairs/s of all
layers over pairs/s of all groups, divided by the balancedness the placement reaches. Groups are
added by what part of all that the groups could do they do: one group that is slow, or has more than
its part, calls for a better placement, which is on its way. Only when the busiest stays so for long
a group is added for it, and no second one unless the first has helped. They are retired by how busy
the busiest is: to retire one would not help it. A latency objective adds groups when the groups'
queueing exceeds it. Scaling in must leave a fleet that still holds one replica of each expert and
survives what it must. Kinds are chosen by their speed as it was measured, for their price.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from placement.errors import PlacementError
from placement.survive import shortfall
from placement.types import Bools, Fleet, Floats, GroupSpec, Placement, check_load

_HELPED = 0.9  # a group added for the busiest has helped when that has fallen below this part
_ONE_MORE = 1.0 + 1e-6  # by how much the rate is to grow when one group is wanted, of any size


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of group that can be had.

    speed  relative to the fleet's `tokens_per_s`, for as long as none was measured
    """

    name: str
    speed: float
    memory_bytes: int
    price: float = 1.0  # per hour, in any currency
    least: int = 0  # scaling in leaves so many
    most: int = 1_000  # how many may run at once
    bandwidth_bytes_per_s: float = 1e9
    alpha_s: float = 0.0
    gamma_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.speed > 0 and self.price > 0 and self.memory_bytes > 0):
            raise PlacementError(
                f"kind {self.name}: speed, price and memory_bytes must be positive"
            )


@dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """Targets and patience.

    target        utilisation to aim at; above `high` for `up_after_s` grows, below `low` for
                  `down_after_s` shrinks
    uneven_s      the busiest group alone above `high` for so long: one more group
    queue_s       latency objective: the seconds a dispatch may wait in a group; None: none
    cool_down_s   least time between two decisions
    """

    target: float = 0.6
    high: float = 0.8
    low: float = 0.4
    queue_s: float | None = None
    up_after_s: float = 10.0
    uneven_s: float = 60.0
    down_after_s: float = 120.0
    cool_down_s: float = 60.0
    least: int = 1
    most: int = 1_000

    def __post_init__(self) -> None:
        if not 0 < self.low < self.target < self.high:
            raise PlacementError("autoscale needs 0 < low < target < high")
        if not 1 <= self.least <= self.most:
            raise PlacementError("autoscale needs 1 <= least <= most")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do now: groups to add by kind, groups to drain, and the reason in numbers."""

    add: tuple[tuple[str, int], ...] = ()
    retire: tuple[str, ...] = ()
    utilisation: float = 0.0
    why: str = ""


class Autoscaler:
    """Feed it observations; it answers with a Decision (often: nothing)."""

    def __init__(self, config: ScaleConfig, kinds: tuple[Kind, ...]) -> None:
        if not kinds:
            raise PlacementError("autoscale needs at least one kind of group to add")
        self.config, self.kinds = config, kinds
        self._high_since: float | None = None
        self._low_since: float | None = None
        self._uneven_since: float | None = None
        self._uneven_busy = math.inf  # the busiest when one was last added for it
        self._rates: dict[str, float] = {}  # pairs/s of a group of a kind, as last measured
        self._acted_s = -math.inf

    def learn(self, fleet: Fleet, away: frozenset[str] = frozenset()) -> None:
        """How fast groups of each kind are: the median of those that are there."""
        for kind in self.kinds:
            of_kind = [g.kind == kind.name and g.id not in away for g in fleet.groups]
            if any(of_kind):
                self._rates[kind.name] = float(np.median(fleet.pair_rate[of_kind]))

    def speed_of(self, kind: Kind, fleet: Fleet) -> float:
        """As measured, also when none is there any more; as declared when none ever was."""
        rate = self._rates.get(kind.name)
        return kind.speed if rate is None else rate / fleet.tokens_per_s

    def step(
        self,
        fleet: Fleet,
        load: Floats,
        placement: Placement,
        now: float,
        *,
        balancedness: float = 1.0,
        queue_s: float = 0.0,
        draining: frozenset[str] = frozenset(),
        measured: float | None = None,
        used: float | None = None,
        coming: frozenset[str] = frozenset(),
        pending: frozenset[str] = frozenset(),
    ) -> Decision:
        """load float64 [L, E] pairs/s; queue_s: the waiting time observed (say its p95).

        measured  part of its time, 0..1, that the busiest group computes; None: to be estimated
        used      part, 0..1, of what the serving groups could do that they do; None: as `measured`
        coming    ids that do not serve yet: they count as capacity when groups are to be added,
                  and nothing is retired until they have come and `down_after_s` has passed
        pending   those of `coming` that get no place: not waited for, and the first to go

        `fleet` may list groups that still start, after those that `placement` knows.
        """
        config = self.config
        load = check_load(load, fleet.layers)
        alive = np.array([g not in draining for g in fleet.ids])
        rate = float(fleet.pair_rate[alive].sum())
        if measured is None:
            busy = used = float(load.sum()) / max(rate * max(balancedness, 0.05), 1e-300)
        else:  # what the serving groups do, once those that come take their part of it
            serving = alive & np.array([g not in coming for g in fleet.ids])
            part = float(fleet.pair_rate[serving].sum()) / max(rate, 1e-300)
            busy, used = measured * part, (measured if used is None else used) * part
        late = config.queue_s is not None and queue_s > config.queue_s
        missing, _ = shortfall(fleet, fleet.present(load.shape[1]), alive)
        self._high_since = self._since(self._high_since, used > config.high or late, now)
        uneven = busy > config.high >= used
        self._uneven_since = self._since(self._uneven_since, uneven, now)
        if busy < config.target:
            self._uneven_busy = math.inf
        living = {g for g, lives in zip(fleet.ids, alive, strict=True) if lives}
        relaxed = busy < config.low and not late and not living & (coming - pending)
        self._low_since = self._since(self._low_since, relaxed, now)
        if missing:
            return self._grow(fleet, alive, used, max(used, 1e-9), now, f"{missing} bytes missing")
        if now - self._acted_s < config.cool_down_s:
            return Decision(utilisation=busy, why="cooling down")
        if self._high_since is not None and now - self._high_since >= config.up_after_s:
            factor = max(used / config.target, 1.25 if late else 1.0)
            why = f"queueing {queue_s:.3g} s > {config.queue_s:.3g} s" if late else "busy"
            return self._grow(fleet, alive, used, factor, now, why)
        if self._uneven_since is not None and now - self._uneven_since >= config.uneven_s:
            self._uneven_since = None
            if busy > _HELPED * self._uneven_busy:
                return Decision(utilisation=used, why="uneven, and another group did not help")
            self._uneven_busy = busy
            why = f"the busiest group stays at {busy:.2f}"
            return self._grow(fleet, alive, used, _ONE_MORE, now, why)
        if self._low_since is not None and now - self._low_since >= config.down_after_s:
            return self._shrink(fleet, load, placement, alive, busy, now, pending)
        return Decision(utilisation=busy, why="within the band")

    @staticmethod
    def _since(since: float | None, true: bool, now: float) -> float | None:
        if not true:
            return None
        return now if since is None else since

    def _grow(
        self, fleet: Fleet, alive: Bools, busy: float, factor: float, now: float, why: str
    ) -> Decision:
        """Add the kinds with the most speed per price until the rate is `factor` times today's."""
        rate = float(fleet.pair_rate[alive].sum())
        wanted = rate * max(factor, 1.0)
        room = self.config.most - int(alive.sum())
        running = {k.name: sum(g.kind == k.name for g in fleet.groups) for k in self.kinds}
        add: dict[str, int] = {}
        grown = fleet
        speed = {k.name: self.speed_of(k, fleet) for k in self.kinds}
        ranked = sorted(self.kinds, key=lambda k: (-speed[k.name] / k.price, k.name))
        while room > 0:
            mask = np.concatenate([alive, np.ones(len(grown.groups) - len(alive), np.bool_)])
            experts = None if fleet.experts_of_layer else 1
            fits = not experts and not shortfall(grown, grown.present(), mask)[0]
            if rate >= wanted - 1e-9 and (fits or (experts and add)):
                break
            kind = next((k for k in ranked if running[k.name] < k.most), None)
            if kind is None:
                why += "; no kind has groups left"
                break
            add[kind.name] = add.get(kind.name, 0) + 1
            running[kind.name] += 1
            rate += speed[kind.name] * fleet.tokens_per_s
            room -= 1
            more = group_of(kind, f"new-{kind.name}-{len(grown.groups)}")
            grown = replace(grown, groups=(*grown.groups, more))
        if not add:
            return Decision(utilisation=busy, why=f"{why}; at the most groups allowed")
        self._acted_s = now
        named = ", ".join(f"{n} x {name}" for name, n in sorted(add.items()))
        return Decision(
            add=tuple(sorted(add.items())),
            utilisation=busy,
            why=f"{why}: utilisation {busy:.2f} (target {self.config.target}); add {named}",
        )

    def _shrink(
        self,
        fleet: Fleet,
        load: Floats,
        placement: Placement,
        alive: Bools,
        busy: float,
        now: float,
        pending: frozenset[str],
    ) -> Decision:
        """Retire the group that frees the most price for the fewest bytes to move, if all fits;
        before all others one that gets no place, and so holds nothing."""
        if int(alive.sum()) <= self.config.least:
            return Decision(utilisation=busy, why="at the fewest groups allowed")
        price = {k.name: k.price for k in self.kinds}
        best: tuple[float, str, str] | None = None
        total = float(fleet.pair_rate[alive].sum())
        kinds = [group.kind for group in fleet.groups]
        least = {k.name: k.least for k in self.kinds}
        for g in np.flatnonzero(alive).tolist():
            known = g < placement.resident.shape[2]
            if not known and fleet.ids[g] not in pending:
                continue  # it still starts
            if sum(alive[i] and k == kinds[g] for i, k in enumerate(kinds)) <= least.get(
                kinds[g], 0
            ):
                continue
            left = total - float(fleet.pair_rate[g])
            after = busy * total / max(left, 1e-300)
            rest = alive.copy()
            rest[g] = False
            if left <= 0 or after > self.config.target or not _fits(fleet, load, rest):
                continue
            moved = moving_bytes(fleet, placement, g) if known else -1
            cost = (moved + 1.0) / price.get(fleet.groups[g].kind, 1.0)
            text = "it gets no place"
            if known:
                loading_s = moved / fleet.bandwidth[rest].sum()
                text = f"{moved} bytes to move, {loading_s:.3g} s of loading"
            if best is None or (cost, fleet.ids[g]) < (best[0], best[1]):
                best = cost, fleet.ids[g], f"{text}, utilisation {busy:.2f} -> {after:.2f}"
        if best is None:
            return Decision(utilisation=busy, why="no group can go: bytes, survival or the target")
        self._acted_s = now
        return Decision(retire=(best[1],), utilisation=busy, why=f"retire {best[1]}: {best[2]}")


def fleet_for(
    fleet: Fleet, load: Floats, config: ScaleConfig, kinds: tuple[Kind, ...], balancedness: float
) -> Fleet:
    """`fleet` and as many groups more as this load, pairs/s [L, E], needs to be at the target."""
    eager = replace(config, high=config.target * (1 + 1e-9), up_after_s=0.0, queue_s=None)
    layers, experts = load.shape
    nowhere = np.zeros((layers, experts, len(fleet.groups)))
    placement = Placement(resident=nowhere > 0, share=nowhere)
    found = Autoscaler(eager, kinds).step(fleet, load, placement, 0.0, balancedness=balancedness)
    known = {kind.name: kind for kind in kinds}
    more = [
        group_of(known[name], f"peak-{name}-{i}") for name, count in found.add for i in range(count)
    ]
    return replace(fleet, groups=(*fleet.groups, *more))


def group_of(kind: Kind, group: str) -> GroupSpec:
    """A group of this kind, on a node of its own."""
    return GroupSpec(
        id=group,
        node=f"node of {group}",
        kind=kind.name,
        speed=kind.speed,
        memory_bytes=kind.memory_bytes,
        bandwidth_bytes_per_s=kind.bandwidth_bytes_per_s,
        alpha_s=kind.alpha_s,
        gamma_s=kind.gamma_s,
    )


def _fits(fleet: Fleet, load: Floats, alive: Bools) -> bool:
    """One replica of each expert fits the groups alive, and survives what it must."""
    present = fleet.present(load.shape[1])
    needed = int((present.sum(1) * fleet.expert_bytes).sum())
    if needed > int(fleet.budget_bytes[alive].sum()):
        return False
    return shortfall(fleet, present, alive)[0] == 0


def moving_bytes(fleet: Fleet, placement: Placement, group: int) -> int:
    """Bytes that must be loaded elsewhere before the group may go: its only replicas."""
    only = placement.resident[:, :, group] & (placement.copies() == 1)
    return int((only.sum(1) * fleet.expert_bytes).sum())
