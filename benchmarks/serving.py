"""Tokens/s through the HTTP endpoint against single-process transformers `generate`.

    python -m benchmarks.serving [--model models/demo] [--groups 2] [--streams 1 8 32]
        [--in-process] [--closed-loop SECONDS]

One run, paired: at each number of streams the endpoint and `generate` take turns on the same
cores, the median of the turns counts. The endpoint streams (one chunk a token at least);
`generate` gets its padded batch, its best experts implementation and thread count of those tried.
Prompts are ragged, 16 to 112 random token ids; 64 new tokens each, greedy.

`--in-process`: our engine with all experts in its own process takes turns too, with one and with
two threads. `--closed-loop`: afterwards every stream begins anew when it has ended, for so
long, so that prompts come while others decode; time to first token and between tokens of that.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.references import Reference, generate, in_process
from benchmarks.report import finish, table

NEW_TOKENS = 64


def ragged_prompts(count: int, vocab: int, low: int, high: int, seed: int) -> list[list[int]]:
    """`count` prompts of `low` to `high` token ids, the same for everybody."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(low, high + 1, count)
    return [rng.integers(16, vocab, n).tolist() for n in lengths]


# ---- the endpoint


class Server:
    """`raymoe serve` as a child process."""

    def __init__(self, model: str, groups: int, routers: int, config: str | None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-m", "raymoe.cli", "serve", model]
        command += ["--port", str(self.port), "--groups", str(groups), "--routers", str(routers)]
        command += ["--config", config] if config else []
        started = time.monotonic()
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("ready:"):
                break
        else:
            raise SystemExit("raymoe serve ended before it was ready")
        self.start_s = time.monotonic() - started
        self.model = self.get("/v1/models")["data"][0]["id"]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return json.load(answer)

    def tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.process.pid)
        return [root, *root.children(recursive=True)]

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


@dataclass(frozen=True)
class Streamed:
    """One stream: chunks with text or ids, and when what came was read (perf_counter)."""

    chunks: int
    times_s: list[float]


async def stream_one(
    port: int, model: str, prompt: list[int], new_tokens: int = NEW_TOKENS
) -> Streamed:
    """One streamed completion over a plain socket.

    A bare client, because its CPU time is taken from the same cores as the server's.
    """
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    writer.write(head.encode() + body)
    chunks, times, tail = 0, [], b""
    while data := await reader.read(1 << 16):
        chunks += data.count(b"data: {")
        times.append(time.perf_counter())
        tail = (tail + data)[-600:]
    writer.close()
    used = tail.rpartition(b'"completion_tokens":')[2].lstrip()
    tokens = int(used[: len(used) - len(used.lstrip(b"0123456789"))] or 0)
    if tokens != new_tokens or b"[DONE]" not in tail:
        raise SystemExit(f"a stream ended with {tokens} of {new_tokens} tokens: {tail[-300:]!r}")
    return Streamed(chunks, times)


def run_endpoint(server: Server, prompts: list[list[int]]) -> dict[str, float]:
    """All prompts at once; tokens/s and time to first token."""

    async def all_of_them() -> list[Streamed]:
        return await asyncio.gather(*(stream_one(server.port, server.model, p) for p in prompts))

    started = time.perf_counter()
    done = asyncio.run(all_of_them())
    seconds = max(d.times_s[-1] for d in done) - started
    first = sorted(d.times_s[0] - started for d in done)
    return {
        "tokens_per_s": len(prompts) * NEW_TOKENS / seconds,
        "ttft_p50_s": first[len(first) // 2],
        "ttft_max_s": first[-1],
        "chunks_per_token": sum(d.chunks for d in done) / (len(prompts) * NEW_TOKENS),
    }


def run_closed_loop(
    server: Server, streams: int, vocab: int, low: int, high: int, seconds: float
) -> dict[str, float]:
    """Every stream sends its next request when one has ended. What began before all streams had
    been through their first (shortened, so that they do not go on in step) does not count."""
    rng = np.random.default_rng(streams)
    waits: list[float] = []
    gaps: list[float] = []
    tokens = 0

    async def stream(until_s: float) -> None:
        nonlocal tokens
        prompts = iter(lambda: rng.integers(16, vocab, rng.integers(low, high + 1)).tolist(), None)
        await stream_one(
            server.port, server.model, next(prompts), int(rng.integers(1, NEW_TOKENS + 1))
        )
        while (began := time.perf_counter()) < until_s:
            done = await stream_one(server.port, server.model, next(prompts))
            waits.append(done.times_s[0] - began)
            gaps.extend(np.diff(done.times_s).tolist())
            tokens += NEW_TOKENS

    async def every_stream() -> None:
        until_s = time.perf_counter() + seconds
        await asyncio.gather(*(stream(until_s) for _ in range(streams)))

    started = time.perf_counter()
    asyncio.run(every_stream())
    took_s = time.perf_counter() - started
    found = {"requests": float(len(waits)), "tokens_per_s": tokens / took_s}
    for name, values in (("ttft", waits), ("gap", gaps)):
        p50, p99 = np.percentile(values, [50, 99]).tolist()
        found |= {f"{name}_p50_s": p50, f"{name}_p99_s": p99, f"{name}_max_s": max(values)}
    return found


# ---- the comparison


ROLES = (
    ("ray::ServeReplica:raymoe:Router", "router"),
    ("ray::ServeReplica:raymoe:Gateway", "gateway (HTTP)"),
    ("ray::ExpertGroup", "expert groups"),
    ("ray::GentleExpertGroup", "expert groups"),
    ("ray::PlacementController", "placement controller"),
    ("haproxy", "HAProxy"),
)


def cpu_seconds(server: Server) -> dict[str, float]:
    """CPU seconds used so far, by role; everything else of Ray's is `Ray itself`."""
    used: dict[str, float] = {}
    for process in server.tree():
        try:
            line, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:
            continue
        role = next((name for key, name in ROLES if key in line), "Ray itself")
        used[role] = used.get(role, 0.0) + times.user + times.system
    return used


def engine_seconds(server: Server) -> dict[str, float]:
    """Totals of all routers' engines and clients: seconds, steps, tokens."""
    time.sleep(1.5)  # routers report once a second
    totals: dict[str, float] = {}
    for router in server.get("/status")["routers"]:
        for name, value in router["profile"].items():
            if isinstance(value, (int, float)):
                totals[name] = totals.get(name, 0.0) + value
    return totals


def difference(after: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0.0) for name, value in after.items()}


def step_rows(engine: dict[str, float], cpu: dict[str, float], tokens: int) -> list[list[Any]]:
    """Where a step's time goes: ms a step of the engine's thread, then CPU-ms a token by role."""
    steps = max(engine["steps"], 1)
    exchange = engine["dispatch_s"] + engine["wait_s"] + engine["combine_s"]
    parts = {
        "dense part and attention": engine["forward_s"] - exchange,
        "dispatch": engine["dispatch_s"],
        "wait for experts": engine["wait_s"],
        "combine": engine["combine_s"],
        "scheduling": engine["plan_s"],
        "sampling": engine["sample_s"],
    }
    rows: list[list[Any]] = [[name, "ms/step", 1e3 * s / steps] for name, s in parts.items()]
    return rows + [[name, "CPU-ms/token", 1e3 * s / tokens] for name, s in sorted(cpu.items())]


def memory_rows(server: Server) -> list[list[Any]]:
    """One row a process: name, proportional and resident MiB."""
    rows = []
    for process in server.tree():
        try:
            info = process.memory_full_info()
            name = " ".join(process.cmdline())[:60] or process.name()
        except psutil.Error:
            continue
        rows.append([name, round(info.pss / (1 << 20)), round(info.rss / (1 << 20))])
    return sorted(rows, key=lambda r: -r[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="models/demo")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--config", help="config file for raymoe serve")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[16, 112])
    parser.add_argument(
        "--probe-tokens", type=int, default=NEW_TOKENS, help="of the runs that find best settings"
    )
    parser.add_argument("--in-process", action="store_true", help="the engine alone as well")
    parser.add_argument("--closed-loop", type=float, default=0.0, metavar="SECONDS")
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends too
    vocab = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    server = Server(args.model, args.groups, args.routers, args.config)
    references = {"generate": generate(args.model, NEW_TOKENS)}
    if args.in_process:
        references["in_process_1"] = in_process(args.model, NEW_TOKENS, 1)
        references["in_process_2"] = in_process(args.model, NEW_TOKENS, 2)
    results: list[dict[str, Any]] = []
    loops: list[dict[str, float]] = []
    try:
        for streams in args.streams:
            results.append(compare(server, references, args, streams, vocab))
            print(rates_of(results[-1]), flush=True)
            if args.closed_loop:
                found = run_closed_loop(
                    server, streams, vocab, *args.prompt_tokens, args.closed_loop
                )
                loops.append({"streams": streams, **found})
        memory = memory_rows(server)
        start_s = server.start_s
    finally:
        for reference in references.values():
            reference.stop()
        server.stop()
    names = ["streams", "raymoe_tokens_per_s"]
    for name in references:
        names += [f"{name}_tokens_per_s", f"ratio_to_{name}", f"{name}_variant"]
    names += ["ttft_p50_s"]
    print(table(names, [[r[n] for n in names] for r in results]))
    if loops:
        print("\nclosed loop: prompts come while others decode")
        print(table(list(loops[0]), [list(loop.values()) for loop in loops]))
    print()
    print(table(["process", "PSS MiB", "RSS MiB"], memory))
    print(f"{len(memory)} processes, {sum(r[1] for r in memory)} MiB PSS, ready in {start_s:.1f} s")
    finish(
        "serving",
        vars(args),
        {"rows": results, "closed_loop": loops, "memory": memory, "start_s": start_s},
    )


def compare(
    server: Server,
    references: dict[str, Reference],
    args: argparse.Namespace,
    streams: int,
    vocab: int,
) -> dict[str, Any]:
    """The endpoint and the references in turns, at one number of streams."""

    def prompts(seed: int) -> list[list[int]]:
        return ragged_prompts(streams, vocab, *args.prompt_tokens, seed=seed)

    first = prompts(streams - 1)
    variants = {
        name: each.best_variant(first, args.probe_tokens) for name, each in references.items()
    }
    run_endpoint(server, first)
    before = engine_seconds(server)
    turns: list[dict[str, float]] = []
    cpu: dict[str, float] = {}
    others: dict[str, list[float]] = {name: [] for name in references}
    for turn in range(args.turns):
        # Other prompts each time, or the prefix cache would know them.
        now = prompts(streams + turn)
        cpu_before = cpu_seconds(server)
        turns.append(run_endpoint(server, now))
        for role, used in difference(cpu_seconds(server), cpu_before).items():
            cpu[role] = cpu.get(role, 0.0) + used
        for name, each in references.items():
            others[name].append(each.run(now, variants[name]))
    engine = difference(engine_seconds(server), before)
    print(f"\n{streams} stream(s): where the time goes")
    profile = step_rows(engine, cpu, args.turns * streams * NEW_TOKENS)
    print(table(["part", "unit", "value"], profile), flush=True)
    ours = [turn["tokens_per_s"] for turn in turns]
    result: dict[str, Any] = {
        "streams": streams,
        "raymoe_tokens_per_s": statistics.median(ours),
        "ttft_p50_s": statistics.median(turn["ttft_p50_s"] for turn in turns),
        "profile": {f"{name}, {unit}": value for name, unit, value in profile},
        "chunks_per_token": min(turn["chunks_per_token"] for turn in turns),
    }
    for name, rates in others.items():
        result |= {
            f"{name}_tokens_per_s": statistics.median(rates),
            f"ratio_to_{name}": statistics.median(o / r for o, r in zip(ours, rates, strict=True)),
            f"{name}_variant": said(variants[name]),
        }
    return result


def rates_of(result: dict[str, Any]) -> str:
    """One line, so that a run that is ended has said something."""
    known = {k: v for k, v in result.items() if k.endswith("_per_s") or k.startswith("ratio")}
    return ", ".join(f"{name} {value:.3g}" for name, value in known.items())


def said(variant: Any) -> str:
    """A reference's settings: threads, or an experts implementation and threads."""
    threads, *rest = reversed(variant) if isinstance(variant, tuple) else (variant,)
    return ", ".join([*rest, f"{threads} thread(s)"])


if __name__ == "__main__":
    main()
