"""A group is SIGKILLed under streams: how long does any stream pause, what throughput is lost?

    python -m benchmarks.chaos [--model models/demo] [--groups 3] [--streams 8] [--kills 3]

Two deployments, one after the other: in the first every expert has two live replicas
(`placement.copies: 2`), in the second each has one, so that the killed group is the only holder.
The longest gap of any stream in the 10 s after each kill is compared with the longest in a quiet
time just as long before; throughput over the 30 s after with the 30 s before. Restored: all copies
are there again, in the new group or in others; full speed: from when on 2 s bring nine tenths of
the tokens of before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from benchmarks.live import DOMAINS, Load, Server, group_bytes, percentile
from benchmarks.report import finish, table

_GAP_S = 10.0
_COPIES = {"replica": 2, "sole": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=list(_COPIES), default=list(_COPIES))
    parser.add_argument("--window-s", type=float, default=30.0)
    args = parser.parse_args()
    results = {
        name: scenario(args, copies) for name, copies in _COPIES.items() if name in args.only
    }
    header = (
        "holder",
        "gap quiet s",
        "gap killed s",
        "restored s",
        "MB/s",
        "full speed s",
        "tok/s",
        "lost %",
        "failed",
    )
    rows = [
        (
            name,
            r["quiet_gap_s"],
            r["longest_gap_s"],
            r["restored_s"],
            r["restored_bytes"] / 1e6 / r["restored_s"],
            r["full_speed_s"],
            r["tokens_per_s"],
            100 * r["lost_part"],
            r["failed"],
        )
        for name, r in results.items()
    ]
    print(table(header, rows))
    finish("chaos", vars(args), results)


def scenario(args: argparse.Namespace, copies: int) -> dict[str, Any]:
    """Medians over the kills of one deployment."""
    settings: dict[str, Any] = {
        "model": args.model,
        "groups": [{"count": args.groups, "memory_bytes": _room(args, copies)}],
        "routers": {"count": args.routers},
        "placement": {"copies": copies, "live": copies > 1},
    }
    gaps, quiet, restored, lost, rates, moved, full = [], [], [], [], [], [], []
    with Server(settings) as server:
        server.wait(lambda: all(g["state"] == "ready" for g in server.groups().values()))
        with Load(server.port, args.streams, args.tokens, list(DOMAINS), args.model) as load:
            time.sleep(10)
            for n in range(args.kills):
                time.sleep(args.window_s)
                victim = f"g{n % args.groups}"
                earlier = _moved(server)
                killed = time.monotonic()
                server.kill(victim)
                server.wait(lambda: server.groups()[victim]["state"] != "ready")  # noqa: B023
                restored.append(server.wait(lambda: _whole(server, copies)))
                moved.append(_moved(server) - earlier)
                time.sleep(max(0.0, killed + args.window_s - time.monotonic()))
                before = load.rate(killed - args.window_s, killed)
                after = load.rate(killed, killed + args.window_s)
                quiet.append(percentile(load.gaps(killed - _GAP_S, killed - 0.1), 100))
                gaps.append(percentile(load.gaps(killed, killed + _GAP_S), 100))
                rates.append(before)
                lost.append(1 - after / before)
                full.append(_full_speed(load, killed, 0.9 * before))
        failures = load.failures
    return {
        "quiet_gap_s": statistics.median(quiet),
        "longest_gap_s": statistics.median(gaps),
        "longest_gaps_s": gaps,
        "restored_s": statistics.median(restored),
        "restored_bytes": statistics.median(moved),
        "full_speed_s": statistics.median(full),
        "tokens_per_s": statistics.median(rates),
        "lost_part": statistics.median(lost),
        "lost_parts": lost,
        "requests": len(load.done),
        "failed": len(failures),
        "failures": failures[:3],
    }


def _room(args: argparse.Namespace, copies: int) -> int:
    """Bytes of a group: the others can take in what one held."""
    return group_bytes(args.model, args.groups, copies * args.groups / (args.groups - 1) + 0.2)


def _moved(server: Server) -> int:
    """Bytes copied and loaded so far."""
    copies = server.get("/status")["copies"]
    return int(copies["copied_bytes"] + copies["loaded_bytes"])


def _full_speed(load: Load, killed: float, wanted: float) -> float:
    """Seconds from the kill until 2 s brought so many tokens a second; inf: not so far."""
    now = time.monotonic()
    at = killed
    while at + 2 < now:
        if load.rate(at, at + 2) >= wanted:
            return at - killed
        at += 0.1
    return float("inf")


def _whole(server: Server, copies: int) -> bool:
    """Every expert has its copies again."""
    layers = server.get("/placement")["layers"]
    ready = all(g["state"] == "ready" for g in server.groups().values())
    return ready and all(len(e["replicas"]) >= copies for la in layers for e in la["experts"])


if __name__ == "__main__":
    main()
