"""A group is SIGKILLed under streams: how long does any stream pause, what throughput is lost?

    python -m benchmarks.chaos [--model models/demo] [--groups 3] [--streams 8] [--kills 3]

Two deployments, one after the other: in the first every expert has two live replicas
(`placement.copies: 2`), in the second each has one, so that the killed group is the only holder.
The longest gap of any stream in the 10 s after each kill is compared with the longest in a quiet
time just as long before; throughput over the 30 s after with the 30 s before. First token, all
resumed: until the first, and until every stream open at the kill had the token that ended its
longest pause. Whole: every expert has its copies again, with the bytes brought by then; home: all
groups are ready too. Full speed: from when on 2 s bring nine tenths of the tokens of before.

Where groups share the machine's cores with the routers, the new group's start takes CPU time from
those that serve. Three figures tell that apart:

--every-s  each of the streams asks so often, and no more: a load below what the fleet can do, so
           that capacity remains (else the streams take what there is). The window should be a
           multiple of it
--shams N  as many rounds in which nothing is killed: what the throughput of two windows differs by
--hold     the new group's process is stopped (SIGSTOP) as soon as it is there, and goes on after
           the window: what is lost then is not its start
start      CPU seconds that the new process had used when it could load experts, those of all
           processes that came up by then (Ray starts idle ones too), and what part of the window's
           on all cores the latter are; `busy`: the part of the cores that the deployment used
           before and after
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil

from benchmarks.live import DOMAINS, Load, Server, group_bytes, percentile
from benchmarks.report import finish, table

_GAP_S = 10.0
_PATIENCE_S = 180.0
_COPIES = {"replica": 2, "sole": 1}
_COLUMNS = {
    "gap quiet s": "quiet_gap_s",
    "gap killed s": "gap_s",
    "first token s": "first_token_s",
    "resumed s": "all_resumed_s",
    "whole s": "whole_s",
    "MB": "whole_mb",
    "MB/s": "mb_per_s",
    "up s": "up_s",
    "home s": "home_s",
    "full speed s": "full_speed_s",
    "tok/s": "tokens_per_s",
    "lost": "lost_part",
    "start CPU s": "start_cpu_s",
    "all new s": "new_cpu_s",
    "of window": "start_part",
    "busy before": "busy_before",
    "busy after": "busy_after",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--shams", type=int, default=0)
    parser.add_argument("--hold", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(_COPIES), default=list(_COPIES))
    parser.add_argument("--window-s", type=float, default=30.0)
    parser.add_argument("--every-s", type=float, default=0.0)
    parser.add_argument("--settle-s", type=float, default=10.0, help="before the first round")
    args = parser.parse_args()
    results = {
        name: scenario(args, copies) for name, copies in _COPIES.items() if name in args.only
    }
    rows = []
    for name, result in results.items():
        for kind in ("kills", "shams"):
            rounds = result[kind]
            if rounds:
                medians = [_median(rounds, key) for key in _COLUMNS.values()]
                rows.append((f"{name}, {kind}", *medians, result["failed"]))
    print(table(("holder", *_COLUMNS, "failed"), rows))
    finish("chaos", vars(args), results)


def scenario(args: argparse.Namespace, copies: int) -> dict[str, Any]:
    """The rounds of one deployment."""
    settings: dict[str, Any] = {
        "model": args.model,
        "groups": [{"count": args.groups, "memory_bytes": _room(args, copies)}],
        "routers": {"count": args.routers},
        "placement": {"copies": copies, "live": copies > 1},
    }
    kills, shams = [], []
    with Server(settings) as server:
        server.wait(lambda: _home(server, copies))
        with Load(
            server.port, args.streams, args.tokens, list(DOMAINS), args.model, args.every_s
        ) as load:
            time.sleep(args.settle_s)
            shams = [kill(args, server, load, copies, None) for _ in range(args.shams)]
            kills = [
                kill(args, server, load, copies, f"g{n % args.groups}") for n in range(args.kills)
            ]
    failures = load.failures
    return {
        "kills": kills,
        "shams": shams,
        "requests": len(load.done),
        "failed": len(failures),
        "failures": failures[:3],
    }


def kill(
    args: argparse.Namespace, server: Server, load: Load, copies: int, victim: str | None
) -> dict[str, float]:
    """A quiet window, the kill of the victim (None: of nobody), the window after it."""
    cores = psutil.cpu_count() or 1
    used = [_used_s(server)]
    time.sleep(args.window_s)
    used.append(_used_s(server))
    earlier, killed = _moved(server), time.monotonic()
    over = threading.Timer(args.window_s, lambda: used.append(_used_s(server)))
    over.start()
    row: dict[str, float] = {}
    if victim is not None:
        known = {process.pid for process in server.tree()}
        with _held(server) if args.hold else contextlib.nullcontext():
            server.kill(victim)
            if args.hold:
                over.join()
            else:
                server.wait(lambda: server.groups()[victim]["state"] != "ready", pause_s=0.2)
        # a look costs CPU time too: few of them, and the small ones first
        while "home_s" not in row:
            time.sleep(0.2)
            group = server.groups()[victim]
            if "up_s" not in row and group["state"] in ("loading", "ready"):
                row["up_s"] = time.monotonic() - killed
                new = {process.pid for process in server.tree()} - known
                now = _used_s(server)
                row["start_cpu_s"] = now.get(group["pid"], 0.0)
                row["new_cpu_s"] = sum(now.get(pid, 0.0) for pid in new | {group["pid"]})
                row["start_part"] = row["new_cpu_s"] / cores / args.window_s
            if "whole_s" not in row and _whole(server, copies):
                row["whole_s"] = time.monotonic() - killed
                row["whole_mb"] = (_moved(server) - earlier) / 1e6
                row["mb_per_s"] = row["whole_mb"] / row["whole_s"]
            if "whole_s" in row and group["state"] == "ready" and _whole(server, copies):
                row["home_s"] = time.monotonic() - killed
            if time.monotonic() - killed > _PATIENCE_S:
                raise TimeoutError(f"{victim} is not back: {server.get('/status')}")
    over.join()
    resumed = load.resumed(killed, 1.0)
    before = load.rate(killed - args.window_s, killed)
    return row | {
        "quiet_gap_s": percentile(load.gaps(killed - _GAP_S, killed - 0.1), 100),
        "gap_s": percentile(load.gaps(killed, killed + _GAP_S), 100),
        "first_token_s": min(resumed, default=float("nan")),
        "all_resumed_s": max(resumed, default=float("nan")),
        "full_speed_s": _full_speed(load, killed, 0.9 * before),
        "tokens_per_s": before,
        "lost_part": 1 - load.rate(killed, killed + args.window_s) / before,
        "busy_before": _more(used[0], used[1]) / cores / args.window_s,
        "busy_after": _more(used[1], used[2]) / cores / args.window_s,
    }


@contextlib.contextmanager
def _held(server: Server) -> Iterator[None]:
    """Groups' processes that come up meanwhile stand still until the end."""
    there = {row["pid"] for row in server.groups().values()}
    stopped: set[int] = set()
    over = threading.Event()

    def stop() -> None:
        while not over.wait(0.05):
            for pid in server.group_processes() - there - stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                    stopped.add(pid)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _room(args: argparse.Namespace, copies: int) -> int:
    """Bytes of a group: the others can take in what one held."""
    return group_bytes(args.model, args.groups, copies * args.groups / (args.groups - 1) + 0.2)


def _moved(server: Server) -> int:
    """Bytes copied and loaded so far."""
    copies = server.get("/status")["copies"]
    return int(copies["copied_bytes"] + copies["loaded_bytes"])


def _used_s(server: Server) -> dict[int, float]:
    """CPU seconds so far of each process of the deployment."""
    used = {}
    for process in server.tree():
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            used[process.pid] = times.user + times.system
    return used


def _more(before: dict[int, float], after: dict[int, float]) -> float:
    """CPU seconds in between, without those of processes that have ended."""
    return sum(used - before.get(pid, 0.0) for pid, used in after.items())


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
    """Every expert has its copies again, in groups that live."""
    live = {i for i, group in server.groups().items() if group["state"] in ("ready", "loading")}
    experts = [e for layer in server.get("/placement")["layers"] for e in layer["experts"]]
    held = [sum(replica["group"] in live for replica in e["replicas"]) for e in experts]
    return bool(held) and min(held) >= copies


def _home(server: Server, copies: int) -> bool:
    """All groups are ready too."""
    ready = all(group["state"] == "ready" for group in server.groups().values())
    return ready and _whole(server, copies)


def _median(rounds: list[dict[str, float]], key: str) -> float:
    return statistics.median(r.get(key, float("nan")) for r in rounds)


if __name__ == "__main__":
    main()
