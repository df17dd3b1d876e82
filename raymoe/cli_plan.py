"""`raymoe plan` and `raymoe simulate`: placements from files, without a cluster."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placement.errors import PlacementError
from placement.explain import explain, summary
from placement.forecast import forecast_windows
from placement.plan import Plan, PlanConfig
from placement.planner import make_plan
from placement.reconcile import ReconcileConfig
from placement.simulate import Event, Report, simulate
from placement.types import DEFAULT_TOKENS_PER_S, Fleet, GroupSpec, Placement, check_load

_FLEET_KEYS = {
    "expert_bytes",
    "groups",
    "tokens_per_s",
    "survive",
    "reserve_bytes",
    "experts_of_layer",
}


def add_plan_parser(subparsers: Any) -> None:
    """Adds `raymoe plan`."""
    parser = subparsers.add_parser("plan", help="plan a placement from recorded loads, and say why")
    _add_inputs(parser)
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


def add_simulate_parser(subparsers: Any) -> None:
    """Adds `raymoe simulate`."""
    parser = subparsers.add_parser(
        "simulate", help="play recorded loads against the controller on a fleet not yet rented"
    )
    _add_inputs(parser)
    parser.add_argument(
        "--event",
        action="append",
        default=[],
        metavar="WINDOW:KIND:GROUP[:FACTOR]",
        help="lose, drain, join or slow a group at a window, e.g. 5:slow:g0:0.7 (may be repeated)",
    )
    parser.add_argument("--batches", type=int, default=1, help="batches a window is cut into")
    parser.add_argument("--static", action="store_true", help="also play without moving for gain")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run_simulate)


def _add_inputs(parser: argparse.ArgumentParser) -> None:
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
    window_s, said = _window_s(args.window_s, counts, fleet)
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


def run_simulate(args: argparse.Namespace) -> int:
    counts = read_counts(args.load)
    fleet, notes = read_fleet(args.fleet, counts.shape[1])
    window_s, said = _window_s(args.window_s, counts, fleet)
    events = tuple(_event(text, fleet) for text in args.event)
    plan = PlanConfig(horizon_s=args.horizon_s, move_cost=args.move_cost, margin=args.margin)
    if args.batches < 1:
        raise PlacementError("--batches must be at least 1")
    runs = {"live": True, **({"static": False} if args.static else {})}
    reports = {
        name: simulate(
            counts,
            fleet,
            ReconcileConfig(plan=plan, plan_every_s=window_s / 2, live=live, loads_per_group=64),
            window_s=window_s,
            batches=args.batches,
            events=events,
        )
        for name, live in runs.items()
    }
    if args.json:
        output: dict[str, Any] = {name: report.to_dict() for name, report in reports.items()}
        output["notes"] = notes + said
        print(json.dumps(output))
        return 0
    for note in notes + said:
        print(f"note: {note}")
    for name, report in reports.items():
        _print_report(name, report)
    return 0


# -- files -----------------------------------------------------------------------------------


def read_counts(path: str) -> npt.NDArray[np.float64]:
    """`counts` [windows, layers, experts] of an .npz file."""
    arrays = _read_npz(path)
    if "counts" not in arrays:
        raise PlacementError(
            f"{path} holds {sorted(arrays) or 'nothing'}; it must hold `counts` "
            "[windows, layers, experts]"
        )
    counts = check_load(arrays["counts"])
    if counts.ndim != 3 or not counts.size:
        raise PlacementError(
            f"counts in {path} have shape {counts.shape}; they must be [windows, layers, experts], "
            "each at least 1"
        )
    return counts


def read_placement(path: str, counts: npt.NDArray[np.float64], fleet: Fleet) -> Placement:
    """A PLACEMENT.npz that fits the counts and the fleet."""
    arrays = _read_npz(path)
    if not {"resident", "share"} <= set(arrays):
        raise PlacementError(f"{path} must hold `resident` and `share` [layers, experts, groups]")
    want = (*counts.shape[1:], len(fleet.groups))
    for name in ("resident", "share"):
        if arrays[name].shape != want:
            raise PlacementError(
                f"{name} in {path} has shape {arrays[name].shape}; counts and fleet need {want}"
            )
    share = check_load(arrays["share"])
    return Placement(resident=arrays["resident"].astype(np.bool_), share=share)


def write_placement(path: str, placement: Placement) -> None:
    try:
        with open(path, "wb") as file:
            np.savez_compressed(file, resident=placement.resident, share=placement.share)
    except OSError as error:
        raise PlacementError(f"cannot write {path}: {error.strerror}") from None


def _read_npz(path: str) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as data:
            if isinstance(data, np.ndarray):
                raise PlacementError(f"{path} is one array; give an .npz file")
            return {name: data[name] for name in data.files}
    except FileNotFoundError:
        raise PlacementError(f"{path} does not exist") from None
    except (OSError, ValueError, EOFError) as error:
        raise PlacementError(f"{path} is not an .npz file: {error}") from None


def read_fleet(path: str, layers: int) -> tuple[Fleet, list[str]]:
    """FLEET.yaml -> the fleet, and what was assumed. Unknown fields are refused by name."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise PlacementError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlacementError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise PlacementError(f"{path} must be a mapping with `expert_bytes` and `groups`")
    _refuse_unknown(data, _FLEET_KEYS, path)
    for name in ("expert_bytes", "groups"):
        if data.get(name) is None:
            raise PlacementError(f"{path} lacks `{name}`")
    notes = []
    if "tokens_per_s" not in data:
        notes.append(
            f"tokens_per_s is not given; taken as {DEFAULT_TOKENS_PER_S:g} pairs/s at speed 1"
        )
    if not isinstance(data["groups"], list):
        raise PlacementError(f"{path}: `groups` must be a list")
    groups = tuple(_group(entry, i, path) for i, entry in enumerate(data["groups"]))
    fleet = Fleet(
        groups=groups,
        expert_bytes=_expert_bytes(data["expert_bytes"], layers, path),
        experts_of_layer=tuple(data.get("experts_of_layer", ())),
        survive=str(data.get("survive", "none")),
        reserve_bytes=_integer(data.get("reserve_bytes", 0), "reserve_bytes", path),
        tokens_per_s=_number(data.get("tokens_per_s", DEFAULT_TOKENS_PER_S), "tokens_per_s", path),
    )
    return fleet, notes


def _group(entry: Any, number: int, path: str) -> GroupSpec:
    where = f"{path}: group {number}"
    if not isinstance(entry, dict):
        raise PlacementError(f"{where} must be a mapping")
    _refuse_unknown(entry, {f.name for f in fields(GroupSpec)}, where)
    for name in ("id", "memory_bytes"):
        if name not in entry:
            raise PlacementError(f"{where} lacks `{name}`")
    values: dict[str, Any] = {"id": str(entry["id"]), "node": str(entry.get("node", "node"))}
    values["memory_bytes"] = _integer(entry["memory_bytes"], "memory_bytes", where)
    if "kind" in entry:
        values["kind"] = str(entry["kind"])
    for name in ("speed", "bandwidth_bytes_per_s", "alpha_s", "gamma_s"):
        if name in entry:
            values[name] = _number(entry[name], name, where)
    return GroupSpec(**values)


def _expert_bytes(value: Any, layers: int, path: str) -> npt.NDArray[np.int64]:
    sizes = value if isinstance(value, list) else [value] * layers
    if len(sizes) != layers:
        raise PlacementError(
            f"{path}: expert_bytes lists {len(sizes)} layers, the counts have {layers}: "
            "give one size, or one for each layer"
        )
    return np.array([_integer(size, "expert_bytes", path) for size in sizes], np.int64)


def _refuse_unknown(data: dict[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(map(str, data)) - known)
    if unknown:
        raise PlacementError(
            f"{where} has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(known))}"
        )


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, str):  # YAML reads 1e9 as text
        try:
            return float(value)
        except ValueError:
            raise PlacementError(f"{where}: {name} is {value!r}, not a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlacementError(f"{where}: {name} is {value!r}, not a number")
    return float(value)


def _integer(value: Any, name: str, where: str) -> int:
    number = _number(value, name, where)
    if not number.is_integer():
        raise PlacementError(f"{where}: {name} is {value!r}; give whole bytes")
    return int(number)


def parse_bytes(text: str) -> int:
    """ "1500", "2GiB", "300MB" -> bytes."""
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", 1):
        units[f"{letter}B"], units[f"{letter}IB"] = 1000**power, 1024**power
    stripped = text.strip()
    number = stripped.rstrip("BbIiKkMmGgTt ")
    unit = stripped[len(number) :].strip().upper()
    try:
        return int(float(number) * units[unit])
    except (KeyError, ValueError):
        raise PlacementError(f"{text!r} is no number of bytes; write e.g. 1500 or 2GiB") from None


def _window_s(
    given: float | None, counts: npt.NDArray[np.float64], fleet: Fleet
) -> tuple[float, list[str]]:
    """Seconds a window took; when not given, what a level fleet would need for the busiest one."""
    if given is not None:
        if not given > 0:
            raise PlacementError("--window-s must be positive")
        return given, []
    seconds = float(counts.sum((1, 2)).max()) / float(fleet.pair_rate.sum())
    if seconds <= 0:
        return 1.0, ["the counts are all zero: an even load is planned for"]
    return seconds, [
        f"--window-s is not given; taken as {seconds:.4g} s, what the fleet needs for the "
        "busiest window when level"
    ]


def _event(text: str, fleet: Fleet) -> Event:
    parts = text.split(":")
    try:
        window, kind, group = int(parts[0]), parts[1], parts[2]
        factor = float(parts[3]) if len(parts) > 3 else 1.0
    except (IndexError, ValueError):
        raise PlacementError(
            f"event {text!r} is not WINDOW:KIND:GROUP[:FACTOR], e.g. 5:slow:g0:0.7"
        ) from None
    if group not in fleet.ids:
        raise PlacementError(f"event {text!r} names a group the fleet lacks")
    if not factor > 0:
        raise PlacementError(f"event {text!r}: the factor must be positive")
    return Event(window=window, kind=kind, group=group, value=factor)


# -- printing --------------------------------------------------------------------------------


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
