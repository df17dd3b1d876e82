"""`raymoe simulate`: recorded loads against the controller's own decisions, on a fake fleet."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from placement.autoscale import Autoscaler, ScaleConfig, fleet_for
from placement.errors import PlacementError
from placement.plan import PlanConfig
from placement.reconcile import ReconcileConfig
from placement.simulate import Event, Report, simulate
from placement.types import Fleet
from raymoe.cli_plan import add_inputs
from raymoe.plan_files import check_counts, read_counts, read_fleet, read_kinds, window_seconds


def add_simulate_parser(subparsers: Any) -> None:
    """Adds `raymoe simulate`."""
    parser = subparsers.add_parser(
        "simulate", help="play recorded loads against the controller on a fleet not yet rented"
    )
    add_inputs(parser)
    parser.add_argument(
        "--event",
        action="append",
        default=[],
        metavar="WINDOW:KIND:GROUP[:FACTOR]",
        help="lose, drain, join or slow a group at a window, e.g. 5:slow:g0:0.7 (may be repeated)",
    )
    parser.add_argument("--batches", type=int, default=1, help="batches a window is cut into")
    parser.add_argument("--static", action="store_true", help="also play without moving for gain")
    scale = parser.add_argument_group("autoscaling")
    scale.add_argument(
        "--autoscale",
        action="store_true",
        help="also play with groups added and retired by the load, beside a fleet for its peak",
    )
    scale.add_argument("--target", type=float, default=ScaleConfig.target, help="utilisation")
    scale.add_argument("--least", type=int, default=1, help="fewest groups")
    scale.add_argument("--most", type=int, default=ScaleConfig.most, help="most groups")
    scale.add_argument(
        "--patience-s",
        type=float,
        default=None,
        help="how long the load must be low before a group goes (default: two windows)",
    )
    scale.add_argument("--start-s", type=float, default=0.0, help="seconds a group takes to start")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_simulate)


def run_simulate(args: argparse.Namespace) -> int:
    counts = read_counts(args.load)
    fleet, notes = read_fleet(args.fleet, counts.shape[1])
    check_counts(counts, fleet)
    window_s, said = window_seconds(args.window_s, counts, fleet)
    notes += said
    events = tuple(_event(text, fleet, len(counts)) for text in args.event)
    plan = PlanConfig(horizon_s=args.horizon_s, move_cost=args.move_cost, margin=args.margin)
    if args.batches < 1:
        raise PlacementError("--batches must be at least 1")

    def play(live: bool = True, on: Fleet = fleet, autoscaler: Autoscaler | None = None) -> Report:
        return simulate(
            counts,
            on,
            ReconcileConfig(plan=plan, plan_every_s=window_s / 2, live=live, loads_per_group=64),
            window_s=window_s,
            batches=args.batches,
            events=events,
            autoscaler=autoscaler,
            start_s=args.start_s,
        )

    reports = {"live": play()}
    if args.static:
        reports["static"] = play(live=False)
    if args.autoscale:
        config, kinds = _scaling(args, window_s), read_kinds(args.fleet)
        reports["elastic"] = play(autoscaler=Autoscaler(config, kinds))
        peak = counts[counts.sum((1, 2)).argmax()] / window_s
        reached = reports["elastic"].balancedness
        reports["peak"] = play(on=fleet_for(fleet, peak, config, kinds, reached))
    if args.json:
        output: dict[str, Any] = {name: report.to_dict() for name, report in reports.items()}
        output["notes"] = notes
        print(json.dumps(output))
        return 0
    for note in notes:
        print(f"note: {note}")
    for name, report in reports.items():
        _print_report(name, report)
    if args.autoscale:
        _print_saving(reports["elastic"], reports["peak"])
    return 0


def _scaling(args: argparse.Namespace, window_s: float) -> ScaleConfig:
    """Patience in windows: the simulated autoscaler sees the load once a window."""
    if not 0 < args.target < 0.9:
        raise PlacementError("--target must be a utilisation above 0 and below 0.9")
    if not args.start_s >= 0:
        raise PlacementError("--start-s must be 0 or more")
    patience_s = 2 * window_s if args.patience_s is None else args.patience_s
    if not patience_s >= 0:
        raise PlacementError("--patience-s must be 0 or more")
    return ScaleConfig(
        target=args.target,
        high=args.target + min(0.2, (1 - args.target) / 2),
        low=args.target * 0.75,
        up_after_s=0.0,
        down_after_s=patience_s,
        cool_down_s=window_s * 0.9,
        least=args.least,
        most=args.most,
    )


def _event(text: str, fleet: Fleet, windows: int) -> Event:
    parts = text.split(":")
    try:
        window, kind, group = int(parts[0]), parts[1], parts[2]
        factor = float(parts[3]) if len(parts) > 3 else 1.0
        if len(parts) > (4 if kind == "slow" else 3):
            raise ValueError
    except (IndexError, ValueError):
        raise PlacementError(
            f"event {text!r} is not WINDOW:KIND:GROUP[:FACTOR], e.g. 5:slow:g0:0.7"
        ) from None
    if group not in fleet.ids:
        raise PlacementError(f"event {text!r} names a group the fleet lacks")
    if not (factor > 0 and math.isfinite(factor)):
        raise PlacementError(f"event {text!r}: the factor must be a positive number")
    if not 0 <= window < windows:
        raise PlacementError(
            f"event {text!r}: there is no window {window}, they go from 0 to {windows - 1}"
        )
    return Event(window=window, kind=kind, group=group, value=factor)


def _print_report(name: str, report: Report) -> None:
    data = report.to_dict()
    print(
        f"{name}: time-balancedness {data['balancedness']:.3f} "
        f"(net of stalls {data['balancedness_net_of_stalls']:.3f}, "
        f"worst window {data['worst_window']:.3f}), "
        f"{data['loaded_bytes'] / 1e6:.4g} MB moved, {data['stall_s']:.3g} s of stalls, "
        f"{data['unserved_pairs']} pairs without a ready replica, {data['epochs']} epochs"
    )
    for line in report.events:
        print(f"  {line}")


def _print_saving(elastic: Report, peak: Report) -> None:
    print("\nautoscaling against a fleet sized for the peak:")
    for name, report in (("elastic", elastic), ("peak", peak)):
        print(
            f"  {name:8} {report.group_s:.4g} group-seconds, {min(report.groups)}-"
            f"{max(report.groups)} groups, busiest window {report.busiest:.2f} of its time, "
            f"at most {max(report.behind_s):.3g} s behind, {sum(report.missing)} pairs without a "
            "ready replica"
        )
    saved = f"  {elastic.group_s / max(peak.group_s, 1e-300):.2f} x the peak fleet's group-seconds"
    if abs(peak.price_s - peak.group_s) > 1e-9 * peak.group_s:
        saved += f", {elastic.price_s / max(peak.price_s, 1e-300):.2f} x its price"
    print(saved)
