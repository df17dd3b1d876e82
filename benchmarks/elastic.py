"""Experts and groups move under streams: what it costs while it goes on, what it brings.

    python -m benchmarks.elastic [--only migrate grow shift day] [--model models/demo] [--streams 8]

For a model in which the experts are nearly everything: `python -m benchmarks.big_model FOLDER`,
then `--model FOLDER --routers 2 --copy-mb-s 15`.

migrate  one of four groups is drained and brought back, so a quarter of all experts is copied,
         at `--copy-mb-s`: p99 of the gaps between tokens meanwhile against a quiet time
grow     2 -> 4 groups and back: seconds from the decision to the first token a new group had a part
         in, and until both are in the table; throughput before, with four, after; failed requests
shift    one group takes `--slow` times as long, and the traffic turns from one domain to another:
         tokens/s of a static placement, of an EPLB-like one (live, but blind to speeds) and of the
         controller, in turns on the same machine (`--modes` for some of them)
day      the number of streams rises and falls, a level for `--hour-s`; group-seconds used with
         autoscaling and with four groups all the time, and the gaps between tokens of both, over
         all and by level. `--slow` holds for all groups, so that they are busy at all; `--high`,
         `--target` and `--low` are the autoscaler's. Equal latency needs a `--high` not far
         above what the four groups have at the peak (`busy` of the first rows: of the busiest one)

`--every-s`: each stream asks so often and no more, which is a load that does not grow with the
speed of what serves it; 0: the next request follows the last.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.live import Load, Server, group_bytes, percentile
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
    parser.add_argument(
        "--base",
        type=float,
        default=1.0,
        help="shift: all groups take so many times as long, by waiting: devices that do not share "
        "this machine's cores",
    )
    parser.add_argument("--copy-mb-s", type=float, default=1.0)
    parser.add_argument("--hour-s", type=float, default=15.0)
    parser.add_argument("--every-s", type=float, default=0.0)
    parser.add_argument("--high", type=float, default=0.8)
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--low", type=float, default=0.4)
    parser.add_argument("--modes", nargs="+", choices=list(_MODES), default=list(_MODES))
    parser.add_argument("--only", nargs="+", choices=["migrate", "grow", "shift", "day"])
    args = parser.parse_args()
    todo = {"migrate": migrate, "grow": grow, "shift": shift, "day": day}
    results = {name: run(args) for name, run in todo.items() if name in (args.only or todo)}
    finish("elastic", vars(args), results)


def migrate(args: argparse.Namespace) -> dict[str, Any]:
    """A quarter of all experts leaves a group, and later comes back."""
    settings = {
        "model": args.model,
        "groups": [{"count": 4, "memory_bytes": group_bytes(args.model, 4, 1.6)}],
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
        "groups": [{"count": 2, "memory_bytes": group_bytes(args.model, 2, 1.4)}],
        "routers": {"count": args.routers},
    }
    with Server(settings) as server, _load(server, args) as load:
        spans = [_quiet(args)]
        asked, asked_unix = time.monotonic(), time.time()
        server.post("/scale", {"groups": 4})
        server.wait(lambda: {"g2", "g3"} <= _used(server), 300)
        both = time.monotonic() - asked
        spans.append(_quiet(args))
        # when a group computed its first message: the token of that step comes a few ms later
        served = sorted(server.groups()[g]["served_since"] - asked_unix for g in ("g2", "g3"))
        shrunk = time.monotonic()
        server.post("/scale", {"groups": 2})
        server.wait(lambda: len(server.groups()) == 2, 300)
        shrink = time.monotonic() - shrunk
        spans.append(_quiet(args))
    rates = [load.rate(*span) for span in spans]
    result = {
        "first_token_s": served[0],
        "both_serve_s": served[1],
        "both_in_table_s": both,
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
    room = group_bytes(args.model, 4, 1.6)
    for name in args.modes:
        placement = _MODES[name]
        settings = {
            "model": args.model,
            "groups": [
                {"kind": "fast", "count": 3, "memory_bytes": room, "slowdown": args.base},
                {
                    "kind": "slow",
                    "count": 1,
                    "memory_bytes": room,
                    "slowdown": args.base * args.slow,
                },
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
            status = server.get("/status")
            speeds = {g["id"]: g["speed"] for g in status["groups"]}
            busy = {g["id"]: g["busy"] for g in status["groups"]}
            replicas = {g["id"]: g["replicas"] for g in status["groups"]}
            copies = status["copies"]
            plans = server.get("/placement/history")["plans"]
        result[name] = {
            "tokens_per_s": load.rate(turned, turned + args.shift_s),
            "before": load.rate(turned - args.shift_s / 2, turned),
            "second_half": load.rate(turned + args.shift_s / 2, turned + args.shift_s),
            "speeds": speeds,
            "busy": busy,
            "replicas": replicas,
            "plans": len(plans),
            "profile": [router["profile"] for router in status["routers"]],
            "copied": copies["copied"],
            "failed": len(load.failures),
        }
    base = result.get("static", result[args.modes[0]])["tokens_per_s"]
    print(f"shift: one group {args.slow:g} times slower, the traffic turns to another domain")
    rows = [
        (n, r["tokens_per_s"], r["tokens_per_s"] / base, r["second_half"], r["copied"], r["failed"])
        for n, r in result.items()
    ]
    print(table(("placement", "tok/s", "x static", "2nd half", "copied", "failed"), rows))
    return result


_DAY = (1, 2, 4, 8, 8, 4, 2, 1)  # eighths of --streams at work, for --hour-s each


def day(args: argparse.Namespace) -> dict[str, Any]:
    """A varying load: groups come and go with it, or are there all the time."""
    result: dict[str, Any] = {}
    for name, first in (("peak", 4), ("autoscaled", 1)):
        settings = {
            "model": args.model,
            "groups": [
                {
                    "count": first,
                    "min_count": 1,
                    "max_count": 4,
                    "memory_bytes": int(1.3 * group_bytes(args.model, 1, 1.0)),
                    "slowdown": args.slow,
                }
            ],
            "routers": {"count": args.routers},
            "placement": {
                "autoscale": {
                    "enabled": name == "autoscaled",
                    "high": args.high,
                    "target": args.target,
                    "low": args.low,
                    "up_after_s": 2.0,
                    "down_after_s": 10.0,
                    "cool_down_s": 5.0,
                }
            },
        }
        looks: list[tuple[float, int, float]] = []  # when, groups, the busiest
        levels: list[tuple[int, float, float]] = []  # streams, from, until
        with Server(settings) as server, _load(server, args) as load:
            for part in _DAY:
                load.active = max(1, part * args.streams // 8)
                since = now = time.monotonic()
                while now < since + args.hour_s:
                    groups = server.groups().values()
                    looks.append((now, len(groups), max(g["busy"] for g in groups)))
                    time.sleep(0.5)
                    now = time.monotonic()
                levels.append((load.active, since, now))
            began, ended = levels[0][1], levels[-1][2]
            events = [e for e in server.get("/placement/history")["events"] if "groups" in str(e)]
        until = [at for at, _, _ in looks[1:]] + [ended]
        gaps = load.gaps(began, ended)
        result[name] = {
            "group_s": sum(n * (b - a) for (a, n, _), b in zip(looks, until, strict=True)),
            "most_groups": max(n for _, n, _ in looks),
            "tokens": load.rate(began, ended) * (ended - began),
            "gap_p50_s": percentile(gaps, 50),
            "gap_p99_s": percentile(gaps, 99),
            "longest_gap_s": percentile(gaps, 100),
            "failed": len(load.failures),
            "levels": [_level(load, looks, *level) for level in levels],
            "looks": [(round(at - began, 1), n, busiest) for at, n, busiest in looks[::4]],
            "events": events[:40],
        }
    print("day: streams come and go, and so do groups")
    header = ("fleet", "group s", "most", "tokens", "gap p50 s", "p99 s", "failed")
    keys = ("group_s", "most_groups", "tokens", "gap_p50_s", "gap_p99_s", "failed")
    print(table(header, [(n, *(r[k] for k in keys)) for n, r in result.items()]))
    header = ("fleet", "streams", "groups", "busy", "tok/s", "gap p50 s", "p99 s")
    keys = ("streams", "groups", "busy", "tokens_per_s", "gap_p50_s", "gap_p99_s")
    levels = [(n, *(row[k] for k in keys)) for n, r in result.items() for row in r["levels"]]
    print(table(header, levels))
    return result


def _level(
    load: Load, looks: list[tuple[float, int, float]], streams: int, since: float, until: float
) -> dict[str, float]:
    """One level of the day: streams at work, groups and the busiest on average, what came of it."""
    inside = [(n, busiest) for at, n, busiest in looks if since <= at < until]
    gaps = load.gaps(since, until)
    return {
        "streams": streams,
        "groups": statistics.mean(n for n, _ in inside),
        "busy": statistics.mean(busiest for _, busiest in inside),
        "tokens_per_s": load.rate(since, until),
        "gap_p50_s": percentile(gaps, 50),
        "gap_p99_s": percentile(gaps, 99),
    }


def _load(server: Server, args: argparse.Namespace) -> Load:
    domains = ["scripture", "code", "proofs", "plays"]
    return Load(server.port, args.streams, args.tokens, domains, args.model, args.every_s)


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
