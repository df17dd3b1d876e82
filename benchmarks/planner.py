"""The placement planner against EPLB, on traces: plan on past windows, score on the next one.

    python -m benchmarks.planner [--traces DIR] [--quick] [--only NAME] [--fleets F,F]

Prints a table for every trace and fleet, every row, also those lost; the last line is JSON.
Time-balancedness: sum over layers of tokens / summed speed, over the slowest group's tokens /
speed; 1 is no straggler. "net" charges a replan's loads (10 GB/s a group) to 100 steps. Of files
with traces our planner is told the past windows in 16 parts each, as reports of a running fleet
would have it (EPLB has no use for them); synthetic loads come in whole windows.

All at once takes long. In pieces: `--parts split,time,loop` first, which also prints the cost of
a batch; then `--parts traces --costs ALPHA,PAIR,GAMMA --only NAME` with those seconds. Nothing of
"traces" is timed but the seconds a delta plan takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.planning.cases import TOP_K, run_case
from benchmarks.planning.check import check_baseline
from benchmarks.planning.closed import closed_loop
from benchmarks.planning.loop import Groups
from benchmarks.planning.score import Costs
from benchmarks.planning.splits import split_times
from benchmarks.planning.timing import planning_times
from benchmarks.planning.traces import FAMILIES, load_traces, r1_like, synthetic_family
from benchmarks.report import finish

FLEETS = ("equal", "mixed", "straggler", "memory 2:1", "one lost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    beside = Path(__file__).resolve().parents[2] / "shared" / "traces"
    parser.add_argument("--traces", type=Path, default=beside if beside.is_dir() else None)
    parser.add_argument("--quick", action="store_true", help="equal and mixed fleets only, no R1")
    parser.add_argument("--only", default="", help="traces whose name contains this")
    parser.add_argument("--parts", default="traces,split,time,loop")
    parser.add_argument("--fleets", default="", help="of equal,mixed,straggler,memory 2:1,one lost")
    parser.add_argument("--costs", default="", help="alpha,pair,gamma in seconds: not measured")
    args = parser.parse_args()
    parts = args.parts.split(",")
    check_baseline()
    results: dict[str, Any] = {}
    if args.costs and "loop" not in parts:
        alpha, pair, gamma = (float(part) for part in args.costs.split(","))
        costs = Costs(alpha_s=alpha, pair_s=pair, gamma_s=gamma)
    else:
        costs = measured(results, "loop" in parts)
    results["costs"] = vars(costs)
    if "split" in parts:
        results["split"] = split_times()
    if "time" in parts:
        results["planning_s"] = planning_times()
    if "traces" in parts:
        results["traces"] = run_traces(args, costs)
    shown = {k: str(v) for k, v in vars(args).items() if k != "traces"}
    finish("planner", shown, results)


def measured(results: dict[str, Any], loop: bool) -> Costs:
    """What a batch costs on real group processes; and the closed loop on them."""
    groups = Groups([1, 1, 3])
    try:
        costs = groups.measure(0)
        print("\nmeasured on real group processes with the product's kernels, demo checkpoint:")
        for who, found in (("CPU time", costs), ("the group itself, wall clock", groups.says(0))):
            print(
                f"  alpha {found.alpha_s * 1e6:.1f} us, {found.pair_s * 1e6:.2f} us a pair, "
                f"gamma {found.gamma_s * 1e6:.1f} us an expert ({who})"
            )
        if loop:
            results["loop"] = closed_loop(groups)
        return costs
    finally:
        groups.close()


def run_traces(args: argparse.Namespace, costs: Costs) -> list[dict[str, Any]]:
    traces = [] if args.traces is None else load_traces(args.traces)
    if not traces:
        print("no trace files (--traces DIR): SYNTHETIC lognormal loads of the same shapes instead")
        layers = {"dsv2lite": 26, "gptoss20b": 24}
        traces = [
            synthetic_family(name, layers[name], e, tokens * TOP_K[name], i, size)
            for i, (name, (e, tokens, size)) in enumerate(FAMILIES.items())
        ]
    if not args.quick:
        traces.append(r1_like())
    results = []
    for trace in traces:
        if args.only not in trace.name:
            continue
        chosen = args.fleets.split(",") if args.fleets else FLEETS[:2] if args.quick else FLEETS
        for kind in chosen:
            results.append(run_case(trace, kind, costs))
    return results


if __name__ == "__main__":
    main()
