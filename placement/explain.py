"""A plan's reasons, in words and numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from placement.plan import Plan
from placement.planner import loading_s
from placement.search import Change
from placement.types import Fleet


def explain(plan: Plan, fleet: Fleet, most: int | None = None) -> list[str]:
    """One sentence for each action, those that gain most first."""
    lines = [_owed_line(o.kind, o.layer, o.expert, fleet.ids[o.group]) for o in plan.owed]
    if plan.mode == "full" and np.isfinite(plan.before_s):
        gain = (plan.before_s - plan.after_s) * plan.config.horizon_s
        cost = plan.config.move_cost * loading_s(plan, fleet)
        lines.append(
            f"a plan from scratch gains {gain:.4g} s in {plan.config.horizon_s:g} s; its "
            f"{int(plan.loads.sum())} loads ({plan.loaded_bytes / 1e6:.4g} MB) cost {cost:.4g} s"
        )
    if plan.mode == "full":
        gains = np.nan_to_num(plan.layer_before_s - plan.layer_after_s, nan=0.0, posinf=1e300)
        order = np.argsort(-gains, kind="stable").tolist()
        lines += [_layer_line(layer, plan, fleet) for layer in order]
    ranked = sorted(plan.changes, key=lambda c: (-c.gain, c.layer, c.expert))
    lines += [_change_line(change, plan, fleet) for change in ranked]
    return lines if most is None else lines[:most]


def reasons(plan: Plan, fleet: Fleet) -> dict[tuple[int, int, str], str]:
    """Why each replica is to be loaded: (layer, expert, group id) -> a sentence."""
    ids = fleet.ids
    why = {
        (o.layer, o.expert, ids[o.group]): _owed_line(o.kind, o.layer, o.expert, ids[o.group])
        for o in plan.owed
        if o.kind == "restore"
    }
    if plan.mode == "full":
        text = {
            la: _layer_line(la, plan, fleet)
            for la in np.flatnonzero(plan.loads.any((1, 2))).tolist()
        }
        for layer, expert, group in np.argwhere(plan.loads).tolist():
            why.setdefault((layer, expert, ids[group]), f"planned from scratch, {text[layer]}")
    for change in plan.changes:
        line = _change_line(change, plan, fleet)
        why[change.layer, change.expert, ids[change.target]] = line
        if change.kind == "swap":
            why[change.layer, change.other_expert, ids[change.source]] = line
    return why


def _layer_line(layer: int, plan: Plan, fleet: Fleet) -> str:
    """What a plan from scratch makes of a layer."""
    copies = plan.placement.resident[layer].sum(1)
    before, after = float(plan.layer_before_s[layer]), float(plan.layer_after_s[layer])
    was = f"{before:.4g} -> " if np.isfinite(before) else ""
    loads, drops = int(plan.loads[layer].sum()), int(plan.drops[layer].sum())
    size = loads * int(fleet.expert_bytes[layer])
    return (
        f"layer {layer}: {int(np.maximum(copies - 1, 0).sum())} replicas beyond one of each, "
        f"{loads} to load ({size / 1e6:.3g} MB), {drops} to drop: {was}{after:.4g} s of work per "
        "second of traffic"
    )


def _owed_line(kind: str, layer: int, expert: int, group: str) -> str:
    name = f"layer {layer} expert {expert}"
    if kind == "restore":
        return f"restore {name} on {group}: it has no other replica"
    if kind == "leave":
        return f"take {name} off {group}: the group is to be emptied"
    if kind == "budget":
        return f"take {name} off {group}: spare replicas fill more than the budget"
    return f"take {name} off {group}: the group is over its bytes"


def _change_line(change: Change, plan: Plan, fleet: Fleet) -> str:
    horizon = plan.config.horizon_s
    gain, price = change.gain * horizon, change.price * horizon
    margin = plan.config.margin * float(plan.layer_after_s[change.layer]) * horizon
    source, target = fleet.ids[change.source], fleet.ids[change.target]
    what = f"layer {change.layer}: expert {change.expert}"
    numbers = (
        f"gains {gain:.4g} s in {horizon:g} s for {change.loaded_bytes / 1e6:.3g} MB "
        f"({price:.4g} s) and a margin of {margin:.4g} s"
    )
    if change.kind == "swap":
        return (
            f"swap {what} on {source} with expert {change.other_expert} on {target}, "
            f"because {source} is the slowest: {numbers}"
        )
    if change.kind == "move":
        return f"move {what} from {source} to {target}, because {source} is the slowest: {numbers}"
    if change.kind == "replace":
        return (
            f"add {what} on {target} in place of layer {change.other_layer} expert "
            f"{change.other_expert}, to relieve {source}: {numbers}"
        )
    return f"add {what} on {target}, to relieve {source}: {numbers}"


def summary(plan: Plan, fleet: Fleet) -> dict[str, Any]:
    """The plan in numbers, JSON-safe."""
    before = None if not np.isfinite(plan.before_s) else plan.before_s
    ideal = float(plan.layer_after_s.sum())
    return {
        "mode": plan.mode,
        "groups": len(fleet.groups),
        "time_before": before,
        "time_after": ideal,
        "gain_s": None if before is None else (before - plan.after_s) * plan.config.horizon_s,
        "loads": int(plan.loads.sum()),
        "drops": int(plan.drops.sum()),
        "loaded_bytes": plan.loaded_bytes,
        "loading_s": loading_s(plan, fleet),
        "actions": len(plan.changes) + len(plan.owed),
        "extra_replicas": int(
            (plan.placement.copies() - np.minimum(plan.placement.copies(), 1)).sum()
        ),
    }
