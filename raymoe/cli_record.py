"""`raymoe record`: the load of a running deployment as COUNTS.npz, for `plan` and `simulate`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from raymoe.errors import ConfigError
from raymoe.http_get import add_endpoint, endpoint_of, get_json


def add_record_parser(commands: Any) -> None:
    """The subcommand of `raymoe`."""
    record = commands.add_parser(
        "record", help="write the load of a running deployment to COUNTS.npz, for plan and simulate"
    )
    record.add_argument("--out", required=True, metavar="COUNTS.npz")
    record.add_argument("--seconds", type=float, default=600.0, help="for how long (default 600)")
    record.add_argument(
        "--window-s", type=float, default=30.0, help="seconds of a window (default 30)"
    )
    add_endpoint(record)
    record.set_defaults(run=_record)


def _record(args: argparse.Namespace) -> int:
    if not 1 <= args.window_s <= args.seconds:
        raise ConfigError("--window-s must be 1 or more, and --seconds at least one window")
    url = f"{endpoint_of(args)}/placement"
    every_s = min(args.window_s, 5.0)
    looks = max(1, round(args.window_s / every_s))
    counts = record(
        lambda: get_json(url), int(args.seconds // args.window_s), looks, args.window_s, time.sleep
    )
    np.savez(args.out, counts=counts)
    windows, layers, experts = counts.shape
    print(f"{args.out}: {windows} windows of {args.window_s:g} s, {layers} layers x {experts}")
    print(f"use it with --window-s {args.window_s:g}")
    if not counts.any():
        print("there was no traffic in all that time", file=sys.stderr)
    return 0


def record(
    look: Callable[[], Any],
    windows: int,
    looks: int,
    window_s: float,
    sleep: Callable[[float], None],
) -> npt.NDArray[np.int64]:
    """Counts [windows, layers, experts]: pairs of a window, from the mean of `looks` looks at
    GET /placement in it, whose load is smoothed over about 10 s."""
    found = []
    for _ in range(windows):
        rates = []
        for _ in range(looks):
            sleep(window_s / looks)
            rates.append(rates_of(look()["layers"]))
        if len({rate.shape for rate in rates}) > 1:
            raise ConfigError("the deployment was replaced by another model's: record again")
        found.append(np.rint(np.mean(rates, 0) * window_s).astype(np.int64))
    return np.stack(found)


def rates_of(layers: Iterable[Any]) -> npt.NDArray[np.float64]:
    """Pairs/s [L, E] of the layers of GET /placement; 0 for experts that a layer does not have."""
    rows = [[expert["load"] for expert in layer["experts"]] for layer in layers]
    if not rows:
        raise ConfigError("no expert is placed yet: the deployment is still starting")
    rates = np.zeros((len(rows), max(map(len, rows))))
    for layer, row in enumerate(rows):
        rates[layer, : len(row)] = row
    return rates
