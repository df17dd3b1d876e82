"""What watching costs: tokens/s with /metrics scraped each second and a page open, against neither.

    python -m benchmarks.observing [--model models/demo] [--streams 16] [--turns 8]

One run, paired: batches of streams with and without watchers take turns, in an order that swaps
every other pair; the median of the pairs' ratios counts. Beside tokens a second of the wall clock,
tokens a second of CPU time of the deployment's processes, which other work on the machine does not
disturb. The watchers themselves (curl, as Prometheus and a browser would be) are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Iterator

from benchmarks.report import finish, table
from benchmarks.serving import NEW_TOKENS, Server, ragged_prompts, run_endpoint


def cpu_s(server: Server) -> float:
    """User and system seconds of all processes of the deployment so far."""
    times = [process.cpu_times() for process in server.tree()]
    return sum(t.user + t.system for t in times)


@contextlib.contextmanager
def watched(server: Server) -> Iterator[None]:
    """A scrape each second, one page on its stream."""
    url = f"http://127.0.0.1:{server.port}"
    scrape = f"while :; do curl -s -o /dev/null {url}/metrics; sleep 1; done"
    commands = (["sh", "-c", scrape], ["curl", "-sN", "-o", "/dev/null", f"{url}/ui/events"])
    watchers = [subprocess.Popen(command) for command in commands]
    try:
        yield
    finally:
        for watcher in watchers:
            watcher.terminate()
            watcher.wait(10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--turns", type=int, default=8, help="pairs of turns")
    parser.add_argument("--rounds", type=int, default=2, help="batches of streams in one turn")
    args = parser.parse_args()
    server = Server(args.model, args.groups, 1, None)
    try:
        run_endpoint(server, ragged_prompts(args.streams, 512, 16, 112, 0))  # warm
        turns: dict[str, list[dict[str, float]]] = {"off": [], "on": []}
        for pair in range(args.turns):
            for how in ("off", "on") if pair % 2 else ("on", "off"):
                with watched(server) if how == "on" else contextlib.nullcontext():
                    if how == "on":
                        time.sleep(0.5)
                    turns[how].append(turn(server, args.streams, args.rounds, pair, how == "on"))
        size = len(urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics").read())
    finally:
        server.stop()
    rows, results = [], {"scrape_bytes": float(size)}
    for name in ("tokens_per_s", "tokens_per_cpu_s"):
        off, on = ([t[name] for t in turns[how]] for how in ("off", "on"))
        ratios = [b / a for a, b in zip(off, on, strict=True)]
        ratio = statistics.median(ratios)
        rows.append([name, statistics.median(off), statistics.median(on), round(ratio, 4)])
        results |= {f"{name}_off": rows[-1][1], f"{name}_on": rows[-1][2], f"{name}_ratio": ratio}
    print(table(["", "nobody looks", "watched", "ratio"], rows))
    finish("observing", vars(args), results)


def turn(server: Server, streams: int, rounds: int, pair: int, watched: bool) -> dict[str, float]:
    """Prompts as long as the other turn's of the pair, of other tokens: nothing is in the cache."""
    batches = [ragged_prompts(streams, 248, 16, 112, 100 * pair + at + 1) for at in range(rounds)]
    if watched:
        batches = [[[token + 248 for token in prompt] for prompt in batch] for batch in batches]
    before_s, started_s = cpu_s(server), time.perf_counter()
    for batch in batches:
        run_endpoint(server, batch)
    tokens = streams * rounds * NEW_TOKENS
    return {
        "tokens_per_s": tokens / (time.perf_counter() - started_s),
        "tokens_per_cpu_s": tokens / (cpu_s(server) - before_s),
    }


if __name__ == "__main__":
    main()
