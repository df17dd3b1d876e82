"""Tokens/s through the HTTP endpoint against single-process transformers `generate`.

    python -m benchmarks.serving [--model models/demo] [--groups 2] [--streams 1 8 32]

One run, paired: at each number of streams the endpoint and `generate` take turns on the same
cores, the median of the turns counts. The endpoint streams (one chunk a token at least);
`generate` gets its padded batch, its best experts implementation and thread count of those tried.
Prompts are ragged, 16 to 112 random token ids; 64 new tokens each, greedy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing as mp
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import psutil

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


async def stream_one(port: int, model: str, prompt: list[int]) -> tuple[int, float, float]:
    """One streamed completion over a plain socket: chunks with text or ids, first and last time.

    A bare client, because its CPU time is taken from the same cores as the server's.
    """
    body = json.dumps(
        {
            "model": model,
            "prompt": prompt,
            "max_tokens": NEW_TOKENS,
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
    chunks, first, tail = 0, 0.0, b""
    while data := await reader.read(1 << 16):
        if not chunks:
            first = time.perf_counter()
        chunks += data.count(b"data: {")
        tail = (tail + data)[-600:]
    writer.close()
    used = tail.rpartition(b'"completion_tokens":')[2].lstrip()
    tokens = int(used[: len(used) - len(used.lstrip(b"0123456789"))] or 0)
    if tokens != NEW_TOKENS or b"[DONE]" not in tail:
        raise SystemExit(f"a stream ended with {tokens} of {NEW_TOKENS} tokens: {tail[-300:]!r}")
    return chunks, first, time.perf_counter()


def run_endpoint(server: Server, prompts: list[list[int]]) -> dict[str, float]:
    """All prompts at once; tokens/s and time to first token."""

    async def all_of_them() -> list[tuple[int, float, float]]:
        return await asyncio.gather(*(stream_one(server.port, server.model, p) for p in prompts))

    started = time.perf_counter()
    done = asyncio.run(all_of_them())
    seconds = max(d[2] for d in done) - started
    first = sorted(d[1] - started for d in done)
    return {
        "tokens_per_s": len(prompts) * NEW_TOKENS / seconds,
        "ttft_p50_s": first[len(first) // 2],
        "ttft_max_s": first[-1],
        "chunks_per_token": sum(d[0] for d in done) / (len(prompts) * NEW_TOKENS),
    }


# ---- transformers


def generate_process(model: str, pipe: Any) -> None:
    """Answers (prompts, experts implementation, threads) with tokens/s of `generate`."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    loaded.generation_config.pad_token_id = 0
    while (task := pipe.recv()) is not None:
        prompts, implementation, threads = task
        torch.set_num_threads(threads)
        loaded.set_experts_implementation(implementation)
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        started = time.perf_counter()
        with torch.inference_mode():
            loaded.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
        pipe.send(len(prompts) * NEW_TOKENS / (time.perf_counter() - started))


class Generate:
    """transformers in one process of its own."""

    VARIANTS = (("grouped_mm", 1), ("grouped_mm", 2), ("eager", 1), ("eager", 2))

    def __init__(self, model: str) -> None:
        context = mp.get_context("spawn")
        self.pipe, other = context.Pipe()
        before = os.environ.pop("OMP_NUM_THREADS", None)  # its best thread count is tried
        self.process = context.Process(target=generate_process, args=(model, other), daemon=True)
        self.process.start()
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before

    def run(self, prompts: list[list[int]], variant: tuple[str, int]) -> float:
        self.pipe.send((prompts, *variant))
        return float(self.pipe.recv())

    def best_variant(self, prompts: list[list[int]]) -> tuple[str, int]:
        return max(self.VARIANTS, key=lambda v: max(self.run(prompts, v) for _ in range(2)))

    def stop(self) -> None:
        self.pipe.send(None)
        self.process.join(10)


# ---- the comparison


ROLES = (
    ("ray::ServeReplica:raymoe:Router", "router"),
    ("ray::ServeReplica:raymoe:Gateway", "gateway (HTTP)"),
    ("ray::ExpertGroup", "expert groups"),
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
    args = parser.parse_args()

    vocab = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    server = Server(args.model, args.groups, args.routers, args.config)
    reference = Generate(args.model)
    results: list[dict[str, Any]] = []
    try:
        for streams in args.streams:
            prompts = ragged_prompts(streams, vocab, *args.prompt_tokens, seed=streams - 1)
            variant = reference.best_variant(prompts)
            run_endpoint(server, prompts)
            before = engine_seconds(server)
            turns, cpu = [], {}
            for turn in range(args.turns):
                # Other prompts each time, or the prefix cache would know them.
                prompts = ragged_prompts(streams, vocab, *args.prompt_tokens, seed=streams + turn)
                cpu_before = cpu_seconds(server)
                ours_now = run_endpoint(server, prompts)
                for role, used in difference(cpu_seconds(server), cpu_before).items():
                    cpu[role] = cpu.get(role, 0.0) + used
                turns.append((ours_now, reference.run(prompts, variant)))
            engine = difference(engine_seconds(server), before)
            tokens = args.turns * streams * NEW_TOKENS
            print(f"\n{streams} stream(s): where the time goes")
            profile = step_rows(engine, cpu, tokens)
            print(table(["part", "unit", "value"], profile), flush=True)
            ours = [t[0]["tokens_per_s"] for t in turns]
            results.append(
                {
                    "streams": streams,
                    "raymoe_tokens_per_s": statistics.median(ours),
                    "generate_tokens_per_s": statistics.median(t[1] for t in turns),
                    "ratio": statistics.median(o / t[1] for o, t in zip(ours, turns, strict=True)),
                    "generate_variant": f"{variant[0]}, {variant[1]} thread(s)",
                    "ttft_p50_s": statistics.median(t[0]["ttft_p50_s"] for t in turns),
                    "profile": {f"{name}, {unit}": value for name, unit, value in profile},
                    "chunks_per_token": min(t[0]["chunks_per_token"] for t in turns),
                }
            )
        memory = memory_rows(server)
        start_s = server.start_s
    finally:
        reference.stop()
        server.stop()
    names = ("streams", "raymoe_tokens_per_s", "generate_tokens_per_s", "ratio", "ttft_p50_s")
    print(
        table(
            [*names, "generate_variant"],
            [[r[n] for n in (*names, "generate_variant")] for r in results],
        )
    )
    print()
    print(table(["process", "PSS MiB", "RSS MiB"], memory))
    print(f"{len(memory)} processes, {sum(r[1] for r in memory)} MiB PSS, ready in {start_s:.1f} s")
    finish(
        "serving",
        vars(args),
        {"rows": results, "memory": memory, "start_s": start_s},
    )


if __name__ == "__main__":
    main()
