"""Experts and groups move under streams: what it costs while it goes on, what it brings.

    python -m benchmarks.elastic [--only migrate grow shift] [--model models/demo] [--streams 8]

migrate  one of four groups is drained and brought back, so a quarter of all experts is copied,
         at `--copy-mb-s`: p99 of the gaps between tokens meanwhile against a quiet time
grow     2 -> 4 groups and back: seconds from the decision to the first replicas in use there;
         throughput before, with four, after; failed requests
shift    one group takes `--slow` times as long, and the traffic turns from one domain to another:
         tokens/s of a static placement, of an EPLB-like one (live, but blind to speeds) and of the
         controller, in turns on the same machine
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.live import Load, Server, percentile
from benchmarks.report import finish, table

_MODES: dict[str, dict[str, Any]] = {
    "static": {"live": False, "objective": "tokens"},
    "uniform": {"live": True, "objective": "tokens"},
    "controller": {"live": True, "objective": "time"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--quiet-s", type=float, default=20.0)
    parser.add_argument("--shift-s", type=float, default=30.0, help="each domain serves so long")
    parser.add_argument("--slow", type=float, default=3.0)
    parser.add_argument("--copy-mb-s", type=float, default=1.0)
    parser.add_argument("--only", nargs="+", choices=["migrate", "grow", "shift"])
    args = parser.parse_args()
    todo = {"migrate": migrate, "grow": grow, "shift": shift}
    results = {name: run(args) for name, run in todo.items() if name in (args.only or todo)}
    finish("elastic", vars(args), results)


def migrate(args: argparse.Namespace) -> dict[str, Any]:
    """A quarter of all experts leaves a group, and later comes back."""
    settings = {
        "model": args.model,
        "groups": [{"count": 4, "memory_bytes": 20_000_000}],
        "routers": {"count": args.routers},
        "placement": {"copy_bytes_per_s": args.copy_mb_s * 1e6, "live": False},
    }
    with Server(settings) as server, _load(server, args) as load:
        quiet = _quiet(args)
        before = server.get("/status")["copies"]
        began = time.monotonic()
        server.post("/drain", {"group": "g1"})
        server.wait(lambda: server.groups()["g1"]["state"] == "drained", 300)
        ended = time.monotonic()
        after = server.get("/status")["copies"]
        again = _quiet(args)
    moved = after["copied_bytes"] - before["copied_bytes"]
    p99 = [percentile(load.gaps(*span), 99) for span in (quiet, (began, ended), again)]
    result = {
        "copied_replicas": after["copied"] - before["copied"],
        "from_checkpoint": after["loaded"] - before["loaded"],
        "seconds": ended - began,
        "mb_per_s": moved / 1e6 / (ended - began),
        "quiet_p99_s": statistics.mean((p99[0], p99[2])),
        "moving_p99_s": p99[1],
        "ratio": p99[1] / statistics.mean((p99[0], p99[2])),
        "longest_gap_s": percentile(load.gaps(began, ended), 100),
        "requests": len(load.done),
        "failed": len(load.failures),
    }
    print("migrate: a quarter of the experts copied under streams")
    print(table(list(result), [list(result.values())]))
    return result


def grow(args: argparse.Namespace) -> dict[str, Any]:
    """2 -> 4 -> 2 groups."""
    settings = {
        "model": args.model,
        "groups": [{"count": 2, "memory_bytes": 30_000_000}],
        "routers": {"count": args.routers},
    }
    with Server(settings) as server, _load(server, args) as load:
        spans = [_quiet(args)]
        asked = time.monotonic()
        server.post("/scale", {"groups": 4})
        first = server.wait(lambda: bool(_used(server) & {"g2", "g3"}), 300)
        server.wait(lambda: {"g2", "g3"} <= _used(server), 300)
        both = time.monotonic() - asked
        spans.append(_quiet(args))
        shrunk = time.monotonic()
        server.post("/scale", {"groups": 2})
        server.wait(lambda: len(server.groups()) == 2, 300)
        shrink = time.monotonic() - shrunk
        spans.append(_quiet(args))
    rates = [load.rate(*span) for span in spans]
    result = {
        "first_in_use_s": first,
        "both_in_use_s": both,
        "shrink_s": shrink,
        "tokens_per_s_2": rates[0],
        "tokens_per_s_4": rates[1],
        "tokens_per_s_2_again": rates[2],
        "longest_gap_s": percentile(load.gaps(asked, spans[2][0]), 100),
        "requests": len(load.done),
        "failed": len(load.failures),
    }
    print("grow: 2 -> 4 -> 2 groups under streams")
    print(table(list(result), [list(result.values())]))
    return result


def shift(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s after the traffic has turned, with one slow group of four."""
    result: dict[str, Any] = {}
    for name, placement in _MODES.items():
        settings = {
            "model": args.model,
            "groups": [
                {"kind": "fast", "count": 3, "memory_bytes": 20_000_000},
                {"kind": "slow", "count": 1, "memory_bytes": 20_000_000, "slowdown": args.slow},
            ],
            "routers": {"count": args.routers},
            "placement": {**placement, "plan_interval_s": 5.0},
        }
        with Server(settings) as server, _load(server, args) as load:
            load.domains = ["scripture"]
            time.sleep(args.shift_s)
            load.domains = ["code"]
            turned = time.monotonic()
            time.sleep(args.shift_s)
            speeds = {g["id"]: g["speed"] for g in server.groups().values()}
            copies = server.get("/status")["copies"]
        result[name] = {
            "tokens_per_s": load.rate(turned, turned + args.shift_s),
            "second_half": load.rate(turned + args.shift_s / 2, turned + args.shift_s),
            "speeds": speeds,
            "copied": copies["copied"],
            "failed": len(load.failures),
        }
    base = result["static"]["tokens_per_s"]
    print(f"shift: one group {args.slow:g} times slower, the traffic turns to another domain")
    rows = [
        (n, r["tokens_per_s"], r["tokens_per_s"] / base, r["second_half"], r["copied"], r["failed"])
        for n, r in result.items()
    ]
    print(table(("placement", "tok/s", "x static", "2nd half", "copied", "failed"), rows))
    return result


def _load(server: Server, args: argparse.Namespace) -> Load:
    return Load(server.port, args.streams, args.tokens, ["scripture", "code", "proofs", "plays"])


def _quiet(args: argparse.Namespace) -> tuple[float, float]:
    """A while in which nothing happens: from when to when."""
    time.sleep(5)
    began = time.monotonic()
    time.sleep(args.quiet_s)
    return began, time.monotonic()


def _used(server: Server) -> set[str]:
    """Groups with replicas in the table."""
    layers = server.get("/placement")["layers"]
    return {r["group"] for la in layers for e in la["experts"] for r in e["replicas"]}


if __name__ == "__main__":
    main()
