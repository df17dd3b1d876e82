"""A fleet before it is rented: the controller's own Reconciler on a fake fleet with a time model.

Windows of counts are played one after another. A batch of a layer ends when its slowest group
does (alpha + pairs / speed + gamma * active experts, per-batch split by the published table). Loads
take bytes / bandwidth in their group, one after another, and hold up `move_cost` of that time of
the group's work. Groups may be lost, drained or slowed on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.actions import Publish
from placement.autoscale import Autoscaler
from placement.converge import no_host
from placement.errors import PlacementError
from placement.fake import FakeFleet
from placement.reconcile import ReconcileConfig, Reconciler
from placement.split import TableSplit
from placement.types import Fleet, Floats, check_load

_LOOKS = 3  # snapshots before a window's load comes in: enough to believe a changed speed


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something happens to a group at the start of a window: "lose", "drain", "slow", "join"."""

    window: int
    kind: str
    group: str
    value: float = 1.0  # slow: the factor of its speed

    def __post_init__(self) -> None:
        if self.kind not in ("lose", "drain", "slow", "join"):
            raise PlacementError(f"event {self.kind!r} is not one of lose, drain, slow, join")


@dataclass(kw_only=True)
class Report:
    """What came out, window by window. Times in seconds."""

    ideal_s: list[float] = field(default_factory=list)  # all groups equally busy
    busy_s: list[float] = field(default_factory=list)  # the slowest groups, summed over layers
    stall_s: list[float] = field(default_factory=list)  # held up by loads
    missing: list[int] = field(default_factory=list)  # pairs whose expert had no ready replica
    loaded_bytes: list[int] = field(default_factory=list)
    replicas: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)  # living at the window's end
    behind_s: list[float] = field(default_factory=list)  # work not done by the window's end
    window_s: float = 0.0
    group_s: float = 0.0  # seconds of groups, those that start or drain included
    price_s: float = 0.0  # the same, each by its kind's price
    epochs: int = 0
    events: list[str] = field(default_factory=list)

    @property
    def balancedness(self) -> float:
        """Time-balancedness over all windows: 1 is no straggler, or no work."""
        busy = sum(self.busy_s)
        return float(sum(self.ideal_s) / busy) if busy > 0 else 1.0

    @property
    def net(self) -> float:
        """The same with the time that loads held up counted in."""
        busy = sum(self.busy_s) + sum(self.stall_s)
        return float(sum(self.ideal_s) / busy) if busy > 0 else 1.0

    @property
    def busiest(self) -> float:
        """The busiest window's work over its time: above 1 the fleet falls behind."""
        work = np.array(self.busy_s) + np.array(self.stall_s)
        return float(work.max(initial=0.0) / self.window_s) if self.window_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        busy = np.array(self.busy_s)
        per_window = np.where(busy > 0, self.ideal_s / np.maximum(busy, 1e-300), 1.0)
        return {
            "windows": len(self.busy_s),
            "balancedness": self.balancedness,
            "balancedness_net_of_stalls": self.net,
            "worst_window": float(per_window.min()) if len(per_window) else None,
            "loaded_bytes": int(sum(self.loaded_bytes)),
            "stall_s": float(sum(self.stall_s)),
            "unserved_pairs": int(sum(self.missing)),
            "epochs": self.epochs,
            "busiest_window": self.busiest,
            "behind_s": max(self.behind_s, default=0.0),
            "groups": list(self.groups),
            "group_s": self.group_s,
            "price_s": self.price_s,
            "per_window": per_window.tolist(),
        }


def simulate(
    counts: npt.ArrayLike,
    fleet: Fleet,
    config: ReconcileConfig | None = None,
    *,
    window_s: float = 60.0,
    batches: int = 1,
    events: tuple[Event, ...] = (),
    autoscaler: Autoscaler | None = None,
    start_s: float = 0.0,
) -> Report:
    """Play windows of counts [W, L, E] against a Reconciler on `fleet`.

    window_s  simulated seconds of a window: how long loads have, and the planner's clock. Give
              what the window really took: a fleet that idles gains little by moving
    batches   batches a window is cut into (for alpha and gamma); the split is made for one
    autoscaler, start_s  decides how many groups there are, and how long one takes to start; it
              sees the load of a window at its end
    """
    windows = check_load(counts)
    if windows.ndim != 3:
        raise PlacementError(f"counts have shape {windows.shape}; give [windows, layers, experts]")
    config = config or ReconcileConfig()
    kinds = () if autoscaler is None else autoscaler.kinds
    fake = FakeFleet(fleet, windows.shape[1], windows.shape[2], kinds, start_s)
    mind = Reconciler(config=config, autoscaler=autoscaler)
    report = Report(window_s=window_s)
    # start-up: placed and loaded before any traffic
    _settle(mind, fake, 0.0, np.inf, None, 0.0, np.inf)
    fake.restart_clock()
    spare = {g.id: g for g in fleet.groups}
    counted: Floats | None = None
    pace_s = window_s / 20
    for w, window in enumerate(windows):
        now = w * window_s
        for event in events:
            if event.window == w:
                _happen(fake, event, spare, report)
        for _ in range(_LOOKS):
            fake.execute(mind.step(fake.snapshot(), now), now)
        # the plan knows the windows before this one; what it loads is there after a while
        _settle(mind, fake, now, now, counted, window_s, pace_s)
        early = _serve(fake, window, batches)
        settled = _settle(mind, fake, now, now + window_s, None, 0.0, pace_s)
        late = _serve(fake, window, batches)
        part = min((settled - now) / window_s, 1.0)
        _note(report, fake, window, part, early, late, config.plan.move_cost)
        counted = window
    report.epochs = fake.table.epoch if fake.table else 0
    report.group_s, report.price_s = fake.group_s, fake.price_s
    report.events += list(mind.events)
    return report


def _note(
    report: Report,
    fake: FakeFleet,
    window: Floats,
    part: float,
    early: tuple[float, int],
    late: tuple[float, int],
    move_cost: float,
) -> None:
    """One window's figures: `part` of it was served as at its start, the rest as at its end."""
    report.ideal_s.append(float(window.sum()) / float(fake.fleet.pair_rate.sum()))
    report.busy_s.append(part * early[0] + (1 - part) * late[0])
    report.missing.append(int(part * early[1] + (1 - part) * late[1]))
    report.stall_s.append(max(fake.loading_s.values(), default=0.0) * move_cost)
    report.loaded_bytes.append(fake.loaded_bytes)
    report.replicas.append(int(fake.ready.sum()))
    report.groups.append(len(fake.fleet.groups))
    work = fake.queue_s + report.busy_s[-1] + report.stall_s[-1]
    fake.queue_s = max(work - report.window_s, 0.0)
    report.behind_s.append(fake.queue_s)
    fake.loaded_bytes, fake.loading_s = 0, {}


def _settle(
    mind: Reconciler,
    fake: FakeFleet,
    now: float,
    until: float,
    counts: Floats | None,
    window_s: float,
    pace_s: float,
) -> float:
    """Let the reconciler act, and simulated time go on, until nothing more happens or `until`.

    Returns when the table or the groups last changed (the start, if they did not).
    """
    changed = now
    for _ in range(100_000):
        ids = fake.fleet.ids
        actions = mind.step(fake.snapshot(counts, window_s), now)
        counts, window_s = None, 0.0
        fake.execute(actions, now)
        if any(isinstance(action, Publish) for action in actions) or fake.fleet.ids != ids:
            changed = now
        if actions:
            continue
        end = fake.next_end()
        if end is None or end > until:
            break
        # loads that end close together are seen together, as a controller's own pace would
        now = min(max(end, now + pace_s), until)
        if not np.isfinite(now):
            now = max(fake.ends.values())
        fake.advance(now)
    else:
        raise PlacementError("the reconciler did not come to rest; please report this plan")
    if np.isfinite(until):
        fake.advance(until)
    return changed


def _happen(fake: FakeFleet, event: Event, spare: dict[str, Any], report: Report) -> None:
    if event.kind != "join" and event.group not in fake.fleet.ids:
        raise PlacementError(f"event names the group {event.group!r}, which is not in the fleet")
    if event.kind == "lose":
        fake.lose(event.group)
    elif event.kind == "drain":
        fake.draining = fake.draining | {event.group}
    elif event.kind == "slow":
        fake.slow(event.group, event.value)
    elif event.group in spare and event.group not in fake.fleet.ids:
        fake.join(spare[event.group])
    else:
        raise PlacementError(f"group {event.group!r} cannot join: it must be one that was lost")
    report.events.append(f"window {event.window}: {event.kind} {event.group}")


def _serve(fake: FakeFleet, window: Floats, batches: int) -> tuple[float, int]:
    """Seconds of one window under the published table, and pairs without a ready replica.

    A pair without one is counted as computed by the slowest group (a cold copy).
    """
    fleet, table = fake.fleet, fake.table
    rate = fleet.pair_rate
    if table is None or table.group_ids != fleet.ids:
        return float(window.sum()) / float(rate.min()), int(window.sum())
    split = TableSplit(table)
    lost = no_host(table.resident)
    missing = int(window[lost].sum())
    busy = 0.0
    for layer, part in enumerate(np.where(lost, 0.0, window) / batches):
        tokens = np.floor(part + 0.5).astype(np.int64)
        cut = split.split(layer, tokens)
        active = (cut > 0).sum(0)
        busy += float((fleet.alpha_s + cut.sum(0) / rate + fleet.gamma_s * active).max()) * batches
    return busy + missing / float(rate.min()), missing
