"""`raymoe explain LAYER EXPERT`: where an expert is, since when, and why."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from raymoe.errors import ConfigError
from raymoe.http_get import add_endpoint, endpoint_of, get_json


def add_explain_parser(commands: Any) -> None:
    """The subcommand of `raymoe`."""
    explain = commands.add_parser(
        "explain", help="where an expert's replicas are, since when, and why"
    )
    explain.add_argument("layer", type=int, metavar="LAYER", help="MoE layer, from 0")
    explain.add_argument("expert", type=int, metavar="EXPERT", help="expert, from 0")
    explain.add_argument("--json", action="store_true", help="print one JSON object")
    add_endpoint(explain)
    explain.set_defaults(run=_explain)


def _explain(args: argparse.Namespace) -> int:
    placement = get_json(f"{endpoint_of(args)}/placement")
    layer, expert = find(placement, args.layer, args.expert)
    if args.json:
        print(json.dumps({"layer": layer["layer"], "name": layer["name"], **expert}))
    else:
        print(told(layer, expert, placement["epoch"], time.time()))
    return 0


def find(placement: Any, layer: int, expert: int) -> tuple[Any, Any]:
    """The rows of GET /placement. Raises ConfigError saying which there are."""
    layers = placement["layers"]
    if not layers:
        raise ConfigError("no expert is placed yet: the deployment is still starting")
    if not 0 <= layer < len(layers):
        raise ConfigError(f"there is no MoE layer {layer}: they go from 0 to {len(layers) - 1}")
    experts = layers[layer]["experts"]
    if not 0 <= expert < len(experts):
        raise ConfigError(
            f"layer {layer} has no expert {expert}: they go from 0 to {len(experts) - 1}"
        )
    return layers[layer], experts[expert]


def told(layer: Any, expert: Any, epoch: int, now: float) -> str:
    """For people. now: Unix seconds."""
    loads = sorted((row["load"] for row in layer["experts"]), reverse=True)
    part = 100 * expert["load"] / max(sum(loads), 1e-9)
    lines = [
        f"layer {layer['layer']} ({layer['name']}), expert {expert['expert']}, epoch {epoch}",
        f"load: {expert['load']:.1f} pairs/s, {part:.1f} % of its layer "
        f"(even: {100 / len(loads):.1f} %), number {loads.index(expert['load']) + 1} of "
        f"{len(loads)}",
    ]
    if not expert["replicas"]:
        lines.append("no ready replica: requests that need it wait until it is restored")
    for replica in expert["replicas"]:
        lines.append(
            f"  {replica['group']:8} {100 * replica['share']:5.1f} % of its pairs, since "
            f"{age(now - replica['since'])} ago: {replica['why']}"
        )
    return "\n".join(lines)


def age(seconds: float) -> str:
    """Like 8 s, 5 min, 3 h, 2 d."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds / length)} {unit}"
    return f"{max(int(seconds), 0)} s"
