"""A long prompt of one client beside another's decode: who waits for whom, and for how long.

    python -m benchmarks.prefill MODEL [--prompt-tokens 4096] [--decoding 1 8] [--in-process]

Some streams decode; when each has had its first tokens, another client sends a long prompt and
wants one token. Compared: time between two reads of the decoding streams without and beside the
prefill, and the prefill's time to first token alone and beside them. Medians over the turns; the
longest gap of all turns. MODEL must hold the prompt (the demo model's context is 2,048 tokens;
`benchmarks.random_checkpoint` makes one with 8,192).

With `--routers 2` half of the streams decode on the router that computes the prompt and half on the
other; the rows tell them apart. The gateway gives requests to the routers in turns, so the first
stream and the prompt after an even number of streams share one.

`--in-process`: the engine alone, experts in this process, in CPU time (other work on the machine
does not count): milliseconds of a step without and beside the prefill, and whether every decoding
stream got a token in every step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.engine import local_engine
from benchmarks.report import finish, table
from benchmarks.serving import Server, Streamed, stream_one
from raymoe.engine.engine import Engine
from raymoe.requests import GenerationRequest, SamplingParams

Row = dict[str, Any]
_DECODE_TOKENS = 384
_BEFORE_S = 1.0  # of decoding alone


async def beside(
    server: Server, prompts: list[list[int]], long: list[int]
) -> tuple[list[Streamed], float, float]:
    """The decoding streams, and from when to when the long prompt was computed."""
    decoding = []
    for prompt in prompts:
        decoding.append(
            asyncio.create_task(stream_one(server.port, server.model, prompt, _DECODE_TOKENS))
        )
        await asyncio.sleep(0.05)  # so that they arrive in this order
    await asyncio.sleep(_BEFORE_S)
    began_s = time.perf_counter()
    await stream_one(server.port, server.model, long, 1)
    ended_s = time.perf_counter()
    return await asyncio.gather(*decoding), began_s, ended_s


def gaps_of(
    streams: list[Streamed], began_s: float, ended_s: float
) -> tuple[list[float], list[float]]:
    """Seconds between two reads: away from the prefill, and while it went on."""
    apart: list[float] = []
    during: list[float] = []
    for one in streams:
        for before, now in zip(one.times_s[1:], one.times_s[2:], strict=False):
            overlaps = now > began_s and before < ended_s
            (during if overlaps else apart).append(now - before)
    return apart, during


def measure(server: Server, count: int, args: argparse.Namespace, vocab: int) -> list[Row]:
    """A row for each router: `count` decoding streams."""
    rng = np.random.default_rng(count)
    found: list[tuple[list[float], list[float]]] = [([], []) for _ in range(args.routers)]
    alone_s, beside_s = [], []
    for _ in range(args.turns):
        lone = rng.integers(16, vocab, args.prompt_tokens).tolist()
        started = time.perf_counter()
        asyncio.run(stream_one(server.port, server.model, lone, 1))
        alone_s.append(time.perf_counter() - started)
        prompts = [rng.integers(16, vocab, 16).tolist() for _ in range(count)]
        long = rng.integers(16, vocab, args.prompt_tokens).tolist()
        streams, began_s, ended_s = asyncio.run(beside(server, prompts, long))
        beside_s.append(ended_s - began_s)
        for router, into in enumerate(found):
            gaps = gaps_of(streams[router :: args.routers], began_s, ended_s)
            for part, more in zip(into, gaps, strict=True):
                part.extend(more)
    return [
        {
            "decoding": count,
            "router": "the prompt's" if router == 0 else "another",
            "gap_p50_ms": _ms(apart, 50),
            "gap_p99_ms": _ms(apart, 99),
            "gap_p50_beside_ms": _ms(during, 50),
            "gap_p99_beside_ms": _ms(during, 99),
            "gap_max_beside_ms": _ms(during, 100),
            "p99_ratio": _ms(during, 99) / _ms(apart, 99),
            "prefill_alone_s": statistics.median(alone_s),
            "prefill_beside_s": statistics.median(beside_s),
        }
        for router, (apart, during) in enumerate(found)
    ]


def _ms(gaps_s: list[float], part: float) -> float:
    return 1e3 * float(np.percentile(gaps_s, part)) if gaps_s else float("nan")


def measure_engine(engine: Engine, count: int, args: argparse.Namespace, vocab: int) -> Row:
    """One row: `count` decoding streams beside a prefill, by the CPU clock."""
    rng = np.random.default_rng(count)
    steps: dict[str, list[float]] = {"lone": [], "decode": [], "long": []}
    served = True

    def add(name: str, length: int, new_tokens: int) -> None:
        ids = tuple(rng.integers(16, vocab, length).tolist())
        sampling = SamplingParams(seed=0, temperature=0, max_tokens=new_tokens, ignore_eos=True)
        engine.add(GenerationRequest(request_id=name, prompt_ids=ids, sampling=sampling))

    def step(into: str) -> set[str]:
        """Who got a token."""
        started = time.process_time()
        events = engine.step()
        steps[into].append(time.process_time() - started)
        return {event.request_id for event in events if event.token_ids}

    add("lone", args.prompt_tokens, 1)
    while "lone" not in step("lone"):
        pass
    names = {f"decode-{n}" for n in range(count)}
    for name in names:
        add(name, 16, _DECODE_TOKENS)
    while step("decode") != names:
        steps["decode"].clear()  # their prompts
    for _ in range(40):
        step("decode")
    add("long", args.prompt_tokens, 1)
    while "long" not in (got := step("long")):
        served &= names <= got
    for name in names:
        engine.cancel(name)
    engine.step()
    return {
        "decoding": count,
        "step_p50_ms": 1e3 * statistics.median(steps["decode"]),
        "step_p50_beside_ms": 1e3 * statistics.median(steps["long"]),
        "step_max_beside_ms": 1e3 * max(steps["long"]),
        "prefill_alone_s": sum(steps["lone"]),
        "prefill_beside_s": sum(steps["long"]),
        "steps": len(steps["long"]),
        "a_token_in_every_step": served,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("model")
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--decoding", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--config", help="config file for raymoe serve")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--in-process", action="store_true", help="the engine alone, CPU time")
    args = parser.parse_args()
    if not args.in_process and args.routers > 1 and any(n % args.routers for n in args.decoding):
        parser.error("--decoding: as many streams for each router, e.g. 2 or 8 with two of them")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends too
    vocab = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    if args.in_process:
        torch.set_num_threads(1)
        engine, _ = local_engine(Path(args.model))
        rows = [measure_engine(engine, count, args, vocab) for count in args.decoding]
    else:
        server = Server(args.model, args.groups, args.routers, args.config)
        try:
            rows = [row for n in args.decoding for row in measure(server, n, args, vocab)]
        finally:
            server.stop()
    print(table(list(rows[0]), [list(row.values()) for row in rows]))
    finish("prefill", vars(args), rows)


if __name__ == "__main__":
    main()
