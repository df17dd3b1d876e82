"""`raymoe plan`: a placement from files, without a cluster."""

from __future__ import annotations

import argparse
import json
from typing import Any

from placement.explain import explain, summary
from placement.forecast import forecast_windows
from placement.plan import Plan, PlanConfig
from placement.planner import make_plan
from raymoe.plan_files import (
    check_counts,
    parse_bytes,
    read_counts,
    read_fleet,
    read_placement,
    window_seconds,
    write_placement,
)


def add_plan_parser(subparsers: Any) -> None:
    """Adds `raymoe plan`."""
    parser = subparsers.add_parser("plan", help="plan a placement from recorded loads, and say why")
    add_inputs(parser)
    parser.add_argument("--current", metavar="PLACEMENT.npz", help="where the experts are now")
    parser.add_argument("--out", metavar="PLACEMENT.npz", help="write the planned placement")
    parser.add_argument("--mode", choices=("auto", "full", "delta"), default="auto")
    parser.add_argument(
        "--budget",
        metavar="BYTES",
        help="most bytes that replicas beyond one of each may fill, e.g. 2GiB",
    )
    parser.add_argument(
        "--interval-bytes", metavar="BYTES", help="most bytes a delta plan may load, e.g. 500MB"
    )
    parser.add_argument("--explain", action="store_true", help="print the reason of every action")
    parser.add_argument("--plot", metavar="FILE.png", help="draw load per group and replicas")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_plan)


def add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--load", required=True, metavar="COUNTS.npz", help="counts [W, L, E]")
    parser.add_argument("--fleet", required=True, metavar="FLEET.yaml")
    parser.add_argument("--horizon-s", type=float, default=60.0, help="how long the plan serves")
    parser.add_argument(
        "--window-s", type=float, default=None, help="seconds each window of counts took"
    )
    parser.add_argument("--move-cost", type=float, default=PlanConfig.move_cost)
    parser.add_argument("--margin", type=float, default=PlanConfig.margin)


def run_plan(args: argparse.Namespace) -> int:
    counts = read_counts(args.load)
    fleet, notes = read_fleet(args.fleet, counts.shape[1])
    check_counts(counts, fleet)
    window_s, said = window_seconds(args.window_s, counts, fleet)
    notes += said
    current = read_placement(args.current, counts, fleet) if args.current else None
    budget = None if args.budget is None else parse_bytes(args.budget)
    config = PlanConfig(
        horizon_s=args.horizon_s,
        move_cost=args.move_cost,
        margin=args.margin,
        budget_bytes=budget,
        interval_bytes=None if args.interval_bytes is None else parse_bytes(args.interval_bytes),
    )
    forecast = forecast_windows(counts).scaled(1 / window_s)
    plan = make_plan(forecast, fleet, current, config, args.mode)
    if args.out:
        write_placement(args.out, plan.placement)
    if args.plot:
        from raymoe.plot_plan import draw

        draw(args.plot, plan, current, forecast.load, fleet)
    result = summary(plan, fleet)
    result["notes"] = notes
    if args.explain or args.json:
        result["reasons"] = explain(plan, fleet)
    if args.json:
        print(json.dumps(result))
    else:
        _print_plan(plan, result, args)
    return 0


def _print_plan(plan: Plan, result: dict[str, Any], args: argparse.Namespace) -> None:
    for note in result["notes"]:
        print(f"note: {note}")
    before = result["time_before"]
    was = "" if before is None else f"{before:.4g} -> "
    print(
        f"{plan.mode} plan: {result['loads']} replicas to load, {result['drops']} to drop, "
        f"{plan.loaded_bytes / 1e6:.4g} MB, {result['loading_s']:.3g} s of loading"
    )
    print(f"seconds of work per second of traffic, summed over layers: {was}{plan.after_s:.4g}")
    if result["gain_s"] is not None:
        print(f"gain over {plan.config.horizon_s:g} s: {result['gain_s']:.4g} s")
    print(f"extra replicas: {result['extra_replicas']}")
    for line in result.get("reasons", []):
        print(f"  {line}")
    if args.out:
        print(f"written to {args.out}")
